import os
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from dspa_kernels import InputError, SAEWeights, activation_counts
from dspa_kernels.backends import implementation
from dspa_kernels.testing import KINDS, random_sae, run_on
from dspa_kernels.weights import NORMALIZATIONS

from . import oracle
from .cases import D_IN, D_SAE, DTYPES, MARGIN, VIEWS, integer_tensor, residual
from .test_ops_contract import recorded
from .test_sparse_encode import small_blocks

N, N_SEQUENCES = 29, 5
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def ragged(n: int = N) -> Tensor:
    """Sequences of unequal length, out of order; about a sixth of the rows uncounted; sequence 3 is empty."""
    sequences = integer_tensor(-1, N_SEQUENCES, (n,), seed=1)
    return torch.where(sequences == 3, -7, sequences)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_exact_on_integers(backend: str, kind: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    sae = random_sae(kind, D_IN, D_SAE, dtype=dtypes[1], integers=True)
    h = residual(N, dtypes[0], integers=True)
    counts = run_on(backend, activation_counts, h, sae, ragged(), N_SEQUENCES)
    expected = oracle.counts(h, sae, ragged(), N_SEQUENCES)
    assert counts.dtype == torch.int32 and torch.equal(counts, expected)
    assert (expected[[0, 1, 2, 4]].amax(dim=1) > 1).all() and not expected[3].any()


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_real_values(backend: str, kind: str, dtypes: tuple[torch.dtype, torch.dtype], normalize: str) -> None:
    sae = random_sae(kind, D_IN, D_SAE, dtype=dtypes[1], normalize=normalize)
    h = residual(7, dtypes[0])
    assert oracle.margin(h, sae) > MARGIN, "rounding decides here: choose another seed"
    counts = run_on(backend, activation_counts, h, sae, ragged(7), N_SEQUENCES)
    assert torch.equal(counts, oracle.counts(h, sae, ragged(7), N_SEQUENCES))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("pre", "threshold", "k", "active"),
    [
        ([3, 2, 4, 9], [3, 1, 2, 10], 0, [0, 1, 1, 0]),
        ([0, -1, 1, 0], [-5, -5, -5, 0], 0, [0, 0, 1, 0]),
        ([2, 2, 2, 1], [0, 0, 0, 0], 2, [1, 1, 0, 0]),
        ([1, 2, 2, 2], [9, 9, 9, 9], 2, [0, 1, 1, 0]),
        ([3, -1, 0, -2], [-9, -9, -9, -9], 4, [1, 0, 0, 0]),
    ],
)
def test_what_is_active(
    backend: str, pre: list[int], threshold: list[int], k: int, active: list[int], dtype: torch.dtype
) -> None:
    eye = torch.eye(4, dtype=dtype)
    sae = SAEWeights(eye, torch.zeros(4), torch.tensor(threshold).float(), eye.clone(), k=k)
    h, sequences = torch.tensor([pre], dtype=dtype), torch.zeros(1, dtype=torch.int32)
    assert run_on(backend, activation_counts, h, sae, sequences, 1).tolist() == [active]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "sequences", [[], [0], [-1], [-1, -1, -1], [2, 0, 2], [1] * 40], ids=lambda sequences: str(len(sequences))
)
def test_few_rows_and_few_counted(backend: str, sequences: list[int], kind: str) -> None:
    sae = random_sae(kind, D_IN, D_SAE, integers=True)
    h = residual(len(sequences), torch.float32, integers=True)
    s = torch.tensor(sequences, dtype=torch.int32)
    assert torch.equal(run_on(backend, activation_counts, h, sae, s, 3), oracle.counts(h, sae, s, 3))


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_counts_of_several_calls_add_up_in_out(backend: str, kind: str, accumulate: bool) -> None:
    """Neighbours of `out` in memory stay, and nothing but `out` is returned."""
    sae = random_sae(kind, D_IN, D_SAE, integers=True)
    h = residual(N, torch.float32, integers=True)
    device = "cpu" if backend == "reference" or INTERPRETED else "cuda"
    memory = integer_tensor(0, 100, (N_SEQUENCES + 2, D_SAE), seed=4)
    moved = memory.to(device)
    expected = memory.clone()
    for part in (slice(0, 20), slice(20, N), slice(3, 4)):
        s = ragged()[part] if part.start < 20 else ragged()[part] % 2
        out = activation_counts(
            h[part].to(device),
            sae.to(device),
            s.to(device),
            N_SEQUENCES,
            out=moved[1:-1],
            accumulate=accumulate,
            backend=backend,
        )
        assert out.data_ptr() == moved[1].data_ptr()
        counts = oracle.counts(h[part], sae, s, N_SEQUENCES)
        expected[1:-1] = expected[1:-1] + counts if accumulate else counts
        assert torch.equal(moved.cpu(), expected)


def test_no_sequences(backend: str) -> None:
    sae = random_sae("jumprelu", D_IN, D_SAE)
    s = torch.full((4,), -1, dtype=torch.int32)
    assert run_on(backend, activation_counts, residual(4, torch.float32), sae, s, 0).shape == (0, D_SAE)


@pytest.mark.parametrize("k", [1, D_SAE - 1, D_SAE])
def test_any_k(backend: str, k: int) -> None:
    sae = random_sae("topk", D_IN, D_SAE, k=k, integers=True)
    h = residual(N, torch.float32, integers=True)
    counts = run_on(backend, activation_counts, h, sae, ragged(), N_SEQUENCES)
    assert torch.equal(counts, oracle.counts(h, sae, ragged(), N_SEQUENCES))


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_is_not_a_number_activates_nothing(backend: str, kind: str) -> None:
    sae = random_sae(kind, D_IN, D_SAE, integers=True)
    h = residual(N, torch.float32, integers=True)
    without = ragged()
    without[4] = -1
    expected = oracle.counts(h, sae, without, N_SEQUENCES)
    h[4] = float("nan")
    with_it = without.clone()
    with_it[4] = 2
    assert torch.equal(run_on(backend, activation_counts, h, sae, with_it, N_SEQUENCES), expected)


