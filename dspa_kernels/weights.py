"""What the ops read: SAE weights, map weights, plans. Plain dataclasses of tensors, checked once when made."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from dspa_kernels.checks import check_at_least, check_device, check_dtype, check_shape, refuse
from dspa_kernels.formulas import Normalised, compute_dtype, latents, normalise

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FULL = (torch.float32, torch.float64)
SCREENS = ("none", "int8")
NORMALIZATIONS = ("none", "layer_norm", "constant_norm_rescale")

# How an op's schema spells an encoder and the map's columns.
ENCODER = "Tensor encoder_rows, Tensor b_enc, Tensor threshold, int k, str normalize"
COLUMNS = (
    "Tensor columns, Tensor columns_encoder_rows, Tensor columns_b_enc, Tensor columns_threshold, Tensor columns_W_dec"
)

# How `steer` spells the encoder that it streams.
STREAM = (
    "Tensor encoder_rows, Tensor b_enc, Tensor threshold, int k, str normalize, Tensor? order, int n_large,"
    " Tensor? screen_rows, Tensor? screen_latents, Tensor? screen_mean, Tensor barriers"
)
# What becomes of a residual row, in the order of the first numbers of `paths`.
PATHS = ("unsteered", "not_finite", "inactive", "settled", "streamed")
# Words of `EncoderStream.barriers`: one a stream of the device, and as many for captured graphs, each in a
# cache line of its own.
N_BARRIERS, BARRIER_INTS = 64, 32

T = TypeVar("T", "SAEWeights", "MapWeights", "SteeringPlan", "EncoderStream")


def _moved(weights: T, device: torch.device | str) -> T:
    tensors: Any = {f.name: v.to(device) for f in fields(weights) if isinstance(v := getattr(weights, f.name), Tensor)}
    return replace(weights, **tensors)


@dataclass(frozen=True, eq=False)
class SAEWeights:
    """A residual-stream SAE as the kernels read it: one contiguous row a latent.

    `pre = n(h) encoder_rows^T + b_enc`; latent j is active where `pre_j > threshold_j` and `pre_j > 0` (a ReLU
    SAE has `threshold = 0`), or, with `k > 0`, where it is among the k largest of its row and `pre_j > 0`.
    `n` is the normalisation of a row; the edit of a latent reaches the residual through `W_dec`, times the
    scale that `n` took out.

    Shapes: encoder_rows, W_dec [d_sae, d_in] of one floating dtype; b_enc, threshold [d_sae], fp32 or
    fp64. Errors: `InputError` for any other shape, dtype, device, layout.
    """

    encoder_rows: Tensor
    b_enc: Tensor
    threshold: Tensor
    W_dec: Tensor
    k: int = 0
    normalize: str = "none"

    def __post_init__(self) -> None:
        check_shape("encoder_rows", self.encoder_rows, ("d_sae", "d_in"))
        check_rows(self.encoder_rows, self.b_enc, self.threshold, self.W_dec)
        if not 0 <= self.k <= self.d_sae:
            raise refuse("k", self.k, f"0 (no top-k) to d_sae = {self.d_sae}")
        if self.normalize not in NORMALIZATIONS:
            raise refuse("normalize", repr(self.normalize), ", ".join(NORMALIZATIONS))

    @property
    def stream(self) -> EncoderStream:
        """The encoder as `steer` reads it by default: in its own order, unscreened.

        It is made on first use and kept. In a graph that is being traced or captured it belongs to the graph, and
        is not kept: use it before, and the graph need not make it.
        """
        kept: EncoderStream | None = self.__dict__.get("_stream")
        if kept is not None:
            return kept
        if torch.compiler.is_compiling() or (self.encoder_rows.is_cuda and torch.cuda.is_current_stream_capturing()):
            return EncoderStream.of(self)
        with torch.inference_mode(False):
            # One call, so that all threads get the same one.
            made: EncoderStream = self.__dict__.setdefault("_stream", EncoderStream.of(self))
        return made

    @property
    def d_in(self) -> int:
        """Width of the residual stream."""
        return self.encoder_rows.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.encoder_rows.shape[0]

    @property
    def W_enc(self) -> Tensor:
        """Encoder, [d_in, d_sae], as SAELens names it: a transposed view of `encoder_rows`."""
        return self.encoder_rows.T

    def normalise(self, h: Tensor) -> Normalised:
        """Normalise residuals as the encoder reads them.

        Args:
            h: [..., d_in]. Computed in fp32, or fp64 where h or the weights are. Differentiable.

        Returns:
            `Normalised(rows, mean, scale)`: n(h) [..., d_in], and the mean and scale [..., 1] that n removed.

        Raises:
            InputError: rows of another width.
        """
        check_shape("h", h, (*h.shape[:-1], self.d_in))
        return normalise(h, self.normalize, compute_dtype(h, self.encoder_rows))

    def latents(self, h: Tensor) -> Tensor:
        """Encode residuals to latents, dense and differentiable, in plain PyTorch.

        Args:
            h: [..., d_in]. Computed in fp32, or fp64 where h or the weights are.

        Returns:
            f [..., d_sae], 0 where a latent is inactive. Of equal values at the edge of the top k, the smaller
            index is active.

        Raises:
            InputError: rows of another width.
        """
        rows = self.normalise(h).rows
        return latents(rows, self.encoder_rows, self.b_enc, self.threshold, self.k)

    def encoder(self) -> dict[str, Any]:
        """The arguments `ENCODER` of an op's schema."""
        names = ("encoder_rows", "b_enc", "threshold", "k", "normalize")
        return {name: getattr(self, name) for name in names}

    def to(self, device: torch.device | str) -> SAEWeights:
        """The same weights on another device."""
        return _moved(self, device)


