"""The kernel of `steer`: its phases, with grid barriers between them."""

import triton
import triton.language as tl

from dspa_kernels.ops.map_lookup.triton_impl import lookup_prompt
from dspa_kernels.ops.shared.triton_grid import grid_arrive, grid_wait
from dspa_kernels.ops.steer.triton_screen import evaluate_candidates, screen_tile
from dspa_kernels.ops.steer.triton_select import BLOCK_G, BLOCK_S, plan_rows, prepare_row, select_latents
from dspa_kernels.ops.steer.triton_stream import stream_tile, waiting_rows
from dspa_kernels.ops.steer.triton_tail import BLOCK_D, edit_row, prefetch_row

# A launch runs one phase, or all of them with grid barriers between.
PREPARE, SELECT, STREAM, EVALUATE, TAIL, ALL = range(6)
_PREPARE, _SELECT, _STREAM = tl.constexpr(PREPARE), tl.constexpr(SELECT), tl.constexpr(STREAM)
_EVALUATE, _TAIL, _ALL = tl.constexpr(EVALUATE), tl.constexpr(TAIL), tl.constexpr(ALL)
_BLOCK_S, _BLOCK_G, _BLOCK_D = tl.constexpr(BLOCK_S), tl.constexpr(BLOCK_G), tl.constexpr(BLOCK_D)

SIZES = ("k", "d_sae", "d_sae_in", "n_rows", "n_prompts", "n_columns", "n_slots", "n_large", "k_prompt", "k_diff")
# Callers slice these, and another alignment would be another kernel, compiled in the middle of decoding.
SLICED = ("p_slots", "p_signs", "p_rows", "p_positions", "p_start", "p_strengths", "p_alphas", "p_paths")


