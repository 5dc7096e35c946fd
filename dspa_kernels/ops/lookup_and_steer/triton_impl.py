"""`lookup_and_steer` in Triton: the launch of `steer`, whose first phase chooses the slots."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dspa_kernels.ops.map_lookup.triton_impl import SIDES, lookup_constants
from dspa_kernels.ops.steer.triton_impl import Lookup, steer


def lookup_and_steer(
    counts: Tensor, values: Tensor, k_prompt: int, k_diff: int, lookup_mode: str, **residual: Any
) -> tuple[Tensor, ...]:
    """Return h', before, after, maximum, slots and signs."""
    n_prompts, n_slots = len(counts), k_diff * sum(SIDES[lookup_mode])
    slots = counts.new_empty(n_prompts, n_slots, dtype=torch.int32)
    signs = counts.new_empty(n_prompts, n_slots, dtype=torch.int8)
    lookup = {
        "lookup": Lookup(
            counts=counts.contiguous(),
            cdmap=values.contiguous(),
            latents=counts.new_empty(n_prompts, k_prompt),
            key=counts.new_empty(n_prompts, values.shape[1]),
        ),
        "d_sae_in": counts.shape[1],
        "k_prompt": k_prompt,
        "k_diff": k_diff,
        **lookup_constants(k_prompt, k_diff, lookup_mode),
    }
    return (*steer(slots=slots, signs=signs, lookup=lookup, **residual), slots, signs)
