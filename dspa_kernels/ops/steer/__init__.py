"""`steer` and `steer_`: edit residual rows on which latents of their plan are active, and do so in place."""

from typing import Any, Literal, cast, overload

from torch import Tensor

from dspa_kernels.backends import define_op
from dspa_kernels.checks import check_device, check_dtype, check_shape
from dspa_kernels.ops.steer.contract import (
    GATE,
    PLAN,
    STRENGTH,
    check_residual,
    check_written,
    choose_steer,
    empty_results,
    fastest,
    stream_of,
    strength_of,
)
from dspa_kernels.weights import (
    COLUMNS,
    STREAM,
    Edits,
    EncoderStream,
    MapWeights,
    SAEWeights,
    SteeringPlan,
)


@overload
def steer(
    h: Tensor,
    sae: SAEWeights,
    cdmap: MapWeights,
    plan: SteeringPlan,
    rows: Tensor | None = ...,
    *,
    alpha: float | Tensor = ...,
    record: Literal[False] = ...,
    stream: EncoderStream | None = ...,
    positions: Tensor | None = ...,
    start: Tensor | None = ...,
    paths: Tensor | None = ...,
    backend: str = ...,
) -> Tensor: ...


@overload
def steer(
    h: Tensor,
    sae: SAEWeights,
    cdmap: MapWeights,
    plan: SteeringPlan,
    rows: Tensor | None = ...,
    *,
    alpha: float | Tensor = ...,
    record: Literal[True],
    stream: EncoderStream | None = ...,
    positions: Tensor | None = ...,
    start: Tensor | None = ...,
    paths: Tensor | None = ...,
    backend: str = ...,
) -> tuple[Tensor, Edits]: ...


def steer(
    h: Tensor,
    sae: SAEWeights,
    cdmap: MapWeights,
    plan: SteeringPlan,
    rows: Tensor | None = None,
    *,
    alpha: float | Tensor = 0.2,
    record: bool = False,
    stream: EncoderStream | None = None,
    positions: Tensor | None = None,
    start: Tensor | None = None,
    paths: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Edits]:
    """Apply prompt-conditional, token-conditional edits (DSPA, online steps 4 and 5).

    On each row, each selected latent that is active moves by `alpha M`, where M is the largest latent of the row: up if
    it augments, and down to 0 at most if it ablates. The residual changes through `W_dec` alone, so that a row without
    an edit is returned bit for bit.

    A plan with `strengths` s needs no M, and does not read `alpha`. By its sign, a latent that is active becomes
    `max(f - s, 0)` (ABLATE), `max(f + s, 0)` (AUGMENT) or `s` (CLAMP), and in every row, active or not, `f + s`
    (AUGMENT_ALWAYS) or `s` (CLAMP_ALWAYS). Only the ranks of a top-k SAE then need the whole encoder.

    Args:
        h: residual rows [N, d_in], any floating dtype; N may be 0.
        sae: the output SAE.
        cdmap: the map to whose columns the plan refers, gathered from the same SAE.
        plan: the latents that each of B prompts steers.
        rows: [N] int32, the plan row of each residual row. A negative one is not steered. By default N = B and row n
            has plan row n. Kernels check neither these nor the plan's slots, and read other memory if one is out of
            range.
        alpha: strength, a finite number >= 0 (published: 0.2); or [B] fp32, the strength of each plan row. Those are on
            the device, where only their shape is checked: a negative or infinite one steers by what the formula gives.
        record: also return the `Edits`. They contain M, so that it is needed for every row with an active selected
            latent.
        stream: the encoder as it is read where M is needed, made from `sae`; by default `sae.stream`.
        positions: [N] int64, position of each row, or None.
        start: [B] int64, or None. A row whose position is below that of its plan row is not steered.
        paths: [6] int64, contiguous, counters that are added to: the rows that were unsteered, not finite, inactive
            (without an active selected latent), settled (all selected latents went to 0, by a bound on M, or the plan
            has strengths) and streamed, and the encoder rows that were read in full for them. The last depends on
            timing where rows settle early.
            A row is not finite if it holds a NaN or a number of 2**56 or more, which no norm can square in fp32. A row
            that becomes so by its edit counts as not finite too, once or more, beside how it was edited.
        backend: "auto", "reference", "triton" or "cuda". "cuda" takes up to 8 rows, in bf16 or fp16 like the weights,
            of an SAE that does not normalise, and no strengths.

    Returns:
        h' [N, d_in] in the dtype of h, contiguous, and with `record` also the `Edits`. Computed in fp32, or in fp64 if
        an operand is fp64. Not differentiable: backward through it raises.

    Raises:
        InputError: an invalid shape, dtype, device or value.
        BackendError: the named backend cannot run.
    """
    gate = {"rows": rows, "positions": positions, "start": start, "paths": paths}
    check_residual(h, sae, cdmap, alpha, len(plan.slots), **gate)
    check_device("plan", plan.slots, h, "h")
    out, before, after, maximum = _steer(
        h=h,
        **stream_of(sae, stream).arguments(),
        **cdmap.latents(),
        slots=plan.slots,
        signs=plan.signs,
        strengths=plan.strengths,
        **gate,
        **strength_of(alpha),
        record=record,
        backend=choose_steer(h, sae, plan, backend),
    )
    if not record:
        return cast(Tensor, out)
    return out, Edits(before, after, maximum if plan.strengths is None else None)