@dataclass(frozen=True, eq=False)
class EncoderStream:
    """The encoder in the form in which `steer` reads it when a row's maximum is needed.

    Rows stand in the order of how often their latents hold the maximum, so that a stream can stop early; the
    first `n_large` of them are evaluated before it and often settle a row without it. With a screen, an int8
    copy is read instead, and of the rows themselves only those that could hold a maximum. Neither order nor
    screen changes a bit; the large latents, evaluated apart, may change the rounding of M. Make one with
    `EncoderStream.of`.

    Shapes: encoder_rows [d_sae, d_in]; b_enc, threshold [d_sae] fp32 (fp64 for fp64); order [d_sae] int32, the latent
    of each row, None for their own order; screen_rows [d_sae, d_in] int8; screen_latents [4, d_sae] fp32:
    scale, offset, error and size of each row; screen_mean [d_in] fp32; barriers, zeros that every launch
    leaves as it found them.
    """

    encoder_rows: Tensor
    b_enc: Tensor
    threshold: Tensor
    k: int
    normalize: str
    order: Tensor | None
    n_large: int
    screen_rows: Tensor | None
    screen_latents: Tensor | None
    screen_mean: Tensor | None
    barriers: Tensor

    @classmethod
    def of(
        cls,
        sae: SAEWeights,
        *,
        hot: Tensor | None = None,
        n_large: int = 64,
        screen: str = "none",
        mean: Tensor | None = None,
    ) -> EncoderStream:
        """The stream of `sae`.

        Args:
            sae: the SAE. Its rows are copied if `hot` is given.
            hot: latents [H], the one that holds a row's maximum most often first. They lead the stream.
            n_large: how many of them are evaluated before it.
            screen: "none" or "int8", which adds one byte for each number of the encoder.
            mean: [d_in], about the mean of the (normalised) rows; a good one makes a screen tighter.

        Raises:
            InputError: latents that are not distinct or do not exist, another screen, another shape.
        """
        if screen not in SCREENS:
            raise refuse("screen", repr(screen), ", ".join(SCREENS))
        encoder_rows, b_enc, threshold, order = sae.encoder_rows, sae.b_enc, sae.threshold, None
        n_large = min(n_large, 0 if hot is None else len(hot))
        if hot is not None and len(hot):
            order = _led_by(hot.to(encoder_rows.device), sae.d_sae)
            encoder_rows, b_enc, threshold = (each[order.long()] for each in (encoder_rows, b_enc, threshold))
        if mean is not None:
            check_shape("mean", mean, (sae.d_in,))
        rows = latents = centre = None
        if screen == "int8":
            centre = torch.zeros(sae.d_in) if mean is None else mean
            centre = centre.to(sae.encoder_rows.device, torch.float32)
            rows, latents = quantise_rows(encoder_rows, b_enc, centre)
        barriers = torch.zeros(N_BARRIERS, BARRIER_INTS, dtype=torch.int32, device=sae.encoder_rows.device)
        return cls(
            encoder_rows=encoder_rows,
            b_enc=b_enc,
            threshold=threshold,
            k=sae.k,
            normalize=sae.normalize,
            order=order,
            n_large=n_large,
            screen_rows=rows,
            screen_latents=latents,
            screen_mean=centre,
            barriers=barriers,
        )

    def arguments(self) -> dict[str, Any]:
        """The arguments `STREAM` of an op's schema."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def added_bytes(self, sae: SAEWeights) -> int:
        """Memory that this takes beside `sae`, in bytes."""
        ours = [v for v in self.arguments().values() if isinstance(v, Tensor)]
        theirs = {sae.encoder_rows.data_ptr(), sae.b_enc.data_ptr(), sae.threshold.data_ptr()}
        return sum(each.nbytes for each in ours if each.data_ptr() not in theirs)

    def to(self, device: torch.device | str) -> EncoderStream:
        """The same stream on another device."""
        return _moved(self, device)


def _led_by(hot: Tensor, d_sae: int) -> Tensor:
    """All latents [d_sae] int32, those of `hot` first and the rest by their index."""
    first = torch.zeros(d_sae, dtype=torch.bool, device=hot.device)
    inside = bool(((hot >= 0) & (hot < d_sae)).all())
    if inside:
        first[hot.long()] = True
    if not inside or int(first.sum()) != len(hot):
        raise refuse("hot", hot.tolist(), f"distinct latents below d_sae = {d_sae}")
    return torch.cat([hot.to(torch.int32), (~first).nonzero().flatten().to(torch.int32)])


def quantise_rows(encoder_rows: Tensor, b_enc: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """An int8 copy Q of encoder rows, and per row what bounds the error of `z = scale (h . Q) + offset`.

    With the residual r = W - scale Q: offset = b + <mean, r> and a little more than both sums can lose,
    error >= ||r||, size >= ||W|| + scale ||Q||. Then `h . W + b <= z + ||h - mean|| error + g ||h|| size`, where g
    bounds the relative rounding error of a sum of d_in products. Computed in fp64, in blocks.
    """
    Q = torch.empty(encoder_rows.shape, dtype=torch.int8, device=encoder_rows.device)
    latents = torch.empty(4, len(encoder_rows), dtype=torch.float32, device=encoder_rows.device)
    up = 1 + 2.0**-20  # fp64 to fp32, upwards
    for rows in torch.arange(len(encoder_rows), device=encoder_rows.device).split(4096):
        W = encoder_rows[rows].double()
        # A scale below this would leave the normal numbers, where products are not as exact.
        scale = (W.abs().amax(dim=1) / 127).clamp(min=2.0**-100).float()
        q = (W / scale[:, None].double()).round().clamp(-127, 127)
        r = W - q * scale[:, None].double()
        b = b_enc[rows].double()
        offset = b + r @ mean.double()
        slack = 2.0**-18 * (b.abs() + offset.abs()) + 1e-30
        size = W.norm(dim=1) + scale.double() * q.norm(dim=1)
        Q[rows] = q.to(torch.int8)
        latents[:, rows] = torch.stack([scale.double(), offset + slack, r.norm(dim=1) * up, size * up]).float()
    return Q, latents


@dataclass(frozen=True, eq=False)
class MapWeights:
    """The non-empty columns of a conditional-difference map, and compact copies of their latents.

    Everything that can be steered lies in these C latents of the output SAE, so that their rows fit in a
    cache. Shapes: columns [C] int32, latents of the output SAE, strictly increasing (`gather` checks it);
    values [d_sae_in, C] fp32, `A[:, columns]`; encoder_rows, W_dec [C, d_in] and b_enc, threshold [C], rows
    `columns` of the output SAE.
    """

    columns: Tensor
    values: Tensor
    encoder_rows: Tensor
    b_enc: Tensor
    threshold: Tensor
    W_dec: Tensor

    def __post_init__(self) -> None:
        n_columns = self.columns.numel()
        check_shape("columns", self.columns, ("C",))
        check_dtype("columns", self.columns, (torch.int32,))
        check_shape("values", self.values, ("d_sae_in", n_columns))
        check_dtype("values", self.values, (torch.float32,))
        check_shape("encoder_rows", self.encoder_rows, (n_columns, "d_in"))
        check_rows(self.encoder_rows, self.b_enc, self.threshold, self.W_dec)
        check_device("columns", self.columns, self.encoder_rows, "encoder_rows")
        check_device("values", self.values, self.encoder_rows, "encoder_rows")

    @classmethod
    def gather(cls, columns: Tensor, values: Tensor, sae: SAEWeights) -> MapWeights:
        """The map of `values [d_sae_in, C]` at latents `columns [C]` of the output SAE `sae`."""
        i = columns.to(sae.encoder_rows.device, torch.int64)
        if i.numel() and (bool((i.diff() <= 0).any()) or int(i[0]) < 0 or int(i[-1]) >= sae.d_sae):
            raise refuse("columns", i.tolist(), f"strictly increasing latents below d_sae = {sae.d_sae}")
        return cls(
            columns=i.to(torch.int32),
            values=values.to(sae.encoder_rows.device, torch.float32).contiguous(),
            encoder_rows=sae.encoder_rows[i],
            b_enc=sae.b_enc[i],
            threshold=sae.threshold[i],
            W_dec=sae.W_dec[i],
        )

    def latents(self) -> dict[str, Tensor]:
        """The arguments `COLUMNS` of an op's schema."""
        return {
            "columns": self.columns,
            "columns_encoder_rows": self.encoder_rows,
            "columns_b_enc": self.b_enc,
            "columns_threshold": self.threshold,
            "columns_W_dec": self.W_dec,
        }

    def to(self, device: torch.device | str) -> MapWeights:
        """The same map on another device."""
        return _moved(self, device)