@triton.jit(do_not_specialize=[*SIZES, "n_programs"], do_not_specialize_on_alignment=[*SLICED])
def steer_kernel(
    p_h,
    p_residual,
    p_out,
    encoder,
    screen,
    columns,
    p_slots,
    p_signs,
    p_rows,
    p_positions,
    p_start,
    p_strengths,
    p_alphas,
    p_paths,
    record,
    lookup,
    scratch,
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
    NORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MANY_ROWS: tl.constexpr = False,
    AUGMENT: tl.constexpr = False,
    ABLATE: tl.constexpr = False,
    BLOCK: tl.constexpr = 16,
    BLOCK_PROMPT: tl.constexpr = 16,
    CHUNK_PROMPT: tl.constexpr = 16,
    BLOCK_DIFF: tl.constexpr = 16,
    CHUNK_DIFF: tl.constexpr = 16,
):
    """h'_n = h_n + scale_n sum_j (f'_j - f_j) W_dec[j] over the active selected latents j of row n.

    f'_j = f_j + alpha M (augment) or max(f_j - alpha M, 0) (ablate), and M = max of f over all latents. With
    p_strengths, f'_j is that of `moved`, and latents that it moves always need not be active.

    encoder: rows, b_enc, threshold, order. screen: rows, latents, mean. columns: latents, encoder_rows, b_enc,
    threshold, W_dec. record: before, after, maximum. lookup: counts, cdmap, latents, key.

    With p_residual, h is total = h + residual. Without p_out, rows that change are written to h in place, their
    residual becomes 0, and nothing else is written.
    """
    TOP_K: tl.constexpr = scratch.rank is not None
    SETTLE: tl.constexpr = record is None and not TOP_K
    # With strengths nothing needs M, but a top-k latent its rank.
    STREAMS: tl.constexpr = p_strengths is None or TOP_K
    # Rows are prepared before the selection if that reads sums or normalised rows, else along with it.
    PREPARED: tl.constexpr = NORMALIZE != "none" or p_residual is not None
    i_program = tl.program_id(0)
    p_total = p_h if p_residual is None else scratch.total
    p_x = p_total if NORMALIZE == "none" else scratch.x

    if PREPARED or lookup is not None:
        if PHASE == _ALL or PHASE == _PREPARE:
            if lookup is not None:
                for i in range(i_program, n_prompts, n_programs):
                    i_prompt = tl.cast(i, tl.int64)
                    lookup_prompt(
                        lookup.counts + i_prompt * d_sae_in,
                        lookup.cdmap,
                        lookup.latents + i_prompt * k_prompt,
                        lookup.key + i_prompt * n_columns,
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
            if PREPARED:
                for i in range(i_program, n_rows, n_programs):
                    i_row = tl.cast(i, tl.int64)
                    b_plan = plan_rows(p_rows, p_positions, p_start, i_row, i_row < n_rows)
                    prepare_row(p_h, p_residual, screen, scratch, i_row, b_plan, d_in, n_slots, NORMALIZE)
        if PHASE == _ALL:
            grid_wait(p_barrier, grid_arrive(p_barrier, n_programs))

    if PHASE == _ALL or PHASE == _SELECT:
        n_large_items = tl.cdiv(n_large, _BLOCK_S) * tl.cdiv(n_rows, BLOCK_N)
        n_items = n_large_items + n_rows * tl.cdiv(n_slots, _BLOCK_S)
        n_prepared = 0 if PREPARED else n_rows
        for i in range(i_program, n_items + n_prepared, n_programs):
            if i < n_items:
                select_latents(
                    p_x,
                    encoder,
                    columns,
                    p_slots,
                    p_signs,
                    p_rows,
                    p_positions,
                    p_start,
                    p_strengths,
                    record,
                    scratch,
                    i,
                    d_in,
                    n_rows,
                    n_slots,
                    n_large,
                    TOP_K,
                    PRECISION,
                    BLOCK_N,
                    BLOCK_K,
                )
            else:
                i_row = tl.cast(i - n_items, tl.int64)
                b_plan = plan_rows(p_rows, p_positions, p_start, i_row, i_row < n_rows)
                prepare_row(p_h, p_residual, screen, scratch, i_row, b_plan, d_in, n_slots, NORMALIZE)
    if PHASE == _ALL:
        grid_wait(p_barrier, grid_arrive(p_barrier, n_programs))

    n_waiting = 0
    if STREAMS and (PHASE == _ALL or PHASE == _STREAM or PHASE == _EVALUATE):
        n_read = 0
        b_state, m_waiting, summary = waiting_rows(
            scratch, 0, alpha, p_alphas, n_rows, n_slots, n_large, SETTLE, BLOCK_N
        )
        n_waiting = n_rows if MANY_ROWS else tl.sum(m_waiting.to(tl.int32), axis=0)
        if n_waiting > 0 and PHASE != _EVALUATE:
            # Latents are the outer loop, so that each encoder row comes from memory once for all rows. Addresses that
            # tiles share are computed for each, because keeping them takes registers that a tile needs.
            for i_tile in tl.range(i_program, tl.cdiv(d_sae, BLOCK_L), n_programs, disable_licm=True):
                if screen is not None:
                    screen_tile(
                        p_x,
                        encoder,
                        screen,
                        scratch,
                        i_tile * BLOCK_L,
                        m_waiting,
                        summary,
                        d_in,
                        d_sae,
                        n_rows,
                        SETTLE,
                        PRECISION,
                        BLOCK_N,
                        BLOCK_L,
                    )
                else:
                    for i_first in range(0, n_rows, BLOCK_N):
                        if MANY_ROWS:
                            b_state, m_waiting, summary = waiting_rows(
                                scratch, i_first, alpha, p_alphas, n_rows, n_slots, n_large, SETTLE, BLOCK_N
                            )
                        n_read += stream_tile(
                            p_x,
                            encoder,
                            columns,
                            p_slots,
                            scratch,
                            i_tile * BLOCK_L,
                            i_first,
                            b_state,
                            m_waiting,
                            summary,
                            d_in,
                            d_sae,
                            n_slots,
                            SETTLE,
                            PRECISION,
                            BLOCK_N,
                            BLOCK_L,
                            BLOCK_K,
                        )
        if screen is not None and PHASE != _STREAM:
            if n_waiting > 0:
                if PHASE == _ALL:
                    grid_wait(p_barrier, grid_arrive(p_barrier, n_programs))
                n_candidates = tl.load(scratch.n_candidates, cache_modifier=".cg")
                # As even a share for each program as tiles allow.
                n_latents = tl.minimum(tl.cdiv(n_candidates, n_programs), _BLOCK_G)
                for i in range(i_program, tl.cdiv(n_candidates, tl.maximum(n_latents, 1)), n_programs):
                    n_read += evaluate_candidates(
                        p_x,
                        encoder,
                        columns,
                        p_slots,
                        scratch,
                        i * n_latents,
                        tl.minimum(n_latents, n_candidates - i * n_latents),
                        b_state,
                        m_waiting,
                        summary,
                        d_in,
                        n_rows,
                        n_slots,
                        SETTLE,
                        PRECISION,
                        BLOCK_N,
                        BLOCK_K,
                    )
        if p_paths is not None:
            tl.atomic_add(p_paths + 5, tl.cast(n_read, tl.int64), sem="relaxed")

    if PHASE == _ALL or PHASE == _TAIL:
        n_items = n_rows * tl.cdiv(d_in, _BLOCK_D)
        if PHASE == _ALL:
            # The same in every program: if no row needed the stream, the last barrier has seen all that is read here.
            if n_waiting > 0:
                b_token = grid_arrive(p_barrier, n_programs)
                if i_program < n_items:
                    prefetch_row(columns, p_slots, scratch, i_program, d_in, n_slots)
                grid_wait(p_barrier, b_token)
        for i in range(i_program, n_items, n_programs):
            edit_row(
                p_total,
                p_h,
                p_residual,
                p_out,
                columns,
                p_slots,
                p_signs,
                p_strengths,
                record,
                p_paths,
                scratch,
                i,
                alpha,
                p_alphas,
                k,
                d_in,
                n_rows,
                n_slots,
                n_large,
            )
