"""`lookup_and_steer`: choose each prompt's latents and steer with them, in one call."""

import torch
from torch import Tensor

from dspa_kernels.backends import choose, define_op
from dspa_kernels.ops.map_lookup import check_lookup, n_slots
from dspa_kernels.ops.steer import check_residual, fake_steered
from dspa_kernels.weights import COLUMNS, ENCODER, Edits, MapWeights, SAEWeights, SteeringPlan


def lookup_and_steer(
    h: Tensor,
    counts: Tensor,
    sae: SAEWeights,
    cdmap: MapWeights,
    rows: Tensor,
    *,
    k_prompt: int = 32,
    k_diff: int = 16,
    mode: str = "ablate",
    alpha: float = 0.2,
    backend: str = "auto",
) -> tuple[Tensor, SteeringPlan, Edits]:
    """`map_lookup` and `steer` in one: the step at which the last prompt token passes (DSPA, 1 to 5).

    Args:
        h: residual rows [N, d_in], any floating dtype.
        counts: [B, d_sae_in] int32, activation counts of the prompts at the input SAE.
        sae, cdmap, rows, alpha: as for `steer`; `rows` index the B prompts.
        k_prompt, k_diff, mode: as for `map_lookup`.

    Returns:
        h' [N, d_in], the plan for `steer` at later tokens, and the `Edits`. Not differentiable.

    Raises:
        InputError: a shape, dtype, device or value that does not fit. BackendError: see `choose`.
    """
    check_lookup(counts, cdmap.values, k_prompt, k_diff, mode)
    check_residual(h, sae, cdmap, rows, alpha)
    out, before, after, maximum, slots, signs = _lookup_and_steer(
        h=h,
        counts=counts,
        values=cdmap.values,
        **sae.encoder(),
        **cdmap.latents(),
        rows=rows,
        k_prompt=k_prompt,
        k_diff=k_diff,
        mode=mode,
        alpha=alpha,
        backend=choose("lookup_and_steer", h.device, backend),
    )
    return out, SteeringPlan(slots=slots, signs=signs), Edits(before, after, maximum)


def _fake(h: Tensor, counts: Tensor, W_enc: Tensor, k_diff: int, mode: str, **_: object) -> tuple[Tensor, ...]:
    slots = counts.new_empty(counts.shape[0], n_slots(k_diff, mode))
    signs = slots.new_empty(slots.shape, dtype=torch.int8)
    return (*fake_steered(h, W_enc, slots.shape[1]), slots, signs)


_lookup_and_steer = define_op(
    "lookup_and_steer",
    f"(Tensor h, Tensor counts, Tensor values, {ENCODER}, {COLUMNS}, Tensor rows, int k_prompt, int k_diff,"
    " str mode, float alpha) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
)
