"""The path of a CPU in plain PyTorch, compared with the formulas in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dspa_kernels import SAEWeights, eager
from dspa_kernels.formulas import active_latents, latents
from dspa_kernels.testing import random_sae

D_IN, D_SAE, K = 264, 512, 5
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def sae(arch: str, dtype: torch.dtype = torch.float32) -> SAEWeights:
    return random_sae(arch, D_IN, D_SAE, k=K, dtype=dtype)


def encoder(sae: SAEWeights) -> tuple[Tensor, Tensor, Tensor, int]:
    return sae.encoder_rows, sae.b_enc, sae.threshold, sae.k


def rows(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(3)).to(dtype)


def expected(sae: SAEWeights, hn: Tensor) -> Tensor:
    return latents(hn.double(), *encoder(sae))


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Raise unless these are equal up to the rounding of their dtype, and of fp32 sums of a few hundred terms."""
    rounding = max(torch.finfo(actual.dtype).eps, 2.0**-18)
    torch.testing.assert_close(actual.double(), expected, rtol=rounding, atol=float(expected.abs().max()) * rounding)


@pytest.mark.parametrize("n", [0, 1, 3, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", ["relu", "jumprelu", "topk"])
def test_encodes_and_reconstructs(arch: str, dtype: torch.dtype, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, hn = sae(arch, dtype), rows(n, dtype)
    b_dec = torch.ones(D_IN, dtype=dtype)
    f = expected(theirs, hn)
    recon = f @ theirs.W_dec.double() + 1
    for blocks, work in ((1 << 24, 1 << 20), (7 * D_SAE, 0)):
        monkeypatch.setattr("dspa_kernels.formulas.MAX_ELEMENTS", blocks)
        monkeypatch.setattr(eager, "MAX_ELEMENTS", blocks)
        monkeypatch.setattr(eager, "SPARSE_WORK", work)
        monkeypatch.setattr(eager, "ONEDNN_WORK", work)
        ours = eager.encode(hn, *encoder(theirs))
        whole = eager.reconstruct(hn, *encoder(theirs), theirs.W_dec, b_dec)
        assert ours.dtype == whole.dtype == dtype and ours.shape == (n, D_SAE) and whole.shape == (n, D_IN)
        if n:
            assert 0 < (f > 0).double().mean() < 0.7
            assert_close(ours, f)
            assert_close(whole, recon)
            assert_close(eager.decode(ours, theirs.W_dec, b_dec), ours.double() @ theirs.W_dec.double() + 1)


def test_rows_of_the_encoder_need_not_be_contiguous() -> None:
    theirs, hn = sae("jumprelu"), rows(9)
    transposed = theirs.encoder_rows.T.contiguous().T
    assert not transposed.is_contiguous()
    assert_close(eager.encode(hn, transposed, *encoder(theirs)[1:]), expected(theirs, hn))


@pytest.mark.parametrize("arch", ["relu", "jumprelu", "topk"])
def test_exact_sums_have_equal_latents(arch: str) -> None:
    """With many ties, and many pre-activations that equal their threshold."""
    theirs = random_sae(arch, D_IN, D_SAE, k=K, integers=True)
    hn = torch.randint(-3, 4, (40, D_IN), generator=torch.Generator().manual_seed(2)).float()
    assert torch.equal(eager.encode(hn, *encoder(theirs)), latents(hn, *encoder(theirs)))


def test_of_equal_values_at_the_edge_the_smaller_index_is_active() -> None:
    pre = torch.tensor([[3.0, 1, 2, 2, 2, 0], [1, 2, 3, 4, 5, 6], [-1, -1, -1, 2, -1, -1], [0, 0, 0, 0, 0, 0]])
    active = torch.eye(6)
    f = eager.encode(pre, active, torch.zeros(6), torch.zeros(6), 3)
    assert torch.equal(f > 0, active_latents(pre, torch.zeros(6), 3))
    assert (f > 0)[0].tolist() == [True, False, True, True, False, False]
    assert torch.equal(f, torch.where(f > 0, pre, 0))


@pytest.mark.parametrize("arch", ["jumprelu", "topk"])
def test_rows_that_are_not_finite_are_nan_and_spoil_no_others(arch: str) -> None:
    theirs, hn = sae(arch), rows(6)
    hn[1, 3], hn[4, 0] = float("inf"), float("nan")
    ours = eager.encode(hn, *encoder(theirs))
    whole = eager.reconstruct(hn, *encoder(theirs), theirs.W_dec, torch.zeros(D_IN))
    for out in (ours, whole):
        assert out[[1, 4]].isnan().all() and out[[0, 2, 3, 5]].isfinite().all()
    good = hn[[0, 2, 3, 5]]
    assert_close(ours[[0, 2, 3, 5]], expected(theirs, good))


def test_a_sum_that_overflows_is_of_finite_rows() -> None:
    theirs, hn = sae("jumprelu", torch.float16), rows(40, torch.float16) + 60
    assert hn.sum().isinf()
    assert eager.encode(hn, *encoder(theirs)).isfinite().all()


@pytest.mark.parametrize("n_active", [0, 4, 400])
def test_decodes_few_latents_and_many(n_active: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample that shows few latents chooses the sparse way, which is right wherever the others are."""
    monkeypatch.setattr(eager, "SPARSE_WORK", 0)
    W_dec = torch.randn(D_SAE, D_IN, generator=torch.Generator().manual_seed(1))
    for n in (1, 30):
        f = torch.zeros(n, D_SAE)
        f[-1, :n_active] = torch.randn(n_active)
        f[0, n_active:] *= -1
        assert_close(eager.decode(f, W_dec, torch.ones(D_IN)), f.double() @ W_dec.double() + 1)


@pytest.mark.parametrize("work", [0, 1 << 40])
def test_fewer_places_than_k(work: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "SPARSE_WORK", work)
    theirs = sae("topk")
    arguments = (*encoder(theirs), theirs.W_dec, torch.zeros(D_IN))
    assert (eager.encode(rows(4), *encoder(theirs)) > 0).sum(dim=1).tolist() == 4 * [K]
    assert eager.reconstruct(rows(4), *arguments, capacity=K - 1).isnan().all()
    assert not eager.reconstruct(rows(4), *arguments, capacity=K).isnan().any()


def test_another_default_device_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "SPARSE_WORK", 0)
    for arch in ("jumprelu", "topk"):
        theirs, hn, b_dec = sae(arch), rows(4), torch.zeros(D_IN)
        whole = eager.reconstruct(hn, *encoder(theirs), theirs.W_dec, b_dec)
        with torch.device("meta"):
            assert torch.equal(eager.reconstruct(hn, *encoder(theirs), theirs.W_dec, b_dec), whole)


def test_only_rows_with_ties_are_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    pre, sizes, sort = rows(30), [], Tensor.sort
    pre[7, :9] = pre[7].max()
    monkeypatch.setattr(Tensor, "sort", lambda self, **options: sizes.append(len(self)) or sort(self, **options))
    values, indices, chosen = eager.top_latents(pre, K)
    assert sizes == [1]
    assert indices[7].tolist() == list(range(K)) and torch.equal(chosen, active_latents(pre + 99, torch.zeros(D_IN), K))
    assert torch.equal(values, pre.gather(1, indices))


@pytest.mark.parametrize("arch", ["jumprelu", "topk"])
def test_a_call_holds_the_latents_of_a_block_of_rows(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, pre_activations = [], eager._pre_activations

    def recorded(*arguments: Tensor) -> Tensor:
        pre = pre_activations(*arguments)
        sizes.append(pre.numel())
        return pre

    monkeypatch.setattr(eager, "_pre_activations", recorded)
    monkeypatch.setattr("dspa_kernels.formulas.MAX_ELEMENTS", 7 * D_SAE)
    theirs = sae(arch)
    eager.reconstruct(rows(40), *encoder(theirs), theirs.W_dec, torch.zeros(D_IN))
    assert sum(sizes) == 40 * D_SAE and max(sizes) == 7 * D_SAE
