"""The stream phase of `steer`: the maximum of the rows that need it, a tile of the encoder at a time."""

import triton
import triton.language as tl

from dspa_kernels.launch import STEER_WARPS
from dspa_kernels.ops.shared.triton_tiles import product_tile
from dspa_kernels.ops.steer.triton_select import plan_rows, summarise

# Twice what one sum of products loses at a term, truncation counted: a bound for two of them. Rows that are split
# make three products of one.
ROUNDING, SPLIT_ROUNDING = tl.constexpr(2.0**-22), tl.constexpr(2.0**-20)
THREADS = tl.constexpr(32 * STEER_WARPS)


@triton.jit
def waiting_rows(
    p_rows,
    p_positions,
    p_start,
    p_signs,
    p_finite,
    p_value,
    i_row,
    alpha,
    n_rows,
    n_slots,
    n_large,
    SETTLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):
    """Of BLOCK_N rows: plan row, whether they need the encoder, and what `summarise` tells."""
    o_row = i_row + tl.arange(0, BLOCK_N)
    b_plan = plan_rows(p_rows, p_positions, p_start, o_row, o_row < n_rows)
    _, b_need, b_least, b_bound = summarise(
        p_signs, p_finite, p_value, o_row, b_plan, n_slots, n_large, BLOCK_N, BLOCK_SLOTS
    )
    m_waiting = b_need > 0
    if SETTLE:
        m_waiting = m_waiting & (b_need > alpha * b_bound)
    return b_plan, m_waiting, b_need, b_least, b_bound


@triton.jit
def stream_tile(
    p_x,
    p_encoder_rows,
    p_b_enc,
    p_threshold,
    p_order,
    p_screen_rows,
    p_screen,
    p_norms,
    p_columns,
    p_slots,
    p_value,
    p_running_max,
    p_beaten,
    i_latent,
    i_row,
    b_plan,
    m_waiting,
    b_need,
    b_least,
    b_bound,
    alpha,
    d_in,
    d_sae,
    n_slots,
    n_large,
    SETTLE: tl.constexpr,
    TOP_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """running_max_n = max(running_max_n, f_nj) over the latents j of a tile, for the waiting rows n that it does not
    settle yet; returns how many encoder rows were read in full.

    Screened, an upper bound on each pre-activation decides which rows could raise a maximum (or, for top-k, beat
    the least of the row's selected latents); only those are read, through the same products.
    """
    COPIES: tl.constexpr = (THREADS + BLOCK_N - 1) // BLOCK_N
    o_latent, o_row = i_latent + tl.arange(0, BLOCK_L), i_row + tl.arange(0, BLOCK_N)
    # Others may raise it meanwhile, so it is read past the first-level cache, by each thread once, and what all
    # threads decide by is the reduction: two that read for themselves could go different ways.
    o_copy = tl.arange(0, COPIES * BLOCK_N)
    b_running_max = tl.load(p_running_max + i_row + o_copy % BLOCK_N, cache_modifier=".cg")
    b_running_max = tl.max(tl.reshape(b_running_max, [COPIES, BLOCK_N]), axis=0)
    b_bound = tl.where(m_waiting, tl.maximum(b_bound, b_running_max.to(tl.float32, bitcast=True)), b_bound)
    m_open = m_waiting
    if SETTLE:
        m_open = m_waiting & (b_need > alpha * b_bound)
    b_open = tl.max(m_open.to(tl.int32), axis=0)
    m_latent = o_latent < d_sae * b_open
    b_threshold = tl.load(p_threshold + o_latent, mask=m_latent, other=0.0)
    if p_screen_rows is not None:
        if b_open > 0:
            b_z = product_tile(
                p_screen_rows, p_x, i_latent, m_latent, i_row, m_open, d_in, BLOCK_L, BLOCK_N, BLOCK_K, PRECISION
            )
            b_s = tl.load(p_screen + o_latent, mask=m_latent, other=0.0)
            b_offset = tl.load(p_screen + d_sae + o_latent, mask=m_latent, other=0.0)
            b_error = tl.load(p_screen + 2 * d_sae + o_latent, mask=m_latent, other=0.0)
            b_size = tl.load(p_screen + 3 * d_sae + o_latent, mask=m_latent, other=0.0)
            b_near = tl.load(p_norms + 2 * o_row, mask=m_open, other=0.0)
            b_loss = (d_in + 32) * (SPLIT_ROUNDING if PRECISION == 1 else ROUNDING)
            b_norm = tl.load(p_norms + 2 * o_row + 1, mask=m_open, other=0.0) * b_loss
            b_upper = b_z * b_s[:, None] + b_offset[:, None]
            b_upper += b_error[:, None] * b_near[None, :] + b_size[:, None] * b_norm[None, :]
            if TOP_K:
                m_out = b_upper < b_least[None, :]
            else:
                m_out = b_upper <= tl.maximum(b_bound[None, :], b_threshold[:, None])
            # What is not a number could be anything.
            m_candidate = m_open[None, :] & ~m_out
            m_latent = m_latent & (tl.max(m_candidate.to(tl.int32), axis=1) > 0)
    b_read = tl.sum(m_latent.to(tl.int32), axis=0)
    if b_read > 0:
        b_pre = product_tile(
            p_encoder_rows, p_x, i_latent, m_latent, i_row, m_open, d_in, BLOCK_L, BLOCK_N, BLOCK_K, PRECISION
        )
        b_pre += tl.load(p_b_enc + o_latent, mask=m_latent, other=0.0)[:, None]
        m_active = m_latent[:, None] & (b_pre > 0)
        if not TOP_K:
            m_active = m_active & (b_pre > b_threshold[:, None])
        b_tile_max = tl.max(tl.where(m_active, b_pre, 0.0), axis=0)
        # Numbers >= 0 order like their bits, so that the order of the blocks does not matter.
        m_raised = m_open & (b_tile_max > 0)
        tl.atomic_max(p_running_max + o_row, b_tile_max.to(tl.int32, bitcast=True), mask=m_raised, sem="relaxed")
        if TOP_K:
            b_index = o_latent
            if p_order is not None:
                b_index = tl.load(p_order + o_latent, mask=m_latent, other=0)
            for i_slot in range(n_slots):
                b_slot = tl.load(p_slots + b_plan.to(tl.int64) * n_slots + i_slot, mask=m_open, other=-1)
                b_f = tl.load(p_value + o_row.to(tl.int64) * (n_slots + n_large) + i_slot, mask=m_open, other=0.0)
                b_own = tl.load(p_columns + b_slot, mask=m_open & (b_slot >= 0), other=-1)
                m_ahead = (b_pre > b_f[None, :]) | ((b_pre == b_f[None, :]) & (b_index[:, None] < b_own[None, :]))
                m_ahead = m_ahead & m_latent[:, None] & (b_index[:, None] != b_own[None, :])
                b_ahead = tl.sum(m_ahead.to(tl.int32), axis=0)
                tl.atomic_add(p_beaten + o_row * n_slots + i_slot, b_ahead, mask=m_open & (b_f > 0), sem="relaxed")
    return b_read
