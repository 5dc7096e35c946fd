"""The screen of `steer` in Triton: both passes change no bit, read little, and unpack what was packed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dspa_kernels import EncoderStream, MapWeights, SAEWeights, SteeringPlan, steer
from dspa_kernels.ops.steer import triton_screen
from dspa_kernels.ops.steer.triton_screen import unpacking
from dspa_kernels.testing import random_sae, run_on, same_bits

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
N_SLOTS, D_SAE = 5, 140


@pytest.fixture
def reordered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers in the order for Hopper, as if the interpreter were one."""
    monkeypatch.setattr(triton_screen, "is_hopper", lambda: True)


def make_arguments(kind: str, dtypes: tuple[torch.dtype, torch.dtype], d_in: int, n: int) -> dict[str, Any]:
    """Rows with outliers in two columns, of which one has no plan and one is not finite, if there are more than two."""
    g = torch.Generator().manual_seed(d_in + n)
    h = torch.randn(n, d_in, generator=g)
    h[:, :2] += torch.tensor([40.0, -25.0])
    rows = torch.arange(n, dtype=torch.int32) % 3
    if n > 2:
        rows[1], h[2, 3] = -1, torch.inf
    sae = random_sae(kind, d_in, D_SAE, dtype=dtypes[1], k=12 if kind == "topk" else None)
    columns = torch.arange(0, 40, 2)
    slots = torch.rand(3, len(columns), generator=g).argsort(dim=1)[:, :N_SLOTS].int()
    return {
        "h": h.to(dtypes[0]),
        "sae": sae,
        "cdmap": MapWeights.gather(columns, torch.zeros(1, len(columns)), sae),
        "plan": SteeringPlan(slots, torch.full_like(slots, -1, dtype=torch.int8)),
        "rows": rows,
    }


def assert_no_bit_changes(arguments: dict[str, Any]) -> None:
    """Compare a screen, with and without a mean and hot latents, with a plain stream, recorded and not."""
    plain, edits = run_on("triton", steer, **arguments, record=True)
    mean = arguments["h"].float().nan_to_num(0, 0, 0).mean(dim=0)
    for hot, centre in ((None, None), (torch.tensor([139, 3, 77]), mean)):
        stream = EncoderStream.of(arguments["sae"], hot=hot, screen="int5", mean=centre)
        out, screened = run_on("triton", steer, **arguments, record=True, stream=stream)
        assert same_bits(out, plain)
        assert all(same_bits(a, b) for a, b in zip(vars(screened).values(), vars(edits).values(), strict=True))
        assert same_bits(run_on("triton", steer, **arguments, stream=stream), plain)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory", "ordered_sums")
@pytest.mark.parametrize(
    ("kind", "dtypes", "d_in", "n"),
    [
        ("jumprelu", (BF16, BF16), 600, 1),
        ("jumprelu", (FP16, FP16), 300, 17),
        ("jumprelu", (FP32, BF16), 513, 5),
        ("relu", (FP32, BF16), 48, 9),
        ("relu", (BF16, BF16), 256, 33),
        ("relu", (FP16, FP16), 520, 2),
        ("topk", (BF16, BF16), 40, 64),
        ("topk", (FP16, FP16), 300, 1),
        ("topk", (FP32, BF16), 300, 6),
    ],
    ids=str,
)
def test_a_screen_changes_no_bit(kind: str, dtypes: tuple[torch.dtype, torch.dtype], d_in: int, n: int) -> None:
    assert_no_bit_changes(make_arguments(kind, dtypes, d_in, n))


