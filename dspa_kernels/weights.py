"""The tensors that ops take and return, in plain dataclasses that are checked once when they are made."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from dspa_kernels.checks import check_contiguous, check_device, check_dtype, check_shape, check_whole, refuse
from dspa_kernels.formulas import (
    ABLATE,
    AUGMENT,
    AUGMENT_ALWAYS,
    CLAMP,
    CLAMP_ALWAYS,
    Normalised,
    compute_dtype,
    latents,
    normalise,
)
from dspa_kernels.screen import quantise_rows

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FULL = (torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)
SCREENS = ("none", "int5")
NORMALIZATIONS = ("none", "layer_norm", "constant_norm_rescale")

# Arguments of an op's schema for an encoder, and for the columns of a map.
ENCODER = "Tensor encoder_rows, Tensor b_enc, Tensor threshold, int k, str normalize"
COLUMNS = (
    "Tensor columns, Tensor columns_encoder_rows, Tensor columns_b_enc, Tensor columns_threshold, Tensor columns_W_dec"
)

# The same for the encoder that `steer` streams.
STREAM = (
    "Tensor encoder_rows, Tensor b_enc, Tensor threshold, int k, str normalize, Tensor? order, int n_large,"
    " Tensor? screen_rows, Tensor? screen_latents, Tensor? screen_mean"
)
# What can happen to a residual row, in the order of the first numbers of `paths`.
PATHS = ("unsteered", "not_finite", "inactive", "settled", "streamed")

T = TypeVar("T", "SAEWeights", "MapWeights", "SteeringPlan", "EncoderStream")


def _move_tensors(weights: T, device: torch.device | str) -> T:
    values = {field.name: getattr(weights, field.name) for field in fields(weights)}
    moved: Any = {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
    return replace(weights, **moved)


@dataclass(frozen=True, eq=False)
class SAEWeights:
    """An SAE or transcoder as the kernels read it, with one contiguous row per latent.

    `pre = n(h) encoder_rows^T + b_enc`, where n normalises a row. Latent j is active if `pre_j > 0` and, with `k = 0`,
    `pre_j > threshold_j` (a ReLU SAE has `threshold = 0`), or with `k > 0` if it is among the k largest of its row. The
    edit of a latent reaches the residual through `W_dec`, times the scale that n removed. A transcoder decodes to rows
    of another place, maybe of another width. The ops that steer refuse another width.

    Attributes:
        encoder_rows: [d_sae, d_in], any floating dtype.
        b_enc: [d_sae], fp32, or fp64 if encoder_rows is fp64.
        threshold: [d_sae], in the dtype of b_enc.
        W_dec: [d_sae, d_out], in the dtype of encoder_rows.
        k: active latents per row of a top-k SAE, 0 for others.
        normalize: "none", "layer_norm" or "constant_norm_rescale".

    Raises:
        InputError: another shape, dtype, device or layout.
    """

    encoder_rows: Tensor
    b_enc: Tensor
    threshold: Tensor
    W_dec: Tensor
    k: int = 0
    normalize: str = "none"

    def __post_init__(self) -> None:
        check_shape("encoder_rows", self.encoder_rows, ("d_sae", "d_in"))
        check_shape("W_dec", self.W_dec, ("d_sae", "d_out"))
        check_rows(self.encoder_rows, self.b_enc, self.threshold, self.W_dec, self.W_dec.shape[1])
        if not self.encoder_rows.numel():
            raise refuse("encoder_rows", f"of shape {list(self.encoder_rows.shape)}", "[d_sae, d_in], both >= 1")
        check_whole("k", self.k, 0, self.d_sae, ", d_sae, where 0 is no top-k")
        if self.normalize not in NORMALIZATIONS:
            raise refuse("normalize", repr(self.normalize), ", ".join(NORMALIZATIONS))

    @property
    def stream(self) -> EncoderStream:
        """The encoder as `steer` reads it by default: in its own order, without a screen. It allocates nothing."""
        return EncoderStream.of(self)

    @property
    def d_in(self) -> int:
        """Width of the rows that are encoded."""
        return self.encoder_rows.shape[1]

    @property
    def d_out(self) -> int:
        """Width of the rows that are decoded: `d_in`, but for a transcoder."""
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.encoder_rows.shape[0]

    @property
    def W_enc(self) -> Tensor:
        """Encoder [d_in, d_sae] as in SAELens, a transposed view of `encoder_rows`."""
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
        """Return the arguments `ENCODER` of an op's schema."""
        names = ("encoder_rows", "b_enc", "threshold", "k", "normalize")
        return {name: getattr(self, name) for name in names}

    def to(self, device: torch.device | str) -> SAEWeights:
        """Return the weights on `device`."""
        return _move_tensors(self, device)


