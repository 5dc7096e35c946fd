"""`bit_counts` against numpy's unpackbits, token after token."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dspa_kernels import InputError, activation_bits, activation_counts, bit_counts, formulas
from dspa_kernels.testing import KINDS, random_sae

from .cases import D_IN, D_SAE, integer_tensor, residual
from .test_activation_counts import INTERPRETED

R, N_BLOCKS = 5, 6


def case(d_sae: int, block_size: int, seed: int = 0) -> dict[str, Any]:
    """Random bits, also the unused ones, which are never counted, in blocks in random order."""
    g = np.random.default_rng(seed)
    active = g.random((R * N_BLOCKS * block_size, 32 * formulas.n_words(d_sae))) < 0.4
    blocks = torch.randperm(R * N_BLOCKS, generator=torch.Generator().manual_seed(seed)).int()
    return {
        "bits": torch.from_numpy(np.packbits(active, axis=1, bitorder="little").view("<i4")),
        "blocks": blocks.view(R, N_BLOCKS),
        "block_size": block_size,
        "n_tokens": torch.tensor([3, 0, N_BLOCKS * block_size, 1, 2 * block_size + 1]).clamp(max=N_BLOCKS * block_size),
        "rows": torch.tensor([4, -1, 2, 1, 0], dtype=torch.int32),
        "out": integer_tensor(0, 99, (R, d_sae), seed=3),
    }


def expected(bits: Tensor, blocks: Tensor, block_size: int, n_tokens: Tensor, rows: Tensor, out: Tensor) -> Tensor:
    counts = out.numpy().copy()
    for row in [row for row in rows.tolist() if row >= 0]:
        counts[row] = 0
        for token in range(int(n_tokens[row])):
            slot = int(blocks[row, token // block_size]) * block_size + token % block_size
            unpacked = np.unpackbits(bits[slot].numpy().view(np.uint8), bitorder="little")
            counts[row] += unpacked[: counts.shape[1]]
    return torch.from_numpy(counts)


def counted(backend: str, **arguments: Any) -> Tensor:
    """Run the op on the backend's device with a copy of `out`, which it returns itself."""
    device = "cpu" if backend == "reference" or INTERPRETED else "cuda"
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in arguments.items()}
    moved["out"] = arguments["out"].clone().to(device)
    assert bit_counts(**moved, backend=backend) is moved["out"]
    return moved["out"].cpu()


@pytest.mark.parametrize("d_sae", [1, 32, 67, 1100])
@pytest.mark.parametrize("block_size", [1, 16, 48])
def test_exact(backend: str, block_size: int, d_sae: int) -> None:
    arguments = case(d_sae, block_size)
    wanted = expected(**arguments)
    assert torch.equal(wanted[3], arguments["out"][3]) and not wanted[1].any()
    assert torch.equal(counted(backend, **arguments), wanted)


@pytest.mark.parametrize("rows", [[-1, -1], [], [3]], ids=str)
def test_only_named_rows_are_counted(backend: str, rows: list[int]) -> None:
    arguments = case(D_SAE, 16) | {"rows": torch.tensor(rows, dtype=torch.int32)}
    assert torch.equal(counted(backend, **arguments), expected(**arguments))


def test_all_tokens_of_all_latents(backend: str) -> None:
    """More than a byte can count."""
    n = 700
    arguments = {
        "bits": torch.full((4, formulas.n_words(D_SAE)), -1, dtype=torch.int32),
        "blocks": torch.zeros(1, n, dtype=torch.int32),
        "block_size": 1,
        "n_tokens": torch.tensor([n]),
        "rows": torch.zeros(1, dtype=torch.int32),
        "out": torch.zeros(1, D_SAE, dtype=torch.int32),
    }
    assert torch.equal(counted(backend, **arguments), torch.full((1, D_SAE), n, dtype=torch.int32))


def test_a_view_of_block_tables(backend: str) -> None:
    arguments = case(D_SAE, 16)
    wide = torch.cat([arguments["blocks"], torch.full((R, 3), 10**6, dtype=torch.int32)], dim=1)
    view = wide[:, :N_BLOCKS]
    assert not view.is_contiguous()
    assert torch.equal(counted(backend, **(arguments | {"blocks": view})), expected(**arguments))


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_counts_as_it_does_without_a_cache(backend: str, kind: str) -> None:
    sae, h = random_sae(kind, D_IN, D_SAE), residual(30, torch.float32)
    arguments = case(D_SAE, 16) | {"n_tokens": torch.full((R,), 30), "rows": torch.tensor([2], dtype=torch.int32)}
    token = torch.arange(30)
    slots = arguments["blocks"][2, token // 16].long() * 16 + token % 16
    activation_bits(h, sae, slots, arguments["bits"], backend="reference")
    plain = activation_counts(h, sae, torch.zeros(30, dtype=torch.int32), 1, backend="reference")
    assert plain.any() and torch.equal(counted(backend, **arguments)[2], plain[0])


def test_the_reference_holds_a_block_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = case(D_SAE, 48)
    monkeypatch.setattr(formulas, "MAX_ELEMENTS", 7 * D_SAE)
    assert torch.equal(counted("reference", **arguments), expected(**arguments))


def test_slots_beyond_32_bits_of_words() -> None:
    """The memory between the slots is never touched, so that it takes none."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if not INTERPRETED:
        pytest.skip("a GPU would hold all 8 GB")
    n_words = formulas.n_words(D_SAE)
    small = case(D_SAE, 1)
    bits = torch.empty(2**31 // n_words + 2, n_words, dtype=torch.int32)
    blocks = torch.tensor([[len(bits) - 1, 0]], dtype=torch.int32)
    bits[blocks[0].long()] = small["bits"][:2]
    arguments = {"blocks": blocks, "block_size": 1, "n_tokens": torch.tensor([2])}
    arguments |= {"rows": torch.tensor([0], dtype=torch.int32), "out": torch.zeros(1, D_SAE, dtype=torch.int32)}
    near = arguments | {"blocks": torch.tensor([[0, 1]], dtype=torch.int32)}
    assert torch.equal(counted("triton", bits=bits, **arguments), expected(small["bits"], **near))


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"out": torch.zeros(R, D_SAE)}, ("`out`", "torch.float32", "torch.int32")),
        ({"out": torch.zeros(R + 1, D_SAE, dtype=torch.int32)}, ("`out`", "[6, ")),
        ({"bits": torch.zeros(9, 1, dtype=torch.int32)}, ("`bits`", "[9, 1]")),
        ({"blocks": torch.zeros(N_BLOCKS, R, dtype=torch.int32).T}, ("`blocks`", "contiguous rows")),
        ({"blocks": torch.zeros(R, 2, dtype=torch.int64)}, ("`blocks`", "torch.int64", "torch.int32")),
        ({"n_tokens": torch.zeros(R, dtype=torch.int32)}, ("`n_tokens`", "torch.int32", "torch.int64")),
        ({"rows": torch.zeros(2)}, ("`rows`", "torch.float32", "torch.int32")),
        ({"rows": torch.zeros(2, dtype=torch.int32, device="meta")}, ("`rows`", "meta", "cpu")),
        ({"block_size": 0}, ("`block_size`", "0")),
        ({"backend": ""}, ("`backend`", "''", "reference")),
    ],
)
def test_input_errors(change: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as error:
        bit_counts(**(case(D_SAE, 16) | change))
    assert all(part in str(error.value) for part in parts), error.value
