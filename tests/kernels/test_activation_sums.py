from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from dspa_kernels import InputError, SAEWeights, activation_sums
from dspa_kernels.backends import implementation
from dspa_kernels.testing import KINDS, random_sae, run_on
from dspa_kernels.weights import NORMALIZATIONS

from ..rounding import rounding
from . import oracle
from .cases import D_IN, D_SAE, DTYPES, MARGIN, ROUNDINGS, VIEWS, residual
from .test_activation_counts import INTERPRETED, MANY, N_SEQUENCES, SEQUENCES, N, ragged
from .test_ops_contract import recorded
from .test_sparse_encode import small_blocks


def expected(h: Tensor, sae: SAEWeights, sequences: Tensor, n_sequences: int) -> Tensor:
    """The sums in fp64, by loops over rows and latents."""
    result = torch.zeros(n_sequences, sae.d_sae, dtype=torch.float64)
    for latents, sequence in zip(oracle.encode(h, sae), sequences.tolist(), strict=True):
        for j, value in latents.items() if sequence >= 0 else ():
            result[sequence, j] += float(value)
    return result


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_exact_on_integers(backend: str, kind: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    sae = random_sae(kind, D_IN, D_SAE, dtype=dtypes[1], integers=True)
    h = residual(N, dtypes[0], integers=True)
    sums = run_on(backend, activation_sums, h, sae, ragged(), N_SEQUENCES)
    wanted = expected(h, sae, ragged(), N_SEQUENCES)
    assert sums.dtype == torch.float32 and torch.equal(sums.double(), wanted)
    assert (wanted[[0, 1, 2, 4]].amax(dim=1) > 2).all() and not wanted[3].any()


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_real_values(backend: str, kind: str, dtypes: tuple[torch.dtype, torch.dtype], normalize: str) -> None:
    sae = random_sae(kind, D_IN, D_SAE, dtype=dtypes[1], normalize=normalize)
    h = residual(7, dtypes[0])
    assert oracle.margin(h, sae) > MARGIN, "rounding decides here: choose another seed"
    sums = run_on(backend, activation_sums, h, sae, ragged(7), N_SEQUENCES)
    wanted = expected(h, sae, ragged(7), N_SEQUENCES)
    # Up to 7 latents of one sign, whose products have terms of the size of a row.
    torch.testing.assert_close(sums.double(), wanted, rtol=0, atol=rounding(ROUNDINGS + 7, 7 * D_IN**0.5))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "sequences", [[], [0], [-1], [-1, -1, -1], [2, 0, 2], [1] * 40], ids=lambda sequences: str(len(sequences))
)
def test_few_rows_and_few_summed(backend: str, sequences: list[int], kind: str) -> None:
    sae = random_sae(kind, D_IN, D_SAE, integers=True)
    h = residual(len(sequences), torch.float32, integers=True)
    s = torch.tensor(sequences, dtype=torch.int32)
    assert torch.equal(run_on(backend, activation_sums, h, sae, s, 3).double(), expected(h, sae, s, 3))


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_sums_of_several_calls_add_up_in_out(backend: str, kind: str, accumulate: bool) -> None:
    """Neighbours of `out` in memory stay, and nothing but `out` is returned."""
    sae = random_sae(kind, D_IN, D_SAE, integers=True)
    h = residual(N, torch.float32, integers=True)
    device = "cpu" if backend == "reference" or INTERPRETED else "cuda"
    memory = torch.arange((N_SEQUENCES + 2) * D_SAE).view(-1, D_SAE).float()
    moved, wanted = memory.to(device), memory.double()
    for part in (slice(0, 20), slice(20, N), slice(3, 4)):
        s = ragged()[part]
        out = activation_sums(
            h[part].to(device),
            sae.to(device),
            s.to(device),
            N_SEQUENCES,
            out=moved[1:-1],
            accumulate=accumulate,
            backend=backend,
        )
        assert out.data_ptr() == moved[1].data_ptr()
        sums = expected(h[part], sae, s, N_SEQUENCES)
        wanted[1:-1] = wanted[1:-1] + sums if accumulate else sums
        assert torch.equal(moved.cpu().double(), wanted)