class SAEShape:
    """The widths, device, dtype and encoder of an SAE, as its `weights` have them.

    Attributes:
        reshape_activations: "hook_z" for an SAE of attention heads, whose rows may be [n_heads, d_head], else "none".
    """

    reshape_activations: str
    _weights: SAEWeights

    @property
    def weights(self) -> SAEWeights:
        """The tensors that the kernels read."""
        return self._weights

    @property
    def W_enc(self) -> Tensor:
        """Encoder [d_in, d_sae], a transposed view of the rows that the kernels read."""
        return self.weights.W_enc

    @property
    def d_in(self) -> int:
        """Width of the rows that are encoded."""
        return self.weights.d_in

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.weights.d_sae

    @property
    def d_out(self) -> int:
        """Width of the rows that are decoded: `d_in`, but for a transcoder."""
        return self.weights.d_out

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.weights.encoder_rows.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of `W_enc`, `W_dec` and `b_dec`."""
        return self.weights.encoder_rows.dtype

    @property
    def _accepted_rows(self) -> str:
        """The shapes of rows that it encodes, for messages."""
        heads = f", or [..., n_heads, d_head] with n_heads x d_head = {self.d_in}"
        return f"shape [..., {self.d_in}]" + heads * (self.reshape_activations == "hook_z")


@dataclass(frozen=True, eq=False)
class EncoderStream:
    """The encoder as `steer` reads it for the maximum of a row. Make it with `EncoderStream.of`.

    Rows are sorted by how often their latents hold the maximum, so that reading can stop early. The first `n_large` of
    them are evaluated before the others and often settle a row alone. With a screen, steer reads an int5 copy, and of
    the rows themselves only those that could hold a maximum. Neither order nor screen changes a bit of the result. The
    large latents, which are evaluated apart, may change the rounding of M.

    Attributes:
        encoder_rows: [d_sae, d_in], any floating dtype.
        b_enc: [d_sae], fp32, or fp64 if encoder_rows is fp64.
        threshold: [d_sae], in the dtype of b_enc.
        k: as in `SAEWeights`.
        normalize: as in `SAEWeights`.
        order: [d_sae] int32, the latent of each row; None if row j is latent j.
        n_large: number of rows that are evaluated first.
        screen_rows: [d_sae, 160 ceil(d_in / 256)] uint8, as `dspa_kernels.screen.pack` describes, or None without a
            screen.
        screen_latents: [5, d_sae] fp32, scale, offset, slack, error and size of each row.
        screen_mean: [d_in] fp32.
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
        """Make the stream of `sae`.

        Args:
            sae: the SAE. Its rows are copied if `hot` is given.
            hot: [H] latents that come first, beginning with the one that holds the maximum of a row most often.
            n_large: number of them that are evaluated before the others.
            screen: "none" or "int5". The latter adds five bits per number of the encoder.
            mean: [d_in], roughly the mean of the normalised rows. The closer it is, the tighter is the screen.

        Raises:
            InputError: latents that are not distinct or do not exist, another screen, another shape.
        """
        if screen not in SCREENS:
            raise refuse("screen", repr(screen), ", ".join(SCREENS))
        check_whole("n_large", n_large, 0)
        encoder_rows, b_enc, threshold, order = sae.encoder_rows, sae.b_enc, sae.threshold, None
        if hot is not None:
            check_shape("hot", hot, ("H",))
            check_dtype("hot", hot, INTEGERS)
        n_large = min(n_large, 0 if hot is None else len(hot))
        if hot is not None and len(hot):
            order = _order_led_by(hot.to(encoder_rows.device), sae.d_sae)
            encoder_rows, b_enc, threshold = (tensor[order.long()] for tensor in (encoder_rows, b_enc, threshold))
        if mean is not None:
            check_shape("mean", mean, (sae.d_in,))
            check_dtype("mean", mean, FLOATS)
        rows = latents = centre = None
        if screen == "int5":
            centre = sae.encoder_rows.new_zeros(sae.d_in) if mean is None else mean
            centre = centre.to(sae.encoder_rows.device, torch.float32).contiguous()
            rows, latents = quantise_rows(encoder_rows, b_enc, centre)
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
        )

    def arguments(self) -> dict[str, Any]:
        """Return the arguments `STREAM` of an op's schema."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def added_bytes(self, sae: SAEWeights) -> int:
        """Return the memory of the tensors that are not shared with `sae`, in bytes."""
        tensors = [value for value in self.arguments().values() if isinstance(value, Tensor)]
        shared = {sae.encoder_rows.data_ptr(), sae.b_enc.data_ptr(), sae.threshold.data_ptr()}
        return sum(tensor.nbytes for tensor in tensors if tensor.data_ptr() not in shared)

    def to(self, device: torch.device | str) -> EncoderStream:
        """Return the stream on `device`."""
        return _move_tensors(self, device)


def _order_led_by(hot: Tensor, d_sae: int) -> Tensor:
    """Return all latents [d_sae] int32, those of `hot` first and the others by index."""
    first = torch.zeros(d_sae, dtype=torch.bool, device=hot.device)
    inside = bool(((hot >= 0) & (hot < d_sae)).all())
    if inside:
        first[hot.long()] = True
    if not inside or int(first.sum()) != len(hot):
        raise refuse("hot", hot.tolist(), f"distinct latents below d_sae = {d_sae}")
    return torch.cat([hot.to(torch.int32), (~first).nonzero().flatten().to(torch.int32)])


@dataclass(frozen=True, eq=False)
class MapWeights:
    """The non-empty columns of a conditional-difference map, with compact copies of their latents.

    Only these C latents of the output SAE can be steered. Their rows are copied, so that they fit in a cache.

    Attributes:
        columns: [C] int32, latents of the output SAE, strictly increasing, which `gather` checks.
        values: [d_sae_in, C] fp32, `A[:, columns]`.
        encoder_rows: [C, d_in], rows `columns` of the output SAE, like the next three.
        b_enc: [C].
        threshold: [C].
        W_dec: [C, d_in].
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
        check_contiguous("columns", self.columns, "Pass columns.contiguous().")
        check_shape("values", self.values, ("d_sae_in", n_columns))
        check_dtype("values", self.values, (torch.float32,))
        check_shape("encoder_rows", self.encoder_rows, (n_columns, "d_in"))
        check_rows(self.encoder_rows, self.b_enc, self.threshold, self.W_dec, self.encoder_rows.shape[1])
        check_device("columns", self.columns, self.encoder_rows, "encoder_rows")
        check_device("values", self.values, self.encoder_rows, "encoder_rows")

    @classmethod
    def gather(cls, columns: Tensor, values: Tensor, sae: SAEWeights) -> MapWeights:
        """Gather the rows of an SAE that a map needs.

        Args:
            columns: [C] latents of the output SAE, strictly increasing.
            values: [d_sae_in, C], the map at these columns.
            sae: the output SAE.

        Raises:
            InputError: columns that are not increasing or do not exist, or another shape.
        """
        check_shape("columns", columns, ("C",))
        check_dtype("columns", columns, INTEGERS)
        check_shape("values", values, ("d_sae_in", len(columns)))
        check_dtype("values", values, FLOATS)
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
        """Return the arguments `COLUMNS` of an op's schema."""
        return {
            "columns": self.columns,
            "columns_encoder_rows": self.encoder_rows,
            "columns_b_enc": self.b_enc,
            "columns_threshold": self.threshold,
            "columns_W_dec": self.W_dec,
        }

    def to(self, device: torch.device | str) -> MapWeights:
        """Return the map on `device`."""
        return _move_tensors(self, device)


