"""`map_lookup`: the output latents that each prompt steers, from its active latents."""

import torch
from torch import Tensor

from dspa_kernels.backends import choose, define_op
from dspa_kernels.checks import check_device, check_dtype, check_shape, refuse
from dspa_kernels.weights import SteeringPlan, check_k

MODES = ("ablate", "augment", "both")
# The width of the widest SAEs. A plan has as many slots, used or not.
MAX_K_DIFF = 1 << 20


def map_lookup(
    counts: Tensor,
    values: Tensor,
    *,
    k_prompt: int = 32,
    k_diff: int = 16,
    mode: str = "ablate",
    backend: str = "auto",
) -> SteeringPlan:
    """Choose the latents that each prompt steers (DSPA, online steps 1 to 3).

    Scores are the sum of the map's rows for the `k_prompt` most frequent prompt latents. Among equal counts the smaller
    index comes first, and a count of 0 never enters. The `k_diff` largest scores augment, if positive, and the
    `k_diff` smallest ablate, if negative.

    Args:
        counts: [B, d_sae_in] int32, the `activation_counts` of the prompts.
        values: [d_sae_in, C] fp32, the map at its columns.
        k_prompt: number of prompt latents (published: 32).
        k_diff: number of latents to augment, and to ablate (published: 16), up to 2**20.
        mode: "ablate", "augment" or "both".
        backend: "auto", "reference", "triton" or "cuda".

    Returns:
        A plan of B rows and `k_diff` slots, or `2 k_diff` for "both", augmenting ones first. Not differentiable.

    Raises:
        InputError: an invalid shape, dtype, device or value.
        BackendError: the named backend cannot run.
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
    check_k("k_diff", k_diff, MAX_K_DIFF)
    if mode not in MODES:
        raise refuse("mode", repr(mode), ", ".join(MODES))


def n_slots(k_diff: int, mode: str) -> int:
    """Return the number of slots in a row of a plan."""
    return 2 * k_diff if mode == "both" else k_diff


def _fake(counts: Tensor, k_diff: int, mode: str, **_: object) -> tuple[Tensor, Tensor]:
    shape = (counts.shape[0], n_slots(k_diff, mode))
    return counts.new_empty(shape), counts.new_empty(shape, dtype=torch.int8)


_map_lookup = define_op(
    "map_lookup",
    "(Tensor counts, Tensor values, int k_prompt, int k_diff, str mode) -> (Tensor, Tensor)",
    _fake,
)
