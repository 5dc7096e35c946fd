from typing import Any

import pytest
import torch
from torch import Tensor

from dspa_kernels import InputError, SAEWeights, formulas, sparse_decode, sparse_encode
from dspa_kernels.launch import Launch
from dspa_kernels.testing import KINDS, assert_as_accurate, random_sae, run_on
from dspa_kernels.weights import NORMALIZATIONS

from ..rounding import rounding
from . import oracle
from .cases import D_IN, D_SAE, DTYPES, MARGIN, ROUNDINGS, VIEWS, residual

N = 9


def placed(latents: list[oracle.Latents], capacity: int) -> tuple[Tensor, Tensor]:
    """Indices and values as `SparseLatents` has them, for rows that fit."""
    indices = [[*row, *[-1] * (capacity - len(row))] for row in latents]
    values = [[*map(float, row.values()), *[0.0] * (capacity - len(row))] for row in latents]
    shape = (len(latents), capacity)
    return (
        torch.tensor(indices, dtype=torch.int32).reshape(shape),
        torch.tensor(values, dtype=torch.float64).reshape(shape),
    )


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_exact_on_integers(backend: str, kind: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    sae = random_sae(kind, D_IN, D_SAE, dtype=dtypes[1], integers=True)
    h = residual(N, dtypes[0], integers=True)
    latents = oracle.encode(h, sae)
    capacity = max(map(len, latents))
    result = run_on(backend, sparse_encode, h, sae, capacity=capacity)
    indices, values = placed(latents, capacity)
    assert result.indices.dtype == result.counts.dtype == torch.int32
    assert result.values.dtype == torch.promote_types(torch.promote_types(*dtypes), torch.float32)
    assert torch.equal(result.indices, indices)
    assert torch.equal(result.values.double(), values)
    assert result.counts.tolist() == [len(row) for row in latents]


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_accuracy(backend: str, kind: str, dtypes: tuple[torch.dtype, torch.dtype], normalize: str) -> None:
    sae = random_sae(kind, D_IN, D_SAE, dtype=dtypes[1], normalize=normalize)
    h = residual(N, dtypes[0])
    assert oracle.margin(h, sae) > MARGIN, "rounding decides here: choose another seed"
    result = run_on(backend, sparse_encode, h, sae, capacity=D_SAE)
    indices, exact = placed(oracle.encode(h, sae), D_SAE)
    _, plain = placed(oracle.encode(h, sae, oracle.plain_dtype(h, sae)), D_SAE)
    assert torch.equal(result.indices, indices)
    assert_as_accurate(result.values, plain.to(result.values.dtype), exact)


@pytest.mark.parametrize("k", [1, 8, D_SAE])
def test_capacity_of_a_top_k_sae_is_k(backend: str, k: int) -> None:
    sae = random_sae("topk", D_IN, D_SAE, k=k, integers=True)
    h = residual(N, torch.float32, integers=True)
    result = run_on(backend, sparse_encode, h, sae)
    indices, values = placed(oracle.encode(h, sae), k)
    assert torch.equal(result.indices, indices) and torch.equal(result.values.double(), values)


@pytest.mark.parametrize(
    ("pre", "threshold", "k", "indices"),
    [
        ([3, 2, 4, 9], [3, 1, 2, 10], 0, [1, 2, -1, -1]),
        ([0, -1, 1, 0], [-5, -5, -5, 0], 0, [2, -1, -1, -1]),
        ([2, 2, 2, 1], [0, 0, 0, 0], 2, [0, 1, -1, -1]),
        ([1, 2, 3, 2], [9, 9, 9, 9], 2, [1, 2, -1, -1]),
        ([3, -1, 0, -2], [0, 0, 0, 0], 4, [0, -1, -1, -1]),
    ],
)
def test_what_is_active(backend: str, pre: list[int], threshold: list[int], k: int, indices: list[int]) -> None:
    eye = torch.eye(4)
    sae = SAEWeights(eye, torch.zeros(4), torch.tensor(threshold).float(), eye.clone(), k=k)
    result = run_on(backend, sparse_encode, torch.tensor([pre]).float(), sae, capacity=4)
    assert result.indices.tolist() == [indices]
    assert result.values.tolist() == [[0 if j < 0 else pre[j] for j in indices]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_overflows_is_nan(backend: str, kind: str) -> None:
    sae = random_sae(kind, D_IN, D_SAE, integers=True, k=40 if kind == "topk" else None)
    h = residual(40, torch.float32, integers=True)
    latents = oracle.encode(h, sae)
    counts = torch.tensor([len(row) for row in latents])
    capacity = int(counts.median())
    over = counts > capacity
    assert over.any() and not over.all() and (counts == capacity).any()

    result = run_on(backend, sparse_encode, h, sae, capacity=capacity)
    assert result.counts.tolist() == counts.tolist()
    assert result.values[over].isnan().all()
    indices, values = placed([row for row, out in zip(latents, over, strict=True) if not out], capacity)
    assert torch.equal(result.indices[~over], indices)
    assert torch.equal(result.values[~over].double(), values)

    decoded = run_on(backend, sparse_decode, result, sae.W_dec)
    assert decoded[over].isnan().all() and decoded[~over].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_decode_of_encode_is_the_dense_decode(backend: str, kind: str) -> None:
    sae = random_sae(kind, D_IN, D_SAE, integers=True)
    h = residual(N, torch.float32, integers=True)
    b_dec = torch.arange(D_IN).float()
    f = torch.zeros(N, D_SAE, dtype=torch.float64)
    for n, row in enumerate(oracle.encode(h, sae)):
        for j, value in row.items():
            f[n, j] = value
    latents = run_on(backend, sparse_encode, h, sae, capacity=D_SAE)
    decoded = run_on(backend, sparse_decode, latents, sae.W_dec, b_dec)
    assert torch.equal(decoded.double(), f @ sae.W_dec.double() + b_dec.double())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [0, 1])
def test_few_rows(backend: str, n: int, kind: str) -> None:
    sae = random_sae(kind, D_IN, D_SAE, integers=True)
    h = residual(n, torch.float32, integers=True)
    result = run_on(backend, sparse_encode, h, sae, capacity=D_SAE)
    indices, values = placed(oracle.encode(h, sae), D_SAE)
    assert torch.equal(result.indices, indices) and torch.equal(result.values.double(), values)
    assert result.counts.shape == (n,)


@pytest.mark.parametrize("view", VIEWS)
def test_views(backend: str, view: str) -> None:
    sae = random_sae("jumprelu", D_IN, D_SAE, dtype=torch.bfloat16, integers=True)
    h = VIEWS[view](residual(N, torch.bfloat16, integers=True))
    assert not h.is_contiguous()
    result = run_on(backend, sparse_encode, h, sae, capacity=D_SAE)
    indices, values = placed(oracle.encode(h, sae), D_SAE)
    assert torch.equal(result.indices, indices) and torch.equal(result.values.double(), values)


VALID = {"h": residual(N, torch.float32), "sae": random_sae("jumprelu", D_IN, D_SAE), "capacity": 9}


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"h": torch.zeros(D_IN)}, ("`h`", "[19]", "[N, 19]", "Flatten")),
        ({"h": torch.zeros(N, D_IN, dtype=torch.bool)}, ("`h`", "torch.bool", "torch.float32")),
        ({"sae": random_sae("relu", D_IN, D_SAE).to("meta")}, ("`sae`", "meta", "cpu", "`h`")),
        ({"capacity": None}, ("`capacity`", "None", "1 to d_sae", "top-k")),
        ({"capacity": 0}, ("`capacity`", "is 0", "from 1 to")),
        ({"capacity": 68}, ("`capacity`", "is 68", "67")),
        ({"backend": "numpy"}, ("`backend`", "'numpy'", "reference")),
    ],
)
def test_input_errors(change: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as error:
        sparse_encode(**(VALID | change))
    assert all(part in str(error.value) for part in parts), error.value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite(backend, value):
    """They cannot be taken for rows without active latents; their neighbours are as they were."""
    sae = random_sae("jumprelu", 24, 50, dtype=torch.float32, seed=0)
    h = torch.randn(3, 24, generator=torch.Generator().manual_seed(1))
    whole = run_on(backend, sparse_encode, h, sae, capacity=50)
    h[1, 5] = value
    latents = run_on(backend, sparse_encode, h, sae, capacity=50)
    assert latents.values[1].isnan().all()
    assert torch.equal(latents.values[[0, 2]], whole.values[[0, 2]])


def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles, groups of tiles, blocks of latents and chunks of rows, at the sizes of these tests."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from dspa_kernels.ops.shared import triton_encode, triton_totals
    from dspa_kernels.ops.sparse_encode import triton_impl as sparse

    launch = Launch(BLOCK_N=16, BLOCK_L=16, BLOCK_K=16, num_warps=4, num_stages=2, programs=1)
    monkeypatch.setattr(triton_encode, "launch_parameters", lambda *_: launch)
    monkeypatch.setattr(triton_encode, "GROUP_SIZE", 2)
    monkeypatch.setattr(formulas, "MAX_ELEMENTS", 1300)
    for module in (triton_totals, sparse):
        monkeypatch.setattr(module, "BLOCK", 32)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_tiles_and_chunks(monkeypatch: pytest.MonkeyPatch, kind: str, normalize: str) -> None:
    """Rows that fit, that do not and that are no numbers, through tiles that end within all dimensions."""
    integers = normalize == "none"
    sae = random_sae(kind, D_IN, D_SAE, integers=integers, normalize=normalize, k=30 if kind == "topk" else None)
    h = residual(37, torch.float32, integers=integers)
    assert integers or oracle.margin(h, sae) > MARGIN, "rounding decides here: choose another seed"
    h[[7, 31]] = float("nan")
    whole = run_on("reference", sparse_encode, h, sae, capacity=D_SAE)
    capacity = int(whole.counts.max()) - 1
    expected = run_on("reference", sparse_encode, h, sae, capacity=capacity)
    assert 0 < (expected.counts > capacity).sum() < 35
    small_blocks(monkeypatch)
    result = run_on("triton", sparse_encode, h, sae, capacity=capacity)
    assert torch.equal(result.indices, expected.indices) and torch.equal(result.counts, expected.counts)
    # Integers are exact.
    largest = float(expected.values.nan_to_num().abs().max())
    atol = 0 if integers else rounding(ROUNDINGS, D_IN**0.5 * largest)
    torch.testing.assert_close(result.values, expected.values, rtol=0, atol=atol, equal_nan=True)
