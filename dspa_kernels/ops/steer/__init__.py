"""`steer`: edit the residual where the latents of its plan are active."""

from typing import Literal, overload

import torch
from torch import Tensor

from dspa_kernels.backends import choose, define_op
from dspa_kernels.checks import check_at_least, check_device, check_dtype, check_shape
from dspa_kernels.ops.common import compute_dtype
from dspa_kernels.weights import (
    COLUMNS,
    ENCODER,
    FLOATS,
    Edits,
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
    rows: Tensor,
    *,
    alpha: float = ...,
    record: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...


@overload
def steer(
    h: Tensor,
    sae: SAEWeights,
    cdmap: MapWeights,
    plan: SteeringPlan,
    rows: Tensor,
    *,
    alpha: float = ...,
    record: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, Edits]: ...


def steer(
    h: Tensor,
    sae: SAEWeights,
    cdmap: MapWeights,
    plan: SteeringPlan,
    rows: Tensor,
    *,
    alpha: float = 0.2,
    record: bool = False,
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
        rows: [N] int32, the plan row of each residual row; a negative row is not steered.
        alpha: strength, a finite number >= 0 (published: 0.2).
        record: also return the `Edits`.
        backend: "auto", "reference", "triton" or "cuda".

    Returns:
        h' [N, d_in] in h's dtype, contiguous; with `record` also `Edits`. Computed in fp32 (fp64 if an
        operand is). Not differentiable: backward through it raises.

    Raises:
        InputError: a shape, dtype, device or value that does not fit. BackendError: see `choose`.
    """
    check_residual(h, sae, cdmap, rows, alpha)
    check_device("plan", plan.slots, h, "h")
    out, *edits = _steer(
        h=h,
        **sae.encoder(),
        **cdmap.latents(),
        slots=plan.slots,
        signs=plan.signs,
        rows=rows,
        alpha=alpha,
        backend=choose("steer", h.device, backend),
    )
    return (out, Edits(*edits)) if record else out


def check_residual(h: Tensor, sae: SAEWeights, cdmap: MapWeights, rows: Tensor, alpha: float) -> None:
    """Raise `InputError` unless residual rows, SAE, map and strength fit each other."""
    check_shape("h", h, ("N", sae.d_in), "Flatten batch and sequence into one dimension.")
    check_dtype("h", h, FLOATS)
    check_device("sae", sae.W_enc, h, "h")
    check_device("cdmap", cdmap.W_enc, h, "h")
    check_shape("cdmap.W_enc", cdmap.W_enc, ("C", sae.d_in), "Gather the map from the SAE that steers.")
    check_dtype("cdmap.W_enc", cdmap.W_enc, (sae.W_enc.dtype,))
    check_shape("rows", rows, (h.shape[0],))
    check_dtype("rows", rows, (torch.int32,))
    check_device("rows", rows, h, "h")
    check_at_least("alpha", alpha, 0)


def fake_steered(h: Tensor, W_enc: Tensor, n_slots: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes and dtypes of h', before, after, maximum."""
    dtype = compute_dtype(h, W_enc)
    slots = h.new_empty(h.shape[0], n_slots, dtype=dtype)
    out = torch.empty_like(h, memory_format=torch.contiguous_format)
    return out, slots, torch.empty_like(slots), h.new_empty(h.shape[0], dtype=dtype)


def _fake(h: Tensor, W_enc: Tensor, slots: Tensor, **_: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return fake_steered(h, W_enc, slots.shape[1])


_steer = define_op(
    "steer",
    f"(Tensor h, {ENCODER}, {COLUMNS}, Tensor slots, Tensor signs, Tensor rows, float alpha)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
)