@dataclass(frozen=True, eq=False)
class SteeringPlan:
    """What each prompt steers. slots [B, S] int32: places in `MapWeights.columns`, -1 where there is none;
    signs [B, S] int8: +1 augment, -1 ablate, 0 where there is none."""

    slots: Tensor
    signs: Tensor

    def __post_init__(self) -> None:
        check_shape("slots", self.slots, ("B", "S"))
        check_dtype("slots", self.slots, (torch.int32,))
        check_shape("signs", self.signs, self.slots.shape)
        check_dtype("signs", self.signs, (torch.int8,))
        check_device("signs", self.signs, self.slots, "slots")

    def latents(self, columns: Tensor) -> Tensor:
        """Latents of the output SAE, [B, S] int32, -1 where there is none; `columns [C]` are the map's."""
        if not columns.numel():
            return self.slots
        return torch.where(self.slots < 0, -1, columns[self.slots.clamp(min=0).long()])

    def to(self, device: torch.device | str) -> SteeringPlan:
        """The same plan on another device."""
        return _moved(self, device)


@dataclass(frozen=True, eq=False)
class Edits:
    """What `steer` did, by row and plan slot, in the precision it computed in (at least fp32).

    before, after [N, S]: value of the selected latent, 0 where it is inactive, absent or not looked at.
    maximum [N]: `M_t`, the largest latent of the row, 0 on rows without an active selected latent, NaN on a
    steered row whose residual is not finite (it was left as it came).
    """

    before: Tensor
    after: Tensor
    maximum: Tensor


