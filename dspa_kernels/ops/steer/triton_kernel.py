"""The kernel of `steer`: its phases, with grid barriers between them."""

import triton
import triton.language as tl

from dspa_kernels.ops.map_lookup.triton_impl import lookup_prompt
from dspa_kernels.ops.shared.triton_grid import grid_arrive, grid_wait
from dspa_kernels.ops.steer.triton_select import latent_values, plan_rows, prepare_row
from dspa_kernels.ops.steer.triton_stream import stream_tile, waiting_rows
from dspa_kernels.ops.steer.triton_tail import edit_row

# The interpreter runs programs one after the other, so each phase is a launch of its own there.
LOOKUP, SELECT, STREAM, TAIL, ALL = range(5)
_LOOKUP, _SELECT, _STREAM = tl.constexpr(LOOKUP), tl.constexpr(SELECT), tl.constexpr(STREAM)
_TAIL, _ALL = tl.constexpr(TAIL), tl.constexpr(ALL)

SIZES = ("k", "d_sae", "d_sae_in", "n_rows", "n_prompts", "n_columns", "n_slots", "n_large", "k_prompt", "k_diff")


@triton.jit(do_not_specialize=[*SIZES, "n_programs"])
def steer_kernel(
    p_h,
    p_encoder_rows,
    p_b_enc,
    p_threshold,
    p_order,
    p_screen_rows,
    p_screen_latents,
    p_screen_mean,
    p_columns,
    p_columns_encoder_rows,
    p_columns_b_enc,
    p_columns_threshold,
    p_columns_W_dec,
    p_slots,
    p_signs,
    p_rows,
    p_positions,
    p_start,
    p_paths,
    p_out,
    p_before,
    p_after,
    p_maximum,
    p_normalised,
    p_scale,
    p_norms,
    p_latent_values,
    p_finite,
    p_running_max,
    p_rank,
    p_counts,
    p_values,
    p_latents,
    p_key,
    p_barrier,
    alpha,
    k,
    d_in,
    d_sae,
    d_sae_in,
    n_rows,
    n_prompts,
    n_columns,
    n_slots,
    n_large,
    k_prompt,
    k_diff,
    n_programs,
    PHASE: tl.constexpr,
    MANY_ROWS: tl.constexpr,
    RECORD: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    AUGMENT: tl.constexpr = False,
    ABLATE: tl.constexpr = False,
    BLOCK: tl.constexpr = 16,
    BLOCK_PROMPT: tl.constexpr = 16,
    CHUNK_PROMPT: tl.constexpr = 16,
    BLOCK_DIFF: tl.constexpr = 16,
    CHUNK_DIFF: tl.constexpr = 16,
):
    """h'_n = h_n + scale_n sum_j (f'_j - f_j) W_dec[j] over the active selected latents j of row n.

    f'_j = f_j + alpha M (augment) or max(f_j - alpha M, 0) (ablate), and M = max of f over all latents.
    """
    TOP_K: tl.constexpr = p_rank is not None
    SETTLE: tl.constexpr = not RECORD and not TOP_K
    i_program = tl.program_id(0)
    p_x = p_h if NORMALIZE == "none" else p_normalised

    if p_counts is not None:
        if PHASE == _ALL or PHASE == _LOOKUP:
            for i in range(i_program, n_prompts, n_programs):
                i_prompt = tl.cast(i, tl.int64)
                lookup_prompt(
                    p_counts + i_prompt * d_sae_in,
                    p_values,
                    p_latents + i_prompt * k_prompt,
                    p_key + i_prompt * n_columns,
                    p_slots + i_prompt * n_slots,
                    p_signs + i_prompt * n_slots,
                    d_sae_in,
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
        if PHASE == _ALL:
            # An even number of rounds restores the barrier's word: four here, and two without a lookup.
            grid_wait(p_barrier, grid_arrive(p_barrier, n_programs))
            b_token = grid_arrive(p_barrier, n_programs)
            grid_wait(p_barrier, b_token)

    if PHASE == _ALL or PHASE == _SELECT:
        n_slot_tasks = tl.cdiv(n_slots, BLOCK_S)
        n_tasks = 1 + n_slot_tasks + tl.cdiv(n_large, BLOCK_S)
        for i in range(i_program, n_rows * n_tasks, n_programs):
            i_row = (i // n_tasks).to(tl.int64)
            i_task = i % n_tasks
            p_row = p_h + i_row * d_in
            b_plan = plan_rows(p_rows, p_positions, p_start, i_row, i_row < n_rows)
            if b_plan >= 0:
                if i_task == 0:
                    prepare_row(
                        p_row,
                        p_normalised,
                        p_scale,
                        p_norms,
                        p_screen_mean,
                        p_finite,
                        p_running_max,
                        p_rank,
                        i_row,
                        d_in,
                        n_slots,
                        NORMALIZE,
                        BLOCK_C,
                        BLOCK_SLOTS,
                    )
                elif i_task <= n_slot_tasks:
                    o_slot = (i_task - 1) * BLOCK_S + tl.arange(0, BLOCK_S)
                    m_slot = o_slot < n_slots
                    b_slot = tl.load(p_slots + b_plan.to(tl.int64) * n_slots + o_slot, mask=m_slot, other=-1)
                    b_f = latent_values(
                        p_row,
                        p_columns_encoder_rows,
                        p_columns_b_enc,
                        p_columns_threshold,
                        b_slot,
                        b_slot >= 0,
                        d_in,
                        NORMALIZE,
                        TOP_K,
                        BLOCK_S,
                        BLOCK_C,
                    )
                    tl.store(p_latent_values + i_row * (n_slots + n_large) + o_slot, b_f, mask=m_slot)
                else:
                    o_large = (i_task - 1 - n_slot_tasks) * BLOCK_S + tl.arange(0, BLOCK_S)
                    m_large = o_large < n_large
                    b_f = latent_values(
                        p_row,
                        p_encoder_rows,
                        p_b_enc,
                        p_threshold,
                        o_large,
                        m_large,
                        d_in,
                        NORMALIZE,
                        TOP_K,
                        BLOCK_S,
                        BLOCK_C,
                    )
                    tl.store(p_latent_values + i_row * (n_slots + n_large) + n_slots + o_large, b_f, mask=m_large)
    if PHASE == _ALL:
        grid_wait(p_barrier, grid_arrive(p_barrier, n_programs))

    n_waiting = n_rows
    if PHASE == _ALL or PHASE == _STREAM:
        n_read = 0
        n_tiles = tl.cdiv(d_sae, BLOCK_L)
        if MANY_ROWS:
            # Work tiles are the outer loop, so that each encoder row comes from memory once for all rows.
            for i_tile in range(i_program, n_tiles, n_programs):
                for i_first in range(0, n_rows, BLOCK_N):
                    b_plan, m_waiting, b_required_shift, b_min_active, b_lower_bound = waiting_rows(
                        p_rows,
                        p_positions,
                        p_start,
                        p_signs,
                        p_finite,
                        p_latent_values,
                        i_first,
                        alpha,
                        n_rows,
                        n_slots,
                        n_large,
                        SETTLE,
                        BLOCK_N,
                        BLOCK_SLOTS,
                    )
                    n_read += stream_tile(
                        p_x,
                        p_encoder_rows,
                        p_b_enc,
                        p_threshold,
                        p_order,
                        p_screen_rows,
                        p_screen_latents,
                        p_norms,
                        p_columns,
                        p_slots,
                        p_latent_values,
                        p_running_max,
                        p_rank,
                        i_tile * BLOCK_L,
                        i_first,
                        b_plan,
                        m_waiting,
                        b_required_shift,
                        b_min_active,
                        b_lower_bound,
                        alpha,
                        d_in,
                        d_sae,
                        n_slots,
                        n_large,
                        SETTLE,
                        TOP_K,
                        PRECISION,
                        BLOCK_N,
                        BLOCK_L,
                        BLOCK_K,
                    )
        else:
            b_plan, m_waiting, b_required_shift, b_min_active, b_lower_bound = waiting_rows(
                p_rows,
                p_positions,
                p_start,
                p_signs,
                p_finite,
                p_latent_values,
                0,
                alpha,
                n_rows,
                n_slots,
                n_large,
                SETTLE,
                BLOCK_N,
                BLOCK_SLOTS,
            )
            n_waiting = tl.sum(m_waiting.to(tl.int32), axis=0)
            if n_waiting > 0:
                for i_tile in range(i_program, n_tiles, n_programs):
                    n_read += stream_tile(
                        p_x,
                        p_encoder_rows,
                        p_b_enc,
                        p_threshold,
                        p_order,
                        p_screen_rows,
                        p_screen_latents,
                        p_norms,
                        p_columns,
                        p_slots,
                        p_latent_values,
                        p_running_max,
                        p_rank,
                        i_tile * BLOCK_L,
                        0,
                        b_plan,
                        m_waiting,
                        b_required_shift,
                        b_min_active,
                        b_lower_bound,
                        alpha,
                        d_in,
                        d_sae,
                        n_slots,
                        n_large,
                        SETTLE,
                        TOP_K,
                        PRECISION,
                        BLOCK_N,
                        BLOCK_L,
                        BLOCK_K,
                    )
        if p_paths is not None:
            tl.atomic_add(p_paths + 5, tl.cast(n_read, tl.int64), sem="relaxed")
    if PHASE == _ALL:
        b_token = grid_arrive(p_barrier, n_programs)
        # The same in every program. If no row needed the stream, there is nothing to wait for.
        if n_waiting > 0:
            grid_wait(p_barrier, b_token)

    if PHASE == _ALL or PHASE == _TAIL:
        n_column_tiles = tl.cdiv(d_in, BLOCK_D)
        for i in range(i_program, n_rows * n_column_tiles, n_programs):
            i_row = (i // n_column_tiles).to(tl.int64)
            edit_row(
                p_h,
                p_out,
                p_columns_W_dec,
                p_slots,
                p_signs,
                p_scale,
                p_latent_values,
                p_running_max,
                p_rank,
                p_finite,
                p_before,
                p_after,
                p_maximum,
                p_paths,
                i_row,
                i % n_column_tiles,
                plan_rows(p_rows, p_positions, p_start, i_row, i_row < n_rows),
                alpha,
                k,
                d_in,
                n_slots,
                n_large,
                RECORD,
                BLOCK_SLOTS,
                BLOCK_D,
            )
