"""`steer` in Triton: one cooperative launch of select, stream and tail, with a grid barrier between them.

- *lookup* (only `lookup_and_steer`): one program per prompt chooses its slots.
- *select*: the values of each row's selected latents, and of the large latents that bound its maximum.
- *stream*: the running maxima over the encoder, tile by tile, until every row is settled.
- *tail*: `h + scale sum_j (f'_j - f_j) W_dec[j]`.

Phases hand results on in scratch that is written before it is read, so nothing is cleared.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from dspa_kernels.barriers import barrier_word
from dspa_kernels.launch import launch_parameters, precision, steer_variant
from dspa_kernels.ops.shared.triton_grid import launch_cooperative, n_programs
from dspa_kernels.ops.shared.triton_tiles import INTERPRETED
from dspa_kernels.ops.steer.contract import empty_results
from dspa_kernels.ops.steer.triton_kernel import ALL, LOOKUP, SELECT, STREAM, TAIL, steer_kernel

# Latents that a program of the select phase evaluates together, and columns that it reads at a time.
BLOCK_S, BLOCK_C = 8, 512
# Slots that are processed together, and columns that a program of the tail writes.
BLOCK_SLOTS, BLOCK_D = 16, 256
NO_LOOKUP = dict.fromkeys(("p_counts", "p_values", "p_latents", "p_key")) | dict.fromkeys(
    ("d_sae_in", "k_prompt", "k_diff"), 0
)


def steer(
    h: Tensor,
    encoder_rows: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    k: int,
    normalize: str,
    order: Tensor | None,
    n_large: int,
    screen_rows: Tensor | None,
    screen_latents: Tensor | None,
    screen_mean: Tensor | None,
    columns: Tensor,
    columns_encoder_rows: Tensor,
    columns_b_enc: Tensor,
    columns_threshold: Tensor,
    columns_W_dec: Tensor,
    slots: Tensor,
    signs: Tensor,
    rows: Tensor | None,
    positions: Tensor | None,
    start: Tensor | None,
    paths: Tensor | None,
    alpha: float,
    record: bool,
    lookup: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return h', before, after and maximum. With `lookup`, the launch first fills slots and signs."""
    (n_rows, d_in), d_sae = h.shape, len(encoder_rows)
    n_prompts, n_slots = slots.shape
    out, before, after, maximum = empty_results(h, encoder_rows, n_slots, record)
    if not n_rows and lookup is None:
        return out, before, after, maximum

    def scratch(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=h.device)

    normalised = normalize != "none"
    multiply = precision(h, encoder_rows, normalize)
    launch = launch_parameters(steer_variant(k, screen_rows), n_rows, d_in, d_sae, multiply, h.device)
    arguments: dict[str, Any] = {
        "p_h": h.contiguous(),
        "p_encoder_rows": encoder_rows,
        "p_b_enc": b_enc,
        "p_threshold": threshold,
        "p_order": order if k else None,
        "p_screen_rows": screen_rows,
        "p_screen_latents": screen_latents,
        "p_screen_mean": screen_mean,
        "p_columns": columns,
        "p_columns_encoder_rows": columns_encoder_rows,
        "p_columns_b_enc": columns_b_enc,
        "p_columns_threshold": columns_threshold,
        "p_columns_W_dec": columns_W_dec,
        "p_slots": slots.contiguous(),
        "p_signs": signs.contiguous(),
        "p_rows": None if rows is None else rows.contiguous(),
        "p_positions": None if positions is None else positions.contiguous(),
        "p_start": None if start is None else start.contiguous(),
        "p_paths": paths,
        "p_out": out,
        "p_before": before if record else None,
        "p_after": after if record else None,
        "p_maximum": maximum if record else None,
        "p_normalised": scratch(n_rows, d_in, dtype=torch.float32) if normalised else None,
        "p_scale": scratch(n_rows, dtype=torch.float32) if normalised else None,
        "p_norms": None if screen_rows is None else scratch(n_rows, 2, dtype=torch.float32),
        "p_latent_values": scratch(n_rows, n_slots + n_large, dtype=torch.float32),
        "p_finite": scratch(n_rows),
        "p_running_max": scratch(triton.cdiv(n_rows, launch.BLOCK_N) * launch.BLOCK_N),
        "p_rank": scratch(n_rows, n_slots) if k else None,
        "p_barrier": barrier_word(h.device),
        "alpha": alpha,
        "k": k,
        "d_in": d_in,
        "d_sae": d_sae,
        "n_rows": n_rows,
        "n_prompts": n_prompts,
        "n_columns": len(columns),
        "n_slots": n_slots,
        "n_large": n_large,
        "MANY_ROWS": n_rows > launch.BLOCK_N,
        "RECORD": record,
        "NORMALIZE": normalize,
        "PRECISION": multiply,
        "BLOCK_S": BLOCK_S,
        "BLOCK_C": BLOCK_C,
        "BLOCK_D": BLOCK_D,
        "BLOCK_SLOTS": BLOCK_SLOTS,
        **(lookup or NO_LOOKUP),
    }
    programs = n_programs(h.device, launch.programs)
    for phase in (LOOKUP, SELECT, STREAM, TAIL) if INTERPRETED else (ALL,):
        launch_cooperative(steer_kernel, programs, **arguments, PHASE=phase, **launch.kernel_options())
    return out, before, after, maximum
