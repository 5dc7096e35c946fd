"""`lookup_and_steer` in CUDA C++: the launch of `steer`, whose first phase chooses the slots (`csrc/lookup.cuh`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dspa_kernels.ops.map_lookup import n_slots
from dspa_kernels.ops.steer.cuda_impl import steer


def lookup_and_steer(
    counts: Tensor, values: Tensor, k_prompt: int, k_diff: int, lookup_mode: str, **residual: Any
) -> tuple[Tensor, ...]:
    """Return h', before, after, maximum, slots and signs."""
    (n_prompts, d_sae_in), n_columns = counts.shape, values.shape[1]
    slots = counts.new_empty(n_prompts, n_slots(k_diff, lookup_mode))
    signs = torch.empty_like(slots, dtype=torch.int8)
    lookup = {
        "counts": counts.contiguous(),
        "values": values.contiguous(),
        "lookup_scratch": counts.new_empty(n_prompts, 2 * k_prompt + k_diff + n_columns),
        "d_sae_in": d_sae_in,
        "k_prompt": k_prompt,
        "k_diff": k_diff,
        "augment": lookup_mode != "ablate",
        "ablate": lookup_mode != "augment",
    }
    return (*steer(slots=slots, signs=signs, lookup=lookup, **residual), slots, signs)
