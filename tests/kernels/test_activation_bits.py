"""`activation_bits` against the latents that `sparse_encode`'s oracle finds, packed by numpy."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dspa_kernels import InputError, activation_bits, activation_counts, formulas
from dspa_kernels.testing import KINDS, random_sae
from dspa_kernels.weights import NORMALIZATIONS

from .cases import D_IN, D_SAE, integer_tensor, residual
from .test_activation_counts import INTERPRETED

N_SLOTS = 40


def active(h: Tensor, sae: Any) -> Tensor:
    """[N, d_sae] bool: each row is a sequence of its own."""
    rows = torch.arange(len(h), dtype=torch.int32)
    return activation_counts(h, sae, rows, len(h), backend="reference") > 0


def words(active: Tensor) -> Tensor:
    """[N, n_words] int32, the first latent in the lowest bit."""
    packed = np.packbits(active.numpy(), axis=1, bitorder="little")
    packed = np.pad(packed, [(0, 0), (0, -packed.shape[1] % 4)])
    return torch.from_numpy(packed.view("<i4"))


def kept(backend: str, h: Tensor, sae: Any, slots: Tensor, out: Tensor) -> Tensor:
    """Run the op on the backend's device with a copy of `out`, which it returns itself."""
    device = "cpu" if backend == "reference" or INTERPRETED else "cuda"
    moved = out.clone().to(device)
    assert activation_bits(h.to(device), sae.to(device), slots.to(device), moved, backend=backend) is moved
    return moved.cpu()


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [0, 1, 11, 35])
def test_exact(backend: str, n: int, kind: str, normalize: str) -> None:
    """Words of the named slots, in any order, and nothing else."""
    sae, h = random_sae(kind, D_IN, D_SAE, normalize=normalize), residual(n, torch.float32)
    slots = torch.randperm(N_SLOTS, generator=torch.Generator().manual_seed(n))[:n]
    slots[1::3] = -1
    memory = integer_tensor(-(2**31), 2**31 - 1, (N_SLOTS, formulas.n_words(D_SAE)))
    expected = memory.clone()
    expected[slots[slots >= 0]] = words(active(h, sae))[slots >= 0]
    assert n == 0 or not torch.equal(expected, memory)
    assert torch.equal(kept(backend, h, sae, slots, memory), expected)


@pytest.mark.parametrize("d_sae", [1, 31, 32, 33, 200])
@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
def test_widths(backend: str, kind: str, d_sae: int) -> None:
    sae, h = random_sae(kind, D_IN, d_sae), residual(9, torch.float32)
    memory = integer_tensor(-(2**31), 2**31 - 1, (9, formulas.n_words(d_sae)))
    assert torch.equal(kept(backend, h, sae, torch.arange(9), memory), words(active(h, sae)))


@pytest.mark.parametrize("kind", KINDS)
def test_no_row_is_kept(backend: str, kind: str) -> None:
    sae, h = random_sae(kind, D_IN, D_SAE), residual(70, torch.float32)
    memory = integer_tensor(0, 99, (3, formulas.n_words(D_SAE)))
    assert torch.equal(kept(backend, h, sae, torch.full((70,), -1), memory), memory)


def test_many_rows_of_sixteen_bits(backend: str) -> None:
    """Tiles with and without rows that are kept."""
    sae, h = random_sae("jumprelu", 64, 1000, dtype=torch.bfloat16, integers=True), integer_tensor(-2, 3, (300, 64))
    h = h.bfloat16()
    slots = torch.where(torch.arange(300) // 64 % 2 == 0, -1, torch.arange(300).flip(0))
    memory = integer_tensor(0, 99, (300, 32))
    expected = memory.clone()
    expected[slots[slots >= 0]] = words(active(h, sae))[slots >= 0]
    assert torch.equal(kept(backend, h, sae, slots, memory), expected)


@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
def test_the_reference_holds_a_block(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    sae, h = random_sae(kind, D_IN, D_SAE), residual(30, torch.float32)
    memory = torch.zeros(30, formulas.n_words(D_SAE), dtype=torch.int32)
    whole = kept("reference", h, sae, torch.arange(30), memory)
    monkeypatch.setattr(formulas, "MAX_ELEMENTS", 100)
    assert torch.equal(kept("reference", h, sae, torch.arange(30), memory), whole)


VALID: dict[str, Any] = {
    "h": residual(6, torch.float32),
    "sae": random_sae("jumprelu", D_IN, D_SAE),
    "slots": torch.arange(6),
    "out": torch.zeros(N_SLOTS, formulas.n_words(D_SAE), dtype=torch.int32),
}


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"h": VALID["h"][0]}, ("`h`", "[N, ")),
        ({"slots": VALID["slots"].int()}, ("`slots`", "torch.int32", "torch.int64")),
        ({"slots": VALID["slots"][:5]}, ("`slots`", "[5]", "[6]")),
        ({"slots": VALID["slots"].to("meta")}, ("`slots`", "meta", "cpu")),
        ({"out": VALID["out"][:, :1]}, ("`out`", "[40, 1]", "one bit per latent")),
        ({"out": VALID["out"].long()}, ("`out`", "torch.int64", "torch.int32")),
        ({"out": VALID["out"][::2]}, ("`out`", "not contiguous", "of its own")),
        ({"backend": ""}, ("`backend`", "''", "reference")),
    ],
)
def test_input_errors(change: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as error:
        activation_bits(**(VALID | change))
    assert all(part in str(error.value) for part in parts), error.value