@dataclass(frozen=True, eq=False)
class SteeringPlan:
    """The latents that each prompt steers.

    Attributes:
        slots: [B, S] int32, indices into `MapWeights.columns`, distinct in a row, -1 for an empty slot.
        signs: [B, S] int8, AUGMENT (1), ABLATE (-1), or 0 for an empty slot. With `strengths`, also CLAMP (2),
            AUGMENT_ALWAYS (3) and CLAMP_ALWAYS (4).
        strengths: [B, S] fp32, by how much each latent moves, or the value that it is set to, in its own units. None
            for a plan whose latents all move by `alpha M`.
    """

    ABLATE: ClassVar[int] = ABLATE
    AUGMENT: ClassVar[int] = AUGMENT
    CLAMP: ClassVar[int] = CLAMP
    AUGMENT_ALWAYS: ClassVar[int] = AUGMENT_ALWAYS
    CLAMP_ALWAYS: ClassVar[int] = CLAMP_ALWAYS

    slots: Tensor
    signs: Tensor
    strengths: Tensor | None = None

    def __post_init__(self) -> None:
        check_shape("slots", self.slots, ("B", "S"))
        check_dtype("slots", self.slots, (torch.int32,))
        check_shape("signs", self.signs, self.slots.shape)
        check_dtype("signs", self.signs, (torch.int8,))
        check_device("signs", self.signs, self.slots, "slots")
        if self.strengths is not None:
            check_shape("strengths", self.strengths, self.slots.shape)
            check_dtype("strengths", self.strengths, (torch.float32,))
            check_device("strengths", self.strengths, self.slots, "slots")

    def latents(self, columns: Tensor) -> Tensor:
        """Return latents of the output SAE [B, S] int32, -1 for an empty slot; `columns` [C] are those of the map."""
        if not columns.numel():
            return self.slots
        return torch.where(self.slots < 0, -1, columns[self.slots.clamp(min=0).long()])

    def to(self, device: torch.device | str) -> SteeringPlan:
        """Return the plan on `device`."""
        return _move_tensors(self, device)