@pytest.mark.parametrize("k", [1, D_SAE - 1, D_SAE])
def test_any_k(backend: str, k: int) -> None:
    sae = random_sae("topk", D_IN, D_SAE, k=k, integers=True)
    h = residual(N, torch.float32, integers=True)
    sums = run_on(backend, activation_sums, h, sae, ragged(), N_SEQUENCES)
    assert torch.equal(sums.double(), expected(h, sae, ragged(), N_SEQUENCES))


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_is_not_a_number_adds_nothing(backend: str, kind: str) -> None:
    sae = random_sae(kind, D_IN, D_SAE, integers=True)
    h = residual(N, torch.float32, integers=True)
    without = ragged()
    without[4] = -1
    wanted = expected(h, sae, without, N_SEQUENCES)
    h[4] = float("nan")
    with_it = without.clone()
    with_it[4] = 2
    assert torch.equal(run_on(backend, activation_sums, h, sae, with_it, N_SEQUENCES).double(), wanted)


@pytest.mark.parametrize("view", VIEWS)
def test_views(backend: str, view: str) -> None:
    sae = random_sae("jumprelu", D_IN, D_SAE, dtype=torch.bfloat16, integers=True)
    h = VIEWS[view](residual(N, torch.bfloat16, integers=True))
    sums = run_on(backend, activation_sums, h, sae, ragged().repeat_interleave(2)[::2], N_SEQUENCES)
    assert torch.equal(sums.double(), expected(h, sae, ragged(), N_SEQUENCES))


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"h": torch.zeros(2, 3, D_IN)}, ("`h`", "[2, 3, 19]", "[N, 19]", "Flatten")),
        ({"sequences": ragged().long()}, ("`sequences`", "torch.int64", "torch.int32")),
        ({"n_sequences": -1}, ("`n_sequences`", "-1", ">= 0")),
        ({"accumulate": True}, ("`accumulate`", "True", "False without `out`")),
        ({"out": torch.zeros(5, D_SAE, dtype=torch.int32)}, ("`out`", "torch.int32", "torch.float32")),
    ],
)
def test_input_errors(change: dict[str, Any], parts: tuple[str, ...]) -> None:
    """The checks are those of `activation_counts`, but for the dtype of `out`."""
    sae = random_sae("jumprelu", D_IN, D_SAE)
    valid = {"h": residual(N, torch.float32), "sae": sae, "sequences": ragged(), "n_sequences": N_SEQUENCES}
    with pytest.raises(InputError) as error:
        activation_sums(**(valid | change))
    assert all(part in str(error.value) for part in parts), error.value


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("kind", "sequences"), [*(("jumprelu", name) for name in SEQUENCES), ("topk", "ragged"), ("topk", "none")]
)
def test_tiles_and_chunks(monkeypatch: pytest.MonkeyPatch, kind: str, sequences: str) -> None:
    """Any order of sequences in tiles that end within all dimensions, and in chunks of rows."""
    sae = random_sae(kind, D_IN, D_SAE, integers=True)
    h, s = residual(MANY, torch.float32, integers=True), SEQUENCES[sequences]
    wanted = expected(h, sae, s, MANY)
    assert wanted.any() == (sequences != "none")
    small_blocks(monkeypatch)
    assert torch.equal(run_on("triton", activation_sums, h, sae, s, MANY).double(), wanted)


@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
def test_a_sequence_that_does_not_exist_is_written_nowhere(kind: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    sae, h = random_sae(kind, D_IN, D_SAE, integers=True), residual(6, torch.float32, integers=True)
    s = torch.tensor([0, 3, 1, 2, 1000, 1], dtype=torch.int32)
    wanted = expected(h, sae, torch.where(s < 2, s, -1), 2)
    assert torch.equal(run_on("triton", activation_sums, h, sae, s, 2).double(), wanted)


def test_latents_are_not_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count what the launcher allocates; the kernels do not run, since the interpreter copies their arguments."""
    encode = pytest.importorskip("dspa_kernels.ops.shared.triton_encode", reason="Triton is not installed")
    for name in ("encode_kernel", "n_programs"):
        monkeypatch.setattr(encode, name, mock.MagicMock())
    arguments = {"sequences": ragged(MANY).clamp(min=0), "sums": torch.zeros(N_SEQUENCES, D_SAE)}
    run = implementation("activation_sums", "triton")
    sae = random_sae("jumprelu", D_IN, D_SAE)
    assert recorded(run, h=residual(MANY, torch.float32), **sae.encoder(), **arguments).largest == 0
    encode.encode_kernel.__getitem__.assert_called_once()