@pytest.mark.skipif(not INTERPRETED, reason="a GPU has its own order")
@pytest.mark.usefixtures("poisoned_memory", "ordered_sums", "reordered")
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (FP32, BF16)], ids=str)
def test_the_order_for_hopper_changes_no_bit(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    assert_no_bit_changes(make_arguments("jumprelu", dtypes, 600, 4))


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory", "ordered_sums")
@pytest.mark.parametrize("where", ["W", "b_enc"])
@pytest.mark.parametrize("wrong", [torch.inf, torch.nan])
def test_latents_that_are_not_finite_change_no_bit(where: str, wrong: float) -> None:
    arguments = make_arguments("jumprelu", (FP32, BF16), 48, 1)
    sae: SAEWeights = arguments["sae"]
    (sae.encoder_rows[131] if where == "W" else sae.b_enc[131:132])[:1] = wrong
    assert_no_bit_changes(arguments)


# Reading


def identity(n: int, values: list[float]) -> dict[str, Any]:
    """n rows whose pre-activations are `values` and then 0, and a plan that ablates the first."""
    W = torch.eye(D_SAE, dtype=BF16)
    h = torch.zeros(n, D_SAE, dtype=BF16)
    h[:, : len(values)] = torch.tensor(values)
    sae = SAEWeights(W, torch.zeros(D_SAE), torch.zeros(D_SAE), W.clone())
    slots = torch.zeros(n, 1, dtype=torch.int32)
    plan = SteeringPlan(slots, -torch.ones_like(slots, dtype=torch.int8))
    return {"h": h, "sae": sae, "cdmap": MapWeights.gather(torch.arange(1), torch.zeros(1, 1), sae), "plan": plan}


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("values", "read"),
    [
        ([0.5, 1.0, 5.0, 4.0], (0, 0)),  # the copy settles the row: 0.5 is less than 0.2 times its lower bound
        ([1.5, 1.0, 5.0, 4.0], (1, 1)),
        ([1.5, 1.0, 5.0, 5.0], (2, 2)),
        ([-1.0, 1.0, 5.0, 4.0], (0, 0)),
    ],
)
def test_only_latents_that_could_be_the_maximum_are_read(values: list[float], read: tuple[int, int]) -> None:
    arguments, paths = identity(3, values), torch.zeros(6, dtype=torch.int64)
    device = "cpu" if INTERPRETED else "cuda"
    stream = EncoderStream.of(arguments["sae"], screen="int5").to(device)
    moved = {name: value.to(device) for name, value in arguments.items()}
    tally = paths.to(device)
    out = steer(**moved, stream=stream, paths=tally, alpha=0.2, backend="triton")
    assert read[0] <= int(tally[-1]) <= read[1]
    assert same_bits(out.cpu(), run_on("triton", steer, **arguments, alpha=0.2, record=True)[0])


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
def test_a_screen_settles_rows_by_the_strength_of_their_plan() -> None:
    arguments = identity(3, [1.5, 1.0, 5.0, 4.0])
    alphas = torch.tensor([0.2, 0.4, 0.0])
    device = "cpu" if INTERPRETED else "cuda"
    moved = {name: value.to(device) for name, value in arguments.items()} | {"alpha": alphas.to(device)}
    stream, tally = EncoderStream.of(arguments["sae"], screen="int5").to(device), torch.zeros(6, dtype=torch.int64)
    tally = tally.to(device)
    out = steer(**moved, stream=stream, paths=tally, backend="triton")
    assert out[:, 0].tolist() == [0.5, 0, 1.5] and out[:, 1:].cpu().equal(arguments["h"][:, 1:])
    assert tally[4] == 3 and 1 <= int(tally[-1]) <= 2


# Unpacking

Registers = dict[str, int]


def permuted(a: int, b: int, selector: int) -> int:
    source = (b << 32 | a).to_bytes(8, "little")
    return int.from_bytes(bytes(source[selector >> 4 * i & 15] for i in range(4)), "little")


def looked_up(a: int, b: int, c: int, table: int) -> int:
    bits = ((a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1 for i in range(32))
    return sum((table >> row & 1) << i for i, row in enumerate(bits))


def multiplied(dtype: torch.dtype) -> Callable[..., int]:
    def fma(a: int, b: int, c: int) -> int:
        x, y, z = (halves(value, dtype).double() for value in (a, b, c))
        low, high = (x * y + z).to(dtype).view(torch.int16).tolist()
        return (high & 0xFFFF) << 16 | low & 0xFFFF

    return fma


def halves(register: int, dtype: torch.dtype) -> Tensor:
    signed = [(half ^ 0x8000) - 0x8000 for half in (register & 0xFFFF, register >> 16)]
    return torch.tensor(signed, dtype=torch.int16).view(dtype)


OPERATIONS: dict[str, Callable[..., int]] = {
    "mov.b32": lambda a: a,
    "shl.b32": lambda a, n: a << n & 0xFFFFFFFF,
    "shr.b32": lambda a, n: a >> n,
    "and.b32": lambda a, b: a & b,
    "lop3.b32": looked_up,
    "prmt.b32": permuted,
    "fma.rn.bf16x2": multiplied(BF16),
    "fma.rn.f16x2": multiplied(FP16),
}


def run_ptx(ptx: str, registers: Registers) -> Registers:
    """Execute straight PTX on 32-bit registers."""
    for line in re.findall(r"^\s*([a-z][\w.]*) (.*);$", ptx, re.MULTILINE):
        operation, (target, *sources) = line[0], line[1].split(", ")
        values = [registers[name] if name in registers else int(name, 0) for name in sources]
        registers[target] = OPERATIONS[operation](*values)
    return registers


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("bit", range(8))
def test_the_instructions_unpack_every_code(bit: int, dtype: torch.dtype) -> None:
    """Every byte of nibbles with either fifth bit, among other bits that are all set or all clear."""
    for nibbles in range(256):
        for fifth, others in ((0, 0), (1, 0), (0, 1), (1, 1)):
            plane = (255 * others & ~(1 << bit)) | fifth << bit
            # Four bytes differ, so that none can take the place of another.
            bytes_of = [nibbles ^ 0x11 * i for i in range(4)]
            planes = [plane ^ (1 << bit) * (i % 2) for i in range(4)]
            inputs = {"$2": int.from_bytes(bytes(bytes_of), "little"), "$3": int.from_bytes(bytes(planes), "little")}
            registers = run_ptx(unpacking(bit, dtype == FP16), inputs)
            q = torch.cat([halves(registers["$0"], dtype), halves(registers["$1"], dtype)]).tolist()
            expected = [
                (byte >> (4 if bit > 3 else 0) & 15) + 16 * (p >> bit & 1) - 16
                for byte, p in zip(bytes_of, planes, strict=True)
            ]
            assert q == expected


def test_declared_registers_are_all_that_are_used() -> None:
    for bit in range(8):
        ptx = unpacking(bit, False)
        declared = set(re.findall(r"r_\w+", ptx.splitlines()[1]))
        assert set(re.findall(r"r_\w+", ptx)) == declared
