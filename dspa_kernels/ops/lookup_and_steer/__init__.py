"""`lookup_and_steer`: choose the latents of each prompt and steer with them, in one call."""

import torch
from torch import Tensor

from dspa_kernels.backends import choose, define_op
from dspa_kernels.formulas import compute_dtype
from dspa_kernels.ops.map_lookup import check_lookup, n_slots
from dspa_kernels.ops.steer.contract import GATE, STRENGTH, check_residual, empty_results, stream_of, strength_of
from dspa_kernels.weights import COLUMNS, STREAM, Edits, EncoderStream, MapWeights, SAEWeights, SteeringPlan


def lookup_and_steer(
    h: Tensor,
    counts: Tensor,
    sae: SAEWeights,
    cdmap: MapWeights,
    rows: Tensor | None = None,
    *,
    k_prompt: int = 32,
    k_diff: int = 16,
    mode: str = "ablate",
    alpha: float | Tensor = 0.2,
    record: bool = True,
    stream: EncoderStream | None = None,
    positions: Tensor | None = None,
    start: Tensor | None = None,
    paths: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, SteeringPlan, Edits]:
    """Choose the latents of each prompt and steer with them, at the step of the last prompt token (DSPA, 1 to 5).

    Args:
        h: residual rows [N, d_in], any floating dtype.
        counts: [B, d_sae_in] int32, activation counts of the prompts at the input SAE.
        sae: as for `steer`.
        cdmap: as for `steer`.
        rows: as for `steer`, indices of the B prompts.
        k_prompt: as for `map_lookup`.
        k_diff: as for `map_lookup`.
        mode: as for `map_lookup`.
        alpha: as for `steer`.
        record: as for `steer`.
        stream: as for `steer`.
        positions: as for `steer`.
        start: as for `steer`.
        paths: as for `steer`.
        backend: "auto", "reference" or "triton".

    Returns:
        h' [N, d_in], the plan for `steer` at later tokens, and the `Edits`, which have no rows unless recorded. Not
        differentiable.

    Raises:
        InputError: an invalid shape, dtype, device or value.
        BackendError: the named backend cannot run.
    """
    check_lookup(counts, cdmap.values, k_prompt, k_diff, mode)
    gate = {"rows": rows, "positions": positions, "start": start, "paths": paths}
    check_residual(h, sae, cdmap, alpha, len(counts), **gate)
    out, before, after, maximum, slots, signs = _lookup_and_steer(
        h=h,
        counts=counts,
        values=cdmap.values,
        **stream_of(sae, stream).arguments(),
        **cdmap.latents(),
        **gate,
        k_prompt=k_prompt,
        k_diff=k_diff,
        lookup_mode=mode,
        **strength_of(alpha),
        record=record,
        backend=choose("lookup_and_steer", h.device, backend, compute_dtype(h, sae.encoder_rows)),
    )
    return out, SteeringPlan(slots=slots, signs=signs), Edits(before, after, maximum)


def _fake(
    h: Tensor, counts: Tensor, encoder_rows: Tensor, k_diff: int, lookup_mode: str, record: bool, **_: object
) -> tuple[Tensor, ...]:
    slots = counts.new_empty(counts.shape[0], n_slots(k_diff, lookup_mode))
    signs = slots.new_empty(slots.shape, dtype=torch.int8)
    return (*empty_results(h, encoder_rows, slots.shape[1], record), slots, signs)


_lookup_and_steer = define_op(
    "lookup_and_steer",
    f"(Tensor h, Tensor counts, Tensor values, {STREAM}, {COLUMNS}, {GATE}, int k_prompt,"
    f" int k_diff, str lookup_mode, {STRENGTH}, bool record) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
    mutates=("paths",),
)
