"""`map_lookup`: from a prompt's active latents to the output latents that it steers."""

import torch
from torch import Tensor

from dspa_kernels.backends import choose, define_op
from dspa_kernels.checks import check_device, check_dtype, check_shape, refuse
from dspa_kernels.weights import SteeringPlan, check_k

MODES = ("ablate", "augment", "both")


def map_lookup(
    counts: Tensor,
    values: Tensor,
    *,
    k_prompt: int = 32,
    k_diff: int = 16,
    mode: str = "ablate",
    backend: str = "auto",
) -> SteeringPlan:
    """Choose what each prompt steers (DSPA, online steps 1 to 3).

    The `k_prompt` most frequent prompt latents (ties to the smaller index; a count of 0 never enters) sum
    their rows of the map; the `k_diff` largest scores, if positive, augment and the `k_diff` smallest, if
    negative, ablate.

    Args:
        counts: [B, d_sae_in] int32, as `activation_counts` gives them for the prompts.
        values: [d_sae_in, C] fp32, the map at its columns.
        k_prompt, k_diff: as published 32 and 16.
        mode: "ablate", "augment" or "both".

    Returns:
        A plan of B rows and `k_diff` slots, twice as many for "both" (augment first). Not differentiable.
    """
    check_lookup(counts, values, k_prompt, k_diff, mode)
    slots, signs = _map_lookup(
        counts=counts,
        values=values,
        k_prompt=k_prompt,
        k_diff=k_diff,
        mode=mode,
        backend=choose("map_lookup", counts.device, backend),
    )
    return SteeringPlan(slots=slots, signs=signs)


def check_lookup(counts: Tensor, values: Tensor, k_prompt: int, k_diff: int, mode: str) -> None:
    """Raise `InputError` unless the arguments of a lookup fit each other."""
    check_shape("values", values, ("d_sae_in", "C"))
    check_dtype("values", values, (torch.float32,))
    check_shape("counts", counts, ("B", values.shape[0]))
    check_dtype("counts", counts, (torch.int32,))
    check_device("counts", counts, values, "values")
    check_k("k_prompt", k_prompt, values.shape[0])
    check_k("k_diff", k_diff, torch.iinfo(torch.int32).max)
    if mode not in MODES:
        raise refuse("mode", repr(mode), ", ".join(MODES))


def n_slots(k_diff: int, mode: str) -> int:
    """Slots in a row of a plan."""
    return 2 * k_diff if mode == "both" else k_diff


def _fake(counts: Tensor, k_diff: int, mode: str, **_: object) -> tuple[Tensor, Tensor]:
    shape = (counts.shape[0], n_slots(k_diff, mode))
    return counts.new_empty(shape), counts.new_empty(shape, dtype=torch.int8)


_map_lookup = define_op(
    "map_lookup",
    "(Tensor counts, Tensor values, int k_prompt, int k_diff, str mode) -> (Tensor, Tensor)",
    _fake,
)
