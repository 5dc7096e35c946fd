"""`steer`: edit the residual where the latents of its plan are active."""

from typing import Any, Literal, overload

from torch import Tensor

from dspa_kernels.backends import define_op
from dspa_kernels.checks import check_device
from dspa_kernels.ops.steer.contract import GATE, check_residual, choose_steer, empty_results, fastest, stream_of
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
    alpha: float = ...,
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
    alpha: float = ...,
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
    alpha: float = 0.2,
    record: bool = False,
    stream: EncoderStream | None = None,
    positions: Tensor | None = None,
    start: Tensor | None = None,
    paths: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Edits]:
    """Apply prompt-conditional, token-conditional edits (DSPA, online steps 4 and 5).

    On each row, a selected latent that is active moves by `alpha M`, M being the row's largest latent: up if
    it augments, down to 0 at most if it ablates. The residual follows through `W_dec` alone, so a row
    without an edit comes back bit for bit.

    Args:
        h: residual rows [N, d_in], any floating dtype; N may be 0.
        sae: the output SAE.
        cdmap: the map whose columns the plan points into, gathered from the same SAE.
        plan: what each of B prompts steers.
        rows: [N] int32, the plan row of each residual row; a negative row is not steered. None: N = B, each
            its own. Kernels check neither these nor the plan's slots: what is out of range reads other memory.
        alpha: strength, a finite number >= 0 (published: 0.2).
        record: also return the `Edits`. They tell M, so that every row with an active selected latent needs it.
        stream: how the encoder is read where M is needed, made from `sae`; by default `sae.stream`.
        positions, start: [N] and [B] int64, or neither: a row before `start` of its plan row is not steered.
        paths: [6] int64, to which is added how many rows were unsteered, not finite, inactive (no selected
            latent was), settled (all ended at 0 by a bound on M) and streamed, and how many rows of the
            encoder were read for it in full. The last depends on timing where rows settle early.
        backend: "auto", "reference", "triton" or "cuda".

    Returns:
        h' [N, d_in] in h's dtype, contiguous; with `record` also `Edits`. Computed in fp32 (fp64 if an
        operand is). Not differentiable: backward through it raises.

    Raises:
        InputError: a shape, dtype, device or value that does not fit. BackendError: see `choose`.
    """
    gate = {"rows": rows, "positions": positions, "start": start, "paths": paths}
    check_residual(h, sae, cdmap, alpha, len(plan.slots), **gate)
    check_device("plan", plan.slots, h, "h")
    out, *edits = _steer(
        h=h,
        **stream_of(sae, stream).arguments(),
        **cdmap.latents(),
        slots=plan.slots,
        signs=plan.signs,
        **gate,
        alpha=alpha,
        record=record,
        backend=choose_steer("steer", h, sae, backend),
    )
    return (out, Edits(*edits)) if record else out


def _fake(
    h: Tensor, encoder_rows: Tensor, slots: Tensor, record: bool, **_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty_results(h, encoder_rows, slots.shape[1], record)


_steer = define_op(
    "steer",
    f"(Tensor h, {STREAM}, {COLUMNS}, Tensor slots, Tensor signs, {GATE}, float alpha, bool record)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
    mutates=("paths",),
    fastest=fastest,
)
