"""`map_lookup` in Triton: one program per prompt, with the reference's order of summation and without a sort."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dspa_kernels.ops.shared.triton_ranks import selection_blocks, top_k

BLOCK = 1024
SIDES = {"augment": (True, False), "ablate": (False, True), "both": (True, True)}


@triton.jit
def lookup_prompt(
    p_counts,
    p_values,
    p_latents,
    p_key,
    p_slots,
    p_signs,
    d_sae,
    n_columns,
    k_prompt,
    k_diff,
    AUGMENT: tl.constexpr,
    ABLATE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_PROMPT: tl.constexpr,
    CHUNK_PROMPT: tl.constexpr,
    BLOCK_DIFF: tl.constexpr,
    CHUNK_DIFF: tl.constexpr,
):
    """score_c = sum of values[i, c] over the k_prompt largest counts i (> 0), largest first.

    slots = the k_diff columns of largest score > 0 (augment, sign 1), then those of smallest score < 0 (ablate, sign
    -1). Scratch per prompt: latents [k_prompt] and key [n_columns], int32. Positive floats order like their bits.
    """
    b_n_latents = top_k(p_counts, p_latents, d_sae, k_prompt, BLOCK, BLOCK_PROMPT, CHUNK_PROMPT)
    o_column = tl.arange(0, BLOCK)
    for i_side in tl.static_range(2):
        if AUGMENT if i_side == 0 else ABLATE:
            for i in range(0, n_columns, BLOCK):
                m_column = o_column < n_columns - i
                b_score = tl.zeros([BLOCK], dtype=tl.float32)
                for i_rank in range(b_n_latents):
                    i_latent = tl.load(p_latents + i_rank)
                    p_row = p_values + i_latent.to(tl.int64) * n_columns + i
                    b_score += tl.load(p_row + o_column, mask=m_column, other=0.0)
                b_score = b_score if i_side == 0 else -b_score
                b_key = tl.where(b_score > 0, b_score.to(tl.int32, bitcast=True), 0)
                tl.store(p_key + i + o_column, b_key, mask=m_column)
            tl.debug_barrier()
            i_first = k_diff if AUGMENT and i_side == 1 else 0
            top_k(p_key, p_slots + i_first, n_columns, k_diff, BLOCK, BLOCK_DIFF, CHUNK_DIFF)
            o_slot = tl.arange(0, BLOCK_DIFF)
            b_slot = tl.load(p_slots + i_first + o_slot, mask=o_slot < k_diff, other=-1)
            b_sign = tl.where(b_slot < 0, 0, 1 - 2 * i_side).to(tl.int8)
            tl.store(p_signs + i_first + o_slot, b_sign, mask=o_slot < k_diff)
            tl.debug_barrier()


@triton.jit(
    do_not_specialize=["d_sae", "n_columns", "k_prompt", "k_diff", "n_slots"],
    do_not_specialize_on_alignment=["p_rows", "p_slots", "p_signs"],
)
def lookup_kernel(
    p_counts,
    p_values,
    p_rows,
    p_latents,
    p_key,
    p_slots,
    p_signs,
    d_sae,
    n_columns,
    k_prompt,
    k_diff,
    n_slots,
    AUGMENT: tl.constexpr,
    ABLATE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_PROMPT: tl.constexpr,
    CHUNK_PROMPT: tl.constexpr,
    BLOCK_DIFF: tl.constexpr,
    CHUNK_DIFF: tl.constexpr,
):
    """Call `lookup_prompt` with one program per prompt, or per row of `rows` that is not -1."""
    i_program = tl.program_id(0).to(tl.int64)
    i_prompt = i_program
    if p_rows is not None:
        i_prompt = tl.load(p_rows + i_program).to(tl.int64)
    if i_prompt >= 0:
        lookup_prompt(
            p_counts + i_prompt * d_sae,
            p_values,
            p_latents + i_program * k_prompt,
            p_key + i_program * n_columns,
            p_slots + i_prompt * n_slots,
            p_signs + i_prompt * n_slots,
            d_sae,
            n_columns,
            k_prompt,
            k_diff,
            AUGMENT,
            ABLATE,
            BLOCK,
            BLOCK_PROMPT,
            CHUNK_PROMPT,
            BLOCK_DIFF,
            CHUNK_DIFF,
        )


def lookup_constants(k_prompt: int, k_diff: int, mode: str) -> dict[str, int | bool]:
    """Return the constants of `lookup_prompt`."""
    augment, ablate = SIDES[mode]
    blocks = selection_blocks("PROMPT", k_prompt) | selection_blocks("DIFF", k_diff)
    return {"AUGMENT": augment, "ABLATE": ablate, "BLOCK": BLOCK, **blocks}


def map_lookup(
    counts: Tensor,
    values: Tensor,
    rows: Tensor | None,
    k_prompt: int,
    k_diff: int,
    lookup_mode: str,
    slots: Tensor,
    signs: Tensor,
) -> None:
    """Write the plan of the prompts in `rows`, by default of all, to their rows of slots and signs [B, S]."""
    n_columns, n_prompts = values.shape[1], len(counts) if rows is None else len(rows)
    if n_prompts:
        lookup_kernel[(n_prompts,)](
            counts.contiguous(),
            values.contiguous(),
            None if rows is None else rows.contiguous(),
            counts.new_empty(n_prompts, k_prompt),
            counts.new_empty(n_prompts, n_columns),
            slots,
            signs,
            counts.shape[1],
            n_columns,
            k_prompt,
            k_diff,
            slots.shape[1],
            **lookup_constants(k_prompt, k_diff, lookup_mode),
            num_warps=4,
            enable_fp_fusion=False,
        )
