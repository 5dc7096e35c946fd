"""The int5 copy of an encoder: its format, and a hunt for a pre-activation outside of its bounds.

What kernels compute is imitated in plain PyTorch, with sums in several orders. Among them are those of tensor cores,
which cut off what they add. Without a part of it, a bound must fail.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dspa_kernels.screen import pack, quantise, quantise_rows
from dspa_kernels.testing import same_bits

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# (rows, weights) that kernels multiply as they are, split into parts, and in fp32.
DTYPES = [(BF16, BF16), (FP16, FP16), (FP32, BF16), (FP32, FP32), (BF16, FP32)]
SCALE, OFFSET, SLACK, ERROR, SIZE = range(5)


def unpacked(rows: Tensor, d_in: int) -> Tensor:
    """q [n, d_in] int64 from a packed copy, number by number as the format is defined."""
    blocks = rows.long().view(len(rows), -1, 160)
    i = torch.arange(256)
    nibble = blocks[:, :, i % 128] >> torch.where(i < 128, 0, 4) & 15
    fifth = blocks[:, :, 128 + i % 32] >> i // 32 & 1
    return (nibble + 16 * fifth - 16).flatten(1)[:, :d_in]


# Format


@pytest.mark.parametrize("d_in", [1, 48, 255, 256, 257, 600])
def test_packed_numbers_are_what_was_packed(d_in: int) -> None:
    q = torch.randint(-15, 16, (7, d_in), generator=torch.Generator().manual_seed(d_in), dtype=torch.int8)
    rows = pack(q)
    n_blocks = -(-d_in // 256)
    assert rows.shape == (7, 160 * n_blocks) and rows.dtype == torch.uint8
    assert torch.equal(unpacked(rows, d_in), q.long())
    assert unpacked(rows, 256 * n_blocks)[:, d_in:].eq(0).all()


@pytest.mark.parametrize(
    ("number", "nibble", "shift", "bit"),
    [(0, 0, 0, (0, 0)), (33, 33, 0, (1, 1)), (127, 127, 0, (31, 3)), (128, 0, 4, (0, 4)), (255, 127, 4, (31, 7))],
)
def test_place_of_a_number(number: int, nibble: int, shift: int, bit: tuple[int, int]) -> None:
    zero, changed = torch.zeros(1, 256, dtype=torch.int8), torch.zeros(1, 256, dtype=torch.int8)
    changed[0, number] = -11  # code 5: the fifth bit goes
    difference = (pack(zero) ^ pack(changed)).flatten().tolist()
    byte, place = bit
    assert {i: b for i, b in enumerate(difference) if b} == {nibble: 5 << shift, 128 + byte: 1 << place}


def test_a_scale_has_nearly_the_least_square_error() -> None:
    g = torch.Generator().manual_seed(0)
    normal, tailed = torch.randn(2, 100, 512, generator=g)
    tailed = tailed / torch.randn(100, 512, generator=g).abs().clamp(min=0.05)
    for rows, gain in ((normal, 0.99), (tailed, 0.97)):
        q, scale = quantise(rows)
        steps = torch.linspace(0.2, 1.2, 101)[:, None, None] * rows.abs().amax(dim=1, keepdim=True) / 15
        errors = (rows - (rows / steps).round().clamp(-15, 15) * steps).norm(dim=2)
        error = (rows - q * scale[:, None]).norm(dim=1)
        assert (error < 1.1 * errors.amin(dim=0)).all()
        # A scale that reaches the largest number is worse.
        assert (error <= errors[80] * (1 + 1e-6)).all() and error.mean() < gain * errors[80].mean()


def test_blocks_of_rows_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    W, b, mean = torch.randn(50, 40, generator=g), torch.randn(50, generator=g), torch.randn(40, generator=g)
    whole = quantise_rows(W, b, mean)
    monkeypatch.setattr("dspa_kernels.screen.HEIGHT", 16)
    assert all(same_bits(a, b) for a, b in zip(whole, quantise_rows(W, b, mean), strict=True))


# Bounds


def parts(h: Tensor, W: Tensor) -> list[Tensor]:
    """Rows as they are multiplied, in fp64: of one 16-bit dtype, in three bf16 parts, or in fp32."""
    if W.dtype != BF16 or h.dtype == W.dtype:
        return [h.double()]
    rest, split = h.float(), []
    for _ in range(3):
        split.append(rest.bfloat16())
        rest = rest - split[-1].float()
    assert not rest.any() or rest.abs().max() < 2.0**-130
    return [part.double() for part in split]


def truncated(terms: Tensor, width: int) -> Tensor:
    """Sum terms [n, d] fp64 as a tensor core does, `width` at a time: all are cut below 2^-23 of the largest."""
    total = torch.zeros(len(terms), 1, dtype=torch.float64)
    for step in terms.split(width, dim=1):
        addends = torch.cat([total, step], dim=1)
        total = cut(addends, addends.abs().amax(dim=1, keepdim=True)).sum(dim=1, keepdim=True)
        total = cut(total, total)
    return total.flatten().float()


def cut(x: Tensor, like: Tensor) -> Tensor:
    """Truncate x to 24 bits of the largest number, `like`, and to no smaller than the smallest fp32 number."""
    unit = 2.0 ** (torch.frexp(like).exponent - 24).clamp(min=-149).double()
    return (x / unit).trunc() * unit


def one_by_one(terms: Tensor) -> Tensor:
    total = torch.zeros(len(terms))
    for term in terms.float().unbind(dim=1):
        total = total + term
    return total


def sums(h: Tensor, W: Tensor, weights: Tensor) -> Iterator[Tensor]:
    """h . weights [N, n] in fp32 in several orders, with h [N, d_in] multiplied as kernels do with W [n, d_in]."""
    split, weights = parts(h, W), weights.double()
    products = torch.cat([part[:, None] * weights for part in split], dim=2)
    terms = products.flatten(0, 1)
    shape = products.shape[:2]
    yield terms.sum(dim=1).float().view(shape)
    yield one_by_one(terms).view(shape)
    yield one_by_one(terms.flip(1)).view(shape)
    yield (h.float() @ weights.float().T).view(shape)
    if W.dtype != FP32:
        yield truncated(terms, 16).view(shape)
        yield truncated(terms.flip(1), 16).view(shape)
        yield truncated(terms, 4).view(shape)


@dataclass(frozen=True)
class Drawn:
    """Rows h [N, d_in], an encoder W [n, d_in] with b and threshold [n], and a mean row [d_in]."""

    h: Tensor
    W: Tensor
    b: Tensor
    threshold: Tensor
    mean: Tensor


@dataclass(frozen=True)
class Bounds:
    """The least and the largest pre-activations of all orders of sums, and bounds likewise, all [N, n] fp32."""

    pre: tuple[Tensor, Tensor]
    lower: Tensor
    upper: Tensor

    def violations(self) -> int:
        return int((self.pre[0] < self.lower).sum() + (self.pre[1] > self.upper).sum())


def bounds(drawn: Drawn, *, scaled: dict[int, float] | None = None) -> Bounds:
    """Bounds as kernels compute them, in fp32; some numbers per latent can be scaled."""
    h, W = drawn.h, drawn.W
    rows, latents = quantise_rows(W, drawn.b, drawn.mean)
    for i, factor in (scaled or {}).items():
        latents[i] *= factor
    d_in = h.shape[1]
    g = (d_in + 32) * (2.0**-22 if len(parts(h, W)) == 1 else 2.0**-20)
    x = h.float()
    centered, norm = ((row.square().sum(dim=1, keepdim=True).sqrt() * 1.001 + 1e-17) for row in (x - drawn.mean, x))
    E = latents[SLACK] + latents[ERROR] * centered + latents[SIZE] * (norm * g)
    pre = torch.stack([value + drawn.b for value in sums(h, W, W)])
    z = torch.stack([value * latents[SCALE] + latents[OFFSET] for value in sums(h, W, unpacked(rows, d_in))])
    return Bounds((pre.amin(dim=0), pre.amax(dim=0)), (z - E).amax(dim=0), (z + E).amin(dim=0))


N, LATENTS = 4, 40


def draw(name: str, dtypes: tuple[torch.dtype, torch.dtype], seed: int) -> Drawn:
    """Draw an SAE and rows that make the bounds of a screen tight, or its numbers extreme."""
    g = torch.Generator().manual_seed(seed)
    d_in = (48, 300, 520)[seed % 3]

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    h, W, b = randn(N, d_in), randn(LATENTS, d_in) / d_in**0.5, 0.1 * randn(LATENTS)
    threshold, mean = 0.3 * randn(LATENTS), h.mean(dim=0)
    if name == "heavy tails":
        W = W / randn(LATENTS, d_in).abs().clamp(min=1e-3)
    elif name == "massive dimensions":
        h[:, :3] = torch.tensor([3000.0, -2000.0, 500.0]) * (1 + 0.1 * randn(N, 3))
        mean = h.mean(dim=0)
    elif name == "near ties":
        W = W[:1] * (1 + randn(LATENTS, d_in) * torch.finfo(dtypes[1]).eps)
        h, b = h.abs() * W[0].sign(), b[:1].expand(LATENTS)
    elif name == "constant rows":
        W = randn(LATENTS, 1).expand(-1, d_in).contiguous()
    elif name == "one-hot rows":
        W = torch.zeros(LATENTS, d_in)
        W[torch.arange(LATENTS), torch.randint(d_in, (LATENTS,), generator=g)] = randn(LATENTS)
        W[::5] = 0
    elif name == "denormals":
        h, W, b, mean = h * 1e-7, W * (1e-7 if dtypes[1] == FP16 else 1e-39), b * 1e-38, mean * 1e-7
    elif name == "huge norms":
        exponent = 2 if FP16 in dtypes else 14
        h, W = h * 10.0**exponent, W * 10.0 ** randn(LATENTS, 1).mul(exponent / 3).clamp(-exponent, exponent)
        mean = h.mean(dim=0) if seed % 2 else torch.zeros(d_in)
    elif name == "along the remainder":
        # Rows on which <h - mu, r> is as large as it can be.
        q, scale = quantise(W.to(dtypes[1]))
        r = W.to(dtypes[1]).float() - q * scale[:, None]
        h = mean + 100 * r[:N] / r[:N].norm(dim=1, keepdim=True)
    elif name == "no remainder":
        # Only sums of products err. They would err alike if the scale were a power of two.
        W = torch.randint(8, 16, (LATENTS, d_in), generator=g) * 1.375
        W[:, 0], h, mean, b = 15 * 1.375, (2 * h).exp(), torch.zeros(d_in), torch.zeros(LATENTS)
    elif name == "all bias":
        h, b = h[:1].to(dtypes[0]).float().expand(N, -1), 1e6 + 1e3 * randn(LATENTS)
        mean = h[0]
    else:
        assert name == "ordinary"
    return Drawn(h.to(dtypes[0]), W.to(dtypes[1]), b, threshold, mean)


TIGHT = {"along the remainder": ERROR, "no remainder": SIZE, "all bias": SLACK}
NAMES = [
    "ordinary",
    "heavy tails",
    "massive dimensions",
    "near ties",
    "constant rows",
    "one-hot rows",
    "denormals",
    "huge norms",
    *TIGHT,
]


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_no_pre_activation_is_outside_and_no_maximum_is_lost(
    name: str, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    for seed in range(6):
        drawn = draw(name, dtypes, seed)
        found = bounds(drawn)
        assert found.violations() == 0, seed
        for evaluated, threshold in ((0, drawn.threshold), (3, torch.zeros(LATENTS))):
            assert_no_maximum_is_lost(found, threshold, evaluated)


def assert_no_maximum_is_lost(bounds: Bounds, threshold: Tensor, n_evaluated: int) -> None:
    """Two passes keep every latent that holds a maximum above those of the latents that were evaluated before."""
    for pre in bounds.pre:
        f = torch.where((pre > threshold) & (pre > 0), pre, 0)
        certain = bounds.lower > threshold.clamp(min=0)
        known = f[:, :n_evaluated].amax(dim=1, keepdim=True) if n_evaluated else torch.zeros(N, 1)
        bound = torch.where(certain, bounds.lower, 0).amax(dim=1, keepdim=True)
        kept = (bounds.upper >= bound) & (bounds.upper > threshold) & (bounds.upper > known)
        M = f.amax(dim=1, keepdim=True)
        assert (bound <= M).all()
        assert kept[(f == M) & (known < M)].all()


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (FP16, FP16), (FP32, BF16)], ids=str)
@pytest.mark.parametrize(("name", "part"), TIGHT.items())
def test_the_hunt_notices_a_part_of_the_bound_that_is_missing(
    name: str, part: int, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    """A remainder that is 2 % too short, and no allowance for rounding sums, or biases."""
    factor = 0.98 if part == ERROR else 0.0
    assert sum(bounds(draw(name, dtypes, seed), scaled={part: factor}).violations() for seed in range(6)) > 0


@pytest.mark.parametrize("wrong", [torch.inf, -torch.inf, torch.nan, 1e30])
@pytest.mark.parametrize("where", ["W", "b", "mean"])
def test_what_may_overflow_excludes_nothing(where: str, wrong: float) -> None:
    drawn = draw("ordinary", (FP32, FP32), 0)
    if where == "W":
        drawn.W[1, 2] = wrong
    elif where == "b":
        drawn.b[1] = wrong * 1e7
    else:
        drawn.mean[2] = wrong * 1e7
    found = bounds(drawn)
    lower, upper = (bound[:, 1] if where != "mean" else bound for bound in (found.lower, found.upper))
    assert not (lower > -torch.inf).any() and not (upper < torch.inf).any()
    if where != "mean":
        others = found.upper[:, torch.arange(LATENTS) != 1]
        assert others.isfinite().all()


def test_a_row_that_may_overflow_excludes_nothing() -> None:
    drawn = draw("ordinary", (FP32, FP32), 0)
    drawn.h[1] *= 1e22
    found = bounds(drawn)
    assert not (found.lower[1] > -torch.inf).any() and not (found.upper[1] < torch.inf).any()
    assert found.upper[0].isfinite().all()
