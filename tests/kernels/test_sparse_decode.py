from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dspa_kernels import InputError, SparseLatents, sparse_decode
from dspa_kernels.testing import assert_as_accurate, random_sae, run_on, same_bits

from . import oracle
from .cases import D_IN, D_SAE, DTYPES, integer_tensor

N, K = 9, 7


def make_latents(n: int, k: int, dtype: torch.dtype, *, integers: bool = False) -> SparseLatents:
    """Empty places anywhere, with values that must not be read; latents may repeat."""
    indices = integer_tensor(-20, D_SAE, (n, k)).clamp(min=-1)
    if integers:
        values = integer_tensor(-5, 6, (n, k), seed=1).to(dtype)
    else:
        values = torch.randn(n, k, generator=torch.Generator().manual_seed(1)).to(dtype)
    counts = (indices >= 0).sum(dim=1, dtype=torch.int32)
    return SparseLatents(indices, values.masked_fill(indices < 0, float("nan")), counts)


def expected(latents: SparseLatents, W_dec: Tensor, b_dec: Tensor | None, dtype: Any = oracle.EXACT) -> Tensor:
    return oracle.decode(latents.indices, latents.values, W_dec, b_dec, dtype)


@pytest.mark.parametrize("bias", [None, *(dtype for dtype, _ in DTYPES[:4])], ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_exact_on_integers(backend: str, dtypes: tuple[torch.dtype, torch.dtype], bias: torch.dtype | None) -> None:
    latents = make_latents(N, K, dtypes[0], integers=True)
    W_dec = random_sae("relu", D_IN, D_SAE, dtype=dtypes[1], integers=True).W_dec
    b_dec = None if bias is None else torch.arange(D_IN).to(bias)
    out = run_on(backend, sparse_decode, latents, W_dec, b_dec)
    assert out.dtype == W_dec.dtype
    assert torch.equal(out.double(), expected(latents, W_dec, b_dec))
    assert (latents.indices < 0).any()


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_accuracy(backend: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    latents = make_latents(N, K, dtypes[0])
    W_dec = random_sae("relu", D_IN, D_SAE, dtype=dtypes[1]).W_dec
    b_dec = torch.linspace(-1, 1, D_IN)
    dtype = oracle.np.float64 if torch.float64 in dtypes else oracle.np.float32
    out = run_on(backend, sparse_decode, latents, W_dec, b_dec)
    plain = expected(latents, W_dec, b_dec, dtype).to(out.dtype)
    assert_as_accurate(out, plain, expected(latents, W_dec, b_dec))


@pytest.mark.parametrize("k", [0, 1, K])
@pytest.mark.parametrize("n", [0, 1, N])
def test_few_rows_and_places(backend: str, n: int, k: int) -> None:
    latents = make_latents(n, k, torch.float32, integers=True)
    W_dec = random_sae("relu", D_IN, D_SAE, integers=True).W_dec
    b_dec = torch.arange(D_IN).float()
    out = run_on(backend, sparse_decode, latents, W_dec, b_dec)
    assert torch.equal(out.double(), expected(latents, W_dec, b_dec))


def test_an_empty_row_is_the_bias(backend: str) -> None:
    latents = make_latents(1, K, torch.float32)
    latents.indices.fill_(-1)
    W_dec, b_dec = random_sae("relu", D_IN, D_SAE).W_dec, torch.linspace(-1, 1, D_IN)
    assert torch.equal(run_on(backend, sparse_decode, latents, W_dec, b_dec)[0], b_dec)
    assert not run_on(backend, sparse_decode, latents, W_dec).any()


def test_only_the_row_that_overflowed_is_nan(backend: str) -> None:
    latents = make_latents(N, K, torch.float32)
    latents.indices[4] = torch.arange(K)
    latents.values[4] = float("nan")
    out = run_on(backend, sparse_decode, latents, random_sae("relu", D_IN, D_SAE).W_dec)
    assert out.isnan().all(dim=1).nonzero().tolist() == [[4]] and out[[0, 8]].isfinite().all()


def test_views(backend: str) -> None:
    latents = make_latents(N, K, torch.float32, integers=True)
    wide = (latents.indices.repeat_interleave(2, dim=1)[:, ::2], latents.values.T.contiguous().T)
    viewed = SparseLatents(*wide, latents.counts)
    assert not viewed.indices.is_contiguous() and not viewed.values.is_contiguous()
    W_dec = random_sae("relu", D_IN, D_SAE, integers=True).W_dec
    out = run_on(backend, sparse_decode, viewed, W_dec)
    assert torch.equal(out.double(), expected(latents, W_dec, None))


LATENTS = make_latents(N, K, torch.float32)


def changed(**change: Tensor) -> SparseLatents:
    return replace(LATENTS, **change)


VALID = {"latents": LATENTS, "W_dec": torch.zeros(D_SAE, D_IN), "b_dec": torch.zeros(D_IN)}


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"W_dec": torch.zeros(D_SAE)}, ("`W_dec`", "[67]", "[d_sae, d_out]")),
        ({"W_dec": torch.zeros(D_SAE, D_IN, dtype=torch.int8)}, ("`W_dec`", "torch.int8", "torch.float32")),
        ({"latents": changed(indices=LATENTS.indices[0])}, ("`latents.indices`", "[7]", "[N, K]")),
        ({"latents": changed(indices=LATENTS.indices.long())}, ("`latents.indices`", "torch.int64", "torch.int32")),
        ({"latents": changed(values=LATENTS.values[:, 1:])}, ("`latents.values`", "[9, 6]", "[9, 7]")),
        ({"latents": changed(values=LATENTS.values.int())}, ("`latents.values`", "torch.int32", "torch.float32")),
        ({"latents": changed(indices=LATENTS.indices.to("meta"))}, ("`latents.indices`", "meta", "cpu", "`W_dec`")),
        ({"latents": changed(values=LATENTS.values.to("meta"))}, ("`latents.values`", "meta", "cpu", "`W_dec`")),
        ({"b_dec": torch.zeros(D_IN + 1)}, ("`b_dec`", "[20]", "[19]")),
        ({"b_dec": torch.zeros(D_IN, dtype=torch.int32)}, ("`b_dec`", "torch.int32", "torch.float32")),
        ({"b_dec": torch.zeros(D_IN, device="meta")}, ("`b_dec`", "meta", "cpu", "`W_dec`")),
        ({"backend": "jax"}, ("`backend`", "'jax'", "reference")),
    ],
)
def test_input_errors(change: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as error:
        sparse_decode(**(VALID | change))
    assert all(part in str(error.value) for part in parts), error.value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d_in", [1, 64, 191])
def test_blocks_of_columns_and_places(backend: str, d_in: int, dtype: torch.dtype) -> None:
    latents = make_latents(N, 130, torch.float32, integers=True)
    W_dec = random_sae("relu", d_in, D_SAE, dtype=dtype, integers=True).W_dec
    b_dec = torch.arange(d_in).float()
    exact = expected(latents, W_dec, b_dec)
    assert torch.equal(run_on(backend, sparse_decode, latents, W_dec, b_dec), exact.to(dtype))


def test_the_bits_of_a_row_do_not_depend_on_the_others(backend: str) -> None:
    latents = make_latents(N, 130, torch.float32)
    W_dec = random_sae("relu", 150, D_SAE, dtype=torch.bfloat16).W_dec
    together = run_on(backend, sparse_decode, latents, W_dec)
    for n in range(N):
        alone = SparseLatents(latents.indices[n : n + 1], latents.values[n : n + 1], latents.counts[n : n + 1])
        assert same_bits(run_on(backend, sparse_decode, alone, W_dec)[0], together[n])
