"""The specification of `lookup_and_steer`: the two references, one after the other."""

from typing import Any

from torch import Tensor

from dspa_kernels.ops.map_lookup.reference import map_lookup
from dspa_kernels.ops.steer.reference import steer


def lookup_and_steer(
    counts: Tensor, values: Tensor, k_prompt: int, k_diff: int, lookup_mode: str, **residual: Any
) -> tuple[Tensor, ...]:
    """(slots, signs) = map_lookup(counts, ...); h' = steer(h, slots, signs, ...)."""
    slots, signs = map_lookup(counts, values, k_prompt, k_diff, lookup_mode)
    return (*steer(slots=slots, signs=signs, **residual), slots, signs)