def steer_(
    h: Tensor,
    sae: SAEWeights,
    cdmap: MapWeights,
    plan: SteeringPlan,
    rows: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    alpha: float | Tensor = 0.2,
    stream: EncoderStream | None = None,
    positions: Tensor | None = None,
    start: Tensor | None = None,
    paths: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Edit a residual stream in place, in one tensor or in the two parts in which vLLM's layers carry it.

    With a `residual`, `h + residual` is steered, rounded to their dtype as in PyTorch. A row with an edit becomes h',
    and its residual 0. Any other row keeps both parts bit for bit, and Triton and CUDA do not write it at all. They
    read nothing on the host, so that a captured graph can serve steps with and without rows to steer.

    Args:
        h: residual rows [N, d_in], any floating dtype, contiguous; N may be 0.
        sae: as for `steer`.
        cdmap: as for `steer`.
        plan: as for `steer`.
        rows: as for `steer`.
        residual: [N, d_in] in the dtype of h, contiguous, memory of its own, or None.
        alpha: as for `steer`.
        stream: as for `steer`.
        positions: as for `steer`.
        start: as for `steer`.
        paths: as for `steer`.
        backend: as for `steer`.

    Raises:
        InputError: an invalid shape, dtype, device, layout or value.
        BackendError: the named backend cannot run.
    """
    gate = {"rows": rows, "positions": positions, "start": start, "paths": paths}
    check_residual(h, sae, cdmap, alpha, len(plan.slots), **gate)
    check_device("plan", plan.slots, h, "h")
    check_written("h", h)
    if residual is not None:
        check_shape("residual", residual, h.shape)
        check_dtype("residual", residual, (h.dtype,))
        check_device("residual", residual, h, "h")
        check_written("residual", residual)
    _steer_(
        h=h,
        residual=residual,
        **stream_of(sae, stream).arguments(),
        **cdmap.latents(),
        slots=plan.slots,
        signs=plan.signs,
        strengths=plan.strengths,
        **gate,
        **strength_of(alpha),
        backend=choose_steer(h, sae, plan, backend),
    )


def _fake(
    h: Tensor, encoder_rows: Tensor, slots: Tensor, record: bool, **_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty_results(h, encoder_rows, slots.shape[1], record)


def _fake_(**_: Any) -> None:
    return None


_steer = define_op(
    "steer",
    f"(Tensor h, {STREAM}, {COLUMNS}, {PLAN}, {GATE}, {STRENGTH}, bool record) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
    mutates=("paths",),
    fastest=fastest,
)

_steer_ = define_op(
    "steer_",
    f"(Tensor(b!) h, Tensor(c!)? residual, {STREAM}, {COLUMNS}, {PLAN}, {GATE}, {STRENGTH}) -> ()",
    _fake_,
    mutates=("h", "residual", "paths"),
    fastest=fastest,
)
