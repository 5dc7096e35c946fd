"""Random weights, maps and plans, runs of an op on a backend, and comparisons, for tests/ and bench/."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from dspa_kernels.checks import refuse
from dspa_kernels.cuda_library import EMULATED
from dspa_kernels.weights import EncoderStream, MapWeights, SAEWeights, SteeringPlan

# The backends on which the tests of every op run: all but "reference" on a GPU, or emulated by Triton's interpreter or
# a library.
BACKENDS = ("reference", "triton", "cuda")
KINDS = ("relu", "jumprelu", "topk")


def random_sae(
    kind: str,
    d_in: int,
    d_sae: int,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    normalize: str = "none",
    k: int | None = None,
    integers: bool = False,
) -> SAEWeights:
    """Draw an SAE with unit decoder rows, and encoder rows near them.

    On standard normal rows about half of the latents (relu), a quarter (jumprelu) or k of them (topk) are active.

    Args:
        kind: one of KINDS.
        d_in: width of the residual stream.
        d_sae: number of latents.
        dtype: dtype of encoder_rows and W_dec. b_enc and threshold are fp32, or fp64 for fp64.
        seed: seed of the generator.
        normalize: as in `SAEWeights`.
        k: active latents per row of a topk SAE, by default `d_sae / 8`.
        integers: draw small integers for all weights. On small integer rows every sum is then exact, in any order and
            dtype, and there are many ties and many `pre = threshold`, so that results must be equal bit for bit.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in KINDS:
        raise refuse("kind", repr(kind), ", ".join(KINDS))
    g = torch.Generator().manual_seed(seed)
    if integers:
        encoder_rows, W_dec = torch.randint(-2, 3, (2, d_sae, d_in), generator=g).double()
        b_enc = torch.randint(-1, 2, (d_sae,), generator=g).double()
        threshold = torch.randint(-1, 6, (d_sae,), generator=g).double()
    else:
        W_dec = torch.randn(d_sae, d_in, generator=g, dtype=torch.float64)
        W_dec /= W_dec.norm(dim=1, keepdim=True)
        encoder_rows = W_dec + 0.1 * torch.randn(d_sae, d_in, generator=g) / d_in**0.5
        b_enc = 0.1 * torch.randn(d_sae, generator=g)
        threshold = 0.2 + torch.rand(d_sae, generator=g)
    full = torch.promote_types(dtype, torch.float32)
    return SAEWeights(
        encoder_rows=encoder_rows.to(dtype),
        b_enc=b_enc.to(full),
        threshold=(threshold if kind == "jumprelu" else torch.zeros(d_sae)).to(full),
        W_dec=W_dec.to(dtype),
        k=(k or max(1, d_sae // 8)) if kind == "topk" else 0,
        normalize=normalize,
    )


def random_map(sae: SAEWeights, d_sae_in: int, n_columns: int, seed: int = 0) -> MapWeights:
    """Draw a map from `d_sae_in` latents to `n_columns` random latents of `sae`, with values [d_sae_in, C]."""
    g = torch.Generator().manual_seed(seed)
    columns = torch.randperm(sae.d_sae, generator=g)[:n_columns].sort().values
    return MapWeights.gather(columns, torch.randn(d_sae_in, n_columns, generator=g), sae)


def random_plan(n_prompts: int, n_slots: int, n_columns: int, *, mode: str = "both", seed: int = 0) -> SteeringPlan:
    """Draw a plan [n_prompts, n_slots] with distinct columns per row, and about a quarter of the slots empty."""
    g = torch.Generator().manual_seed(seed)
    order = torch.rand(n_prompts, max(n_columns, n_slots), generator=g).argsort(dim=1)[:, :n_slots]
    empty = (order >= n_columns) | (torch.rand(order.shape, generator=g) < 0.25)
    signs = {"ablate": -torch.ones(order.shape), "augment": torch.ones(order.shape)}
    signs["both"] = torch.randint(0, 2, order.shape, generator=g) * 2.0 - 1
    return SteeringPlan(
        slots=torch.where(empty, -1, order).to(torch.int32),
        signs=torch.where(empty, 0, signs[mode]).to(torch.int8),
    )


def run_on(backend: str, op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run `op(*args, **kwargs, backend=backend)` on the backend's device and return the results on the CPU.

    Views stay views on their way.

    Raises:
        AssertionError: the op changed an input.
    """
    emulated = EMULATED if backend == "cuda" else os.environ.get("TRITON_INTERPRET") == "1"
    device = "cpu" if backend == "reference" or emulated else "cuda"
    args, kwargs = _to_device(args, device), {name: _to_device(value, device) for name, value in kwargs.items()}
    inputs = tensors((args, kwargs))
    before = [tensor.clone() for tensor in inputs]
    result = op(*args, **kwargs, backend=backend)
    assert all(same_bits(now, then) for now, then in zip(inputs, before, strict=True)), "an input changed"
    return _to_device(result, "cpu")


def tensors(value: Any) -> list[Tensor]:
    """Return all tensors in arguments or results, in order."""
    if isinstance(value, Tensor):
        return [value]
    if is_dataclass(value):
        value = [getattr(value, field.name) for field in fields(value)]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in tensors(item)] if isinstance(value, (list, tuple)) else []


def _to_device(value: Any, device: str) -> Any:
    if isinstance(value, Tensor):
        # `.to` alone would make a strided view contiguous on its way.
        storage = value.as_strided((value.untyped_storage().nbytes() // value.element_size(),), (1,), 0)
        return storage.to(device).as_strided(value.shape, value.stride(), value.storage_offset())
    if isinstance(value, tuple):
        return tuple(_to_device(item, device) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(*(_to_device(getattr(value, field.name), device) for field in fields(value)))
    return value


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return True if two tensors are equal to the last bit: a NaN equals itself, -0.0 differs from 0.0."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))


def _bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8) if values.dim() and values.numel() else values


def assert_as_accurate(actual: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Raise unless `actual` is about as near to `exact` (fp64) as `plain`, a plain computation in its dtype.

    Its largest error may be twice that of `plain`, plus 16 units in the last place of the largest value, for the order
    of a sum of few terms. NaNs must be in the same places.
    """
    assert actual.dtype == plain.dtype and actual.shape == exact.shape
    assert torch.equal(actual.isnan(), exact.isnan())
    if not actual.numel():
        return
    exact = exact.nan_to_num()
    error, allowed = ((values.double().nan_to_num() - exact).abs().max() for values in (actual, plain))
    unit = torch.finfo(torch.promote_types(actual.dtype, torch.float32)).eps * exact.abs().max()
    assert error <= 2 * allowed + 16 * unit, f"error {error:.3g}, of a plain computation {allowed:.3g}"


# Activity like that of a trained SAE near the middle of a language model. The unit of norms is a latent's median value.
L0, FALL, MOST_FREQUENT = 70.0, 0.7, 0.9
WITHIN, BETWEEN, ENCODER_NORMS = 0.7, 0.5, 0.25
CLUSTER, ENCODER_NOISE = 0.4, 0.3
MEAN_NORM, NOISE_NORM, NOISE_FALL = 10.0, 5.0, 0.5
N_MASSIVE, MASSIVE, MASSIVE_SPREAD = 4, 40.0, 0.1
# The latents that are ablated, by their rank among the most frequent.
CASES = {"hard": (0, 160), "easy": (160, 1600)}
MAX_ELEMENTS = 1 << 26


@dataclass(frozen=True, eq=False)
class Activity:
    """An SAE, rows of a residual stream, and statistics of other rows of that stream.

    Attributes:
        sae: the SAE.
        h: [N, d_in] rows.
        frequencies: [d_sae], share of the rows on which each latent is active.
        by_frequency: [d_sae] latents, the most frequent first.
        hot: [H] latents, beginning with the one that holds the maximum most often.
        mean: [d_in] fp32, the mean row.
    """

    sae: SAEWeights
    h: Tensor
    frequencies: Tensor
    by_frequency: Tensor
    hot: Tensor
    mean: Tensor

    def stream(self, *, screen: str = "none") -> EncoderStream:
        """Return the encoder as a calibrated `steer` reads it."""
        return EncoderStream.of(self.sae, hot=self.hot, n_large=len(self.hot), screen=screen, mean=self.mean)

    def steered(self, case: str, n_prompts: int, *, seed: int = 0) -> tuple[MapWeights, SteeringPlan]:
        """Draw a map of 160 columns among the latents of `CASES[case]`, and for each prompt 16 of them to ablate."""
        g = torch.Generator().manual_seed(seed)
        eligible = self.by_frequency.cpu()[slice(*CASES[case])]
        columns = eligible[torch.randperm(len(eligible), generator=g)[:160]].sort().values
        cdmap = MapWeights.gather(columns, torch.zeros(1, len(columns)), self.sae)
        slots = torch.rand(n_prompts, len(columns), generator=g).argsort(dim=1)[:, :16].to(torch.int32)
        plan = SteeringPlan(slots=slots, signs=torch.full_like(slots, -1, dtype=torch.int8))
        return cdmap, plan.to(self.h.device)


@dataclass(frozen=True, eq=False)
class _Source:
    """Draws rows: firing latents times their magnitudes, a mean vector, noise and massive dimensions."""

    W_dec: Tensor
    frequencies: Tensor
    medians: Tensor
    constant: Tensor
    spread: Tensor

    def rows(self, n: int, g: torch.Generator) -> Tensor:
        height = max(1, MAX_ELEMENTS // len(self.W_dec))
        blocks = [self._block(min(height, n - start), g) for start in range(0, n, height)]
        return torch.cat(blocks) if blocks else self.W_dec.new_empty(0, self.W_dec.shape[1])

    def _block(self, n: int, g: torch.Generator) -> Tensor:
        draw: dict[str, Any] = {"generator": g, "device": g.device}
        fires = torch.rand(n, len(self.W_dec), **draw) < self.frequencies
        row, latent = fires.nonzero(as_tuple=True)
        values = self.medians[latent] * (WITHIN * torch.randn(len(latent), **draw)).exp()
        offsets = torch.searchsorted(row, torch.arange(n, device=g.device))
        features = torch.nn.functional.embedding_bag(
            latent, self.W_dec, offsets, mode="sum", per_sample_weights=values.to(self.W_dec.dtype)
        )
        noise = torch.randn(n, len(self.spread), **draw) * self.spread
        rows: Tensor = features.float() + self.constant + noise
        return rows.to(self.W_dec.dtype)


def realistic_activity(
    d_in: int,
    d_sae: int,
    n_rows: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    n_calibration: int = 4096,
    n_hot: int = 64,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Activity:
    """Draw a JumpReLU SAE and rows on which it is about as active as a trained one, in place of a real model.

    Decoder rows are unit vectors in mild clusters. Encoder rows follow them, with noise and log-normal norms. Latents
    fire with frequencies that fall with their rank, `L0` per row, and with log-normal magnitudes. A row is the sum of
    its firing latents, a mean vector that the encoder's bias removes, noise with a power-law spectrum, and a few
    massive dimensions. Thresholds are such that each latent is active at its frequency.

    The same arguments give the same tensors on the same kind of device.
    """
    g = torch.Generator(device).manual_seed(seed)
    draw: dict[str, Any] = {"generator": g, "device": g.device}
    frequencies = torch.empty(d_sae, device=g.device)
    by_frequency = torch.randperm(d_sae, **draw)
    frequencies[by_frequency] = _falling(d_sae).to(g.device)
    encoder_rows, W_dec = _rows_in_clusters(d_in, d_sae, dtype, g)

    constant = torch.randn(d_in, **draw)
    constant *= MEAN_NORM / constant.norm()
    spread = (1 + torch.randperm(d_in, **draw)) ** -NOISE_FALL
    spread *= NOISE_NORM / spread.norm()
    massive = torch.randperm(d_in, **draw)[:N_MASSIVE]
    constant[massive] = MASSIVE * torch.randn(N_MASSIVE, **draw).sign()
    spread[massive] = MASSIVE * MASSIVE_SPREAD
    medians = (BETWEEN * torch.randn(d_sae, **draw)).exp()
    source = _Source(W_dec, frequencies, medians, constant, spread)

    h = source.rows(n_calibration, g)
    b_enc, threshold, holders = _calibrated(h, encoder_rows, frequencies, constant, g)
    often = holders.bincount(minlength=d_sae)
    hot = often.argsort(descending=True, stable=True)[: min(n_hot, int((often > 0).sum()))]
    sae = SAEWeights(encoder_rows, b_enc, threshold, W_dec)
    return Activity(sae, source.rows(n_rows, g), frequencies, by_frequency, hot, h.float().mean(dim=0))


def _falling(d_sae: int) -> Tensor:
    """Return frequencies by rank: proportional to rank^-FALL, at most MOST_FREQUENT, with sum L0."""
    power = torch.arange(1, d_sae + 1, dtype=torch.float64) ** -FALL
    low, high = 0.0, float(d_sae)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (middle * power).clamp(max=MOST_FREQUENT).sum() < L0 else (low, middle)
    return (high * power).clamp(max=MOST_FREQUENT).float()


def _rows_in_clusters(d_in: int, d_sae: int, dtype: torch.dtype, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw encoder_rows and W_dec [d_sae, d_in], in blocks of latents."""
    draw: dict[str, Any] = {"generator": g, "device": g.device}
    centres = torch.nn.functional.normalize(torch.randn(max(1, d_sae // 64), d_in, **draw))
    encoder_rows, W_dec = (torch.empty(d_sae, d_in, dtype=dtype, device=g.device) for _ in range(2))
    for encoder, decoder in zip(encoder_rows.split(8192), W_dec.split(8192), strict=True):
        centre = centres[torch.randint(len(centres), (len(decoder),), **draw)]
        unit = torch.nn.functional.normalize(CLUSTER * centre + torch.randn(decoder.shape, **draw) / d_in**0.5)
        along = unit + ENCODER_NOISE * torch.randn(decoder.shape, **draw) / d_in**0.5
        norms = (ENCODER_NORMS * torch.randn(len(decoder), 1, **draw)).exp()
        decoder.copy_(unit)
        encoder.copy_(torch.nn.functional.normalize(along) * norms)
    return encoder_rows, W_dec


def _calibrated(
    h: Tensor, encoder_rows: Tensor, frequencies: Tensor, constant: Tensor, g: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return b_enc and threshold [d_sae] for the given frequencies, and the latent that holds each row's maximum."""
    n, d_sae = len(h), len(encoder_rows)
    b_enc, threshold = torch.empty(2, d_sae, device=g.device)
    maximum, holder = torch.zeros(n, device=g.device), torch.zeros(n, dtype=torch.int64, device=g.device)
    width = max(1, MAX_ELEMENTS // n)
    for start in range(0, d_sae, width):
        block = slice(start, start + width)
        W = encoder_rows[block].float()
        b_enc[block] = -(W @ constant)
        pre = W @ h.float().T + b_enc[block, None]
        # A new row is above the m-th largest of n with probability m / (n + 1).
        m = frequencies[block] * (n + 1) + torch.rand(len(W), generator=g, device=g.device)
        order = pre.sort(dim=1, descending=True).values
        level = order.gather(1, m.long().clamp(min=1, max=n)[:, None] - 1).flatten()
        threshold[block] = torch.where(m < 1, 1.5 * level, level).clamp(min=0)
        f, latent = torch.where(pre > threshold[block, None], pre, 0).max(dim=0)
        holder = torch.where(f > maximum, latent + start, holder)
        maximum = torch.maximum(f, maximum)
    return b_enc, threshold, holder[maximum > 0]