@pytest.mark.parametrize("view", VIEWS)
def test_views(backend: str, view: str) -> None:
    sae = random_sae("jumprelu", D_IN, D_SAE, dtype=torch.bfloat16, integers=True)
    h = VIEWS[view](residual(N, torch.bfloat16, integers=True))
    sequences = ragged().repeat_interleave(2)[::2]
    assert not h.is_contiguous() and not sequences.is_contiguous()
    counts = run_on(backend, activation_counts, h, sae, sequences, N_SEQUENCES)
    assert torch.equal(counts, oracle.counts(h, sae, sequences, N_SEQUENCES))


SAE = random_sae("jumprelu", D_IN, D_SAE)
VALID = {"h": residual(N, torch.float32), "sae": SAE, "sequences": ragged(), "n_sequences": N_SEQUENCES}


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"h": torch.zeros(2, 3, D_IN)}, ("`h`", "[2, 3, 19]", "[N, 19]", "Flatten")),
        ({"h": torch.zeros(N, D_IN, dtype=torch.int32)}, ("`h`", "torch.int32", "torch.float16")),
        ({"sae": SAE.to("meta")}, ("`sae`", "meta", "cpu", "`h`")),
        ({"sequences": ragged()[None]}, ("`sequences`", "[1, 29]", "[29]")),
        ({"sequences": ragged().long()}, ("`sequences`", "torch.int64", "torch.int32")),
        ({"sequences": ragged().to("meta")}, ("`sequences`", "meta", "cpu")),
        ({"n_sequences": -1}, ("`n_sequences`", "-1", ">= 0")),
        ({"accumulate": True}, ("`accumulate`", "True", "False without `out`")),
        ({"out": torch.zeros(4, D_SAE, dtype=torch.int32)}, ("`out`", "[4, 67]", "[5, 67]")),
        ({"out": torch.zeros(5, D_SAE)}, ("`out`", "torch.float32", "torch.int32")),
        ({"out": torch.zeros(5, D_SAE, dtype=torch.int32, device="meta")}, ("`out`", "meta", "cpu")),
        ({"out": torch.zeros(5, 2 * D_SAE, dtype=torch.int32)[:, ::2]}, ("`out`", "not contiguous", "of its own")),
        ({"backend": ""}, ("`backend`", "''", "reference")),
    ],
)
def test_input_errors(change: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as error:
        activation_counts(**(VALID | change))
    assert all(part in str(error.value) for part in parts), error.value


MANY = 45
SEQUENCES = {
    "ragged": ragged(MANY),
    "sorted": ragged(MANY).sort().values,
    "a sequence a row": torch.arange(MANY).flip(0).to(torch.int32),
    "one": torch.full((MANY,), 2, dtype=torch.int32),
    "tiles without": torch.where(torch.arange(MANY) // 20 == 1, 1, -1).to(torch.int32),
    "none": torch.full((MANY,), -1, dtype=torch.int32),
}


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("kind", "sequences"), [*(("jumprelu", name) for name in SEQUENCES), ("topk", "ragged"), ("topk", "none")]
)
def test_tiles_and_chunks(monkeypatch: pytest.MonkeyPatch, kind: str, sequences: str) -> None:
    """Any order of sequences in tiles that end within all dimensions, and in chunks of rows."""
    sae = random_sae(kind, D_IN, D_SAE, integers=True)
    h, s = residual(MANY, torch.float32, integers=True), SEQUENCES[sequences]
    expected = run_on("reference", activation_counts, h, sae, s, MANY)
    assert expected.any() == (sequences != "none")
    small_blocks(monkeypatch)
    assert torch.equal(run_on("triton", activation_counts, h, sae, s, MANY), expected)


@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
def test_a_sequence_that_does_not_exist_is_written_nowhere(kind: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    sae, h = random_sae(kind, D_IN, D_SAE, integers=True), residual(6, torch.float32, integers=True)
    s = torch.tensor([0, 3, 1, 2, 1000, 1], dtype=torch.int32)
    expected = run_on("reference", activation_counts, h, sae, torch.where(s < 2, s, -1), 2)
    assert torch.equal(run_on("triton", activation_counts, h, sae, s, 2), expected)


@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
def test_latents_are_not_stored(monkeypatch: pytest.MonkeyPatch, normalize: str) -> None:
    """Count what the launcher allocates; the kernels do not run, since the interpreter copies their arguments."""
    encode = pytest.importorskip("dspa_kernels.ops.shared.triton_encode", reason="Triton is not installed")
    for name in ("encode_kernel", "normalise_kernel", "n_programs"):
        monkeypatch.setattr(encode, name, mock.MagicMock())
    sae = random_sae("jumprelu", D_IN, D_SAE, normalize=normalize)
    largest = {
        backend: recorded(
            implementation("activation_counts", backend),
            h=residual(MANY, torch.float32),
            **sae.encoder(),
            sequences=ragged(MANY).clamp(min=0),
            counts=torch.zeros(N_SEQUENCES, D_SAE, dtype=torch.int32),
        ).largest
        for backend in ("triton", "reference")
    }
    assert largest["triton"] == MANY * D_IN * (normalize != "none")
    assert largest["reference"] == MANY * D_SAE, "the meter sees nothing"
    encode.encode_kernel.__getitem__.assert_called_once()
