"""The specification of `lookup_and_steer`: the reference of `map_lookup`, then that of `steer`."""

from typing import Any

from torch import Tensor

from dspa_kernels.ops.map_lookup.reference import plan_of
from dspa_kernels.ops.steer.reference import steer


def lookup_and_steer(
    counts: Tensor, values: Tensor, k_prompt: int, k_diff: int, lookup_mode: str, **residual: Any
) -> tuple[Tensor, ...]:
    """Return steer(h, slots, signs, ...), slots and signs, with (slots, signs) = map_lookup(counts, ...)."""
    slots, signs = plan_of(counts, values, k_prompt, k_diff, lookup_mode)
    return (*steer(slots=slots, signs=signs, **residual), slots, signs)