@dataclass(frozen=True, eq=False)
class SparseLatents:
    """Active latents of N rows. indices [N, K] int32, increasing along a row, then -1; values [N, K], 0 where
    the index is -1; counts [N] int32, how many latents are active. A row with `counts > K` did not fit: all
    its values are NaN, so that it cannot be taken for the whole; so are those of a row that was not finite."""

    indices: Tensor
    values: Tensor
    counts: Tensor


def check_rows(encoder_rows: Tensor, b_enc: Tensor, threshold: Tensor, W_dec: Tensor) -> None:
    """Raise unless the four tensors are contiguous rows of the same latents, on one device."""
    n, d_in = encoder_rows.shape
    check_dtype("encoder_rows", encoder_rows, FLOATS)
    check_shape("b_enc", b_enc, (n,))
    check_shape("threshold", threshold, (n,))
    check_shape("W_dec", W_dec, (n, d_in))
    check_dtype("W_dec", W_dec, (encoder_rows.dtype,))
    for name, tensor in (("b_enc", b_enc), ("threshold", threshold)):
        check_dtype(name, tensor, FULL if encoder_rows.dtype == torch.float64 else FULL[:1])
    for name, tensor in (("b_enc", b_enc), ("threshold", threshold), ("W_dec", W_dec)):
        check_device(name, tensor, encoder_rows, "encoder_rows")
    for name, tensor in (("encoder_rows", encoder_rows), ("W_dec", W_dec)):
        if not tensor.is_contiguous():
            raise refuse(name, "not contiguous", "one contiguous row a latent", f"Pass {name}.contiguous().")


def check_k(argument: str, k: int, width: int) -> None:
    """Raise unless `k` picks at least one and at most `width` of something."""
    check_at_least(argument, k, 1)
    if k > width:
        raise refuse(argument, k, f"1 to the width, {width}")