@dataclass(frozen=True, eq=False)
class Edits:
    """The edits of `steer`, in the dtype in which it computes (at least fp32).

    Attributes:
        before: [N, S] values of the selected latents before the edit. 0 if the latent is inactive, the slot empty, or
            the row unsteered or not finite.
        after: [N, S] the same after the edit.
        maximum: [N] `M_t`, the largest latent of the row. 0 on rows without an active selected latent. NaN on steered
            rows whose residual is not finite, which are not changed. None for a plan with strengths, which need no M.
    """

    before: Tensor
    after: Tensor
    maximum: Tensor | None


@dataclass(frozen=True, eq=False)
class SparseLatents:
    """Active latents of N rows, in K places per row.

    Attributes:
        indices: [N, K] int32, increasing along a row, then -1.
        values: [N, K], 0 where the index is -1. All are NaN in a row with more than K active latents, so that a part
            cannot pass for the whole, and in a row that was not finite.
        counts: [N] int32, number of active latents.
    """

    indices: Tensor
    values: Tensor
    counts: Tensor


def check_rows(encoder_rows: Tensor, b_enc: Tensor, threshold: Tensor, W_dec: Tensor, d_out: int) -> None:
    """Raise `InputError` unless the four tensors are contiguous rows of the same latents, on one device."""
    n = len(encoder_rows)
    check_dtype("encoder_rows", encoder_rows, FLOATS)
    check_shape("b_enc", b_enc, (n,))
    check_shape("threshold", threshold, (n,))
    check_shape("W_dec", W_dec, (n, d_out))
    check_dtype("W_dec", W_dec, (encoder_rows.dtype,))
    for name, tensor in (("b_enc", b_enc), ("threshold", threshold)):
        check_dtype(name, tensor, FULL if encoder_rows.dtype == torch.float64 else FULL[:1])
    for name, tensor in (("b_enc", b_enc), ("threshold", threshold), ("W_dec", W_dec)):
        check_device(name, tensor, encoder_rows, "encoder_rows")
    rows = {"encoder_rows": encoder_rows, "b_enc": b_enc, "threshold": threshold, "W_dec": W_dec}
    for name, tensor in rows.items():
        check_contiguous(name, tensor, f"Pass {name}.contiguous().")


def check_k(argument: str, k: int, width: int) -> None:
    """Raise `InputError` unless `k` is from 1 to `width`."""
    check_whole(argument, k, 1, width, ", the width")
