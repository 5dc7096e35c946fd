"""The stream phase of `steer`: the running maximum of the rows that need it, over tiles of the encoder."""

import triton
import triton.language as tl

from dspa_kernels.launch import STEER_WARPS
from dspa_kernels.ops.shared.triton_tiles import product_tile
from dspa_kernels.ops.steer.triton_select import plan_rows, summarise

# Relative rounding error per term, truncation included, of two sums of products together. Split rows have three
# products per term.
ROUNDING, SPLIT_ROUNDING = tl.constexpr(2.0**-22), tl.constexpr(2.0**-20)
THREADS = tl.constexpr(32 * STEER_WARPS)


@triton.jit
def waiting_rows(
    p_rows,
    p_positions,
    p_start,
    p_signs,
    p_finite,
    p_latent_values,
    i_row,
    alpha,
    n_rows,
    n_slots,
    n_large,
    SETTLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):
    """Return plan row, m_waiting (rows that need the encoder) and the summary of BLOCK_N rows."""
    o_row = i_row + tl.arange(0, BLOCK_N)
    b_plan = plan_rows(p_rows, p_positions, p_start, o_row, o_row < n_rows)
    _, b_required_shift, b_min_active, b_lower_bound = summarise(
        p_signs, p_finite, p_latent_values, o_row, b_plan, n_slots, n_large, BLOCK_N, BLOCK_SLOTS
    )
    m_waiting = b_required_shift > 0
    if SETTLE:
        m_waiting = m_waiting & (b_required_shift > alpha * b_lower_bound)
    return b_plan, m_waiting, b_required_shift, b_min_active, b_lower_bound


@triton.jit
def stream_tile(
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
    i_latent,
    i_row,
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
    SETTLE: tl.constexpr,
    TOP_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """running_max_n = max(running_max_n, f_nj) over the latents j of a tile, for the rows n that are not settled.

    Returns the number of encoder rows that were read in full. With a screen, an upper bound on each pre-activation
    decides which latents could raise a maximum or, for top-k, be ahead of a selected latent. Only their rows are read,
    through the same products.
    """
    REPLICAS: tl.constexpr = (THREADS + BLOCK_N - 1) // BLOCK_N
    o_latent, o_row = i_latent + tl.arange(0, BLOCK_L), i_row + tl.arange(0, BLOCK_N)
    # Other programs may raise it meanwhile. Each thread loads it once, past the L1 cache, and all threads decide by the
    # reduced value. Threads that decide by loads of their own could take different branches.
    o_replica = tl.arange(0, REPLICAS * BLOCK_N)
    b_running_max = tl.load(p_running_max + i_row + o_replica % BLOCK_N, cache_modifier=".cg")
    b_running_max = tl.max(tl.reshape(b_running_max, [REPLICAS, BLOCK_N]), axis=0)
    b_lower_bound = tl.where(
        m_waiting, tl.maximum(b_lower_bound, b_running_max.to(tl.float32, bitcast=True)), b_lower_bound
    )
    m_unsettled = m_waiting
    if SETTLE:
        m_unsettled = m_waiting & (b_required_shift > alpha * b_lower_bound)
    b_any_unsettled = tl.max(m_unsettled.to(tl.int32), axis=0)
    m_latent = o_latent < d_sae * b_any_unsettled
    b_threshold = tl.load(p_threshold + o_latent, mask=m_latent, other=0.0)
    if p_screen_rows is not None:
        if b_any_unsettled > 0:
            b_z = product_tile(
                p_screen_rows, p_x, i_latent, m_latent, i_row, m_unsettled, d_in, BLOCK_L, BLOCK_N, BLOCK_K, PRECISION
            )
            b_scale = tl.load(p_screen_latents + o_latent, mask=m_latent, other=0.0)
            b_offset = tl.load(p_screen_latents + d_sae + o_latent, mask=m_latent, other=0.0)
            b_error = tl.load(p_screen_latents + 2 * d_sae + o_latent, mask=m_latent, other=0.0)
            b_weight_norms = tl.load(p_screen_latents + 3 * d_sae + o_latent, mask=m_latent, other=0.0)
            b_centered_norm = tl.load(p_norms + 2 * o_row, mask=m_unsettled, other=0.0)
            b_rounding_loss = (d_in + 32) * (SPLIT_ROUNDING if PRECISION == 1 else ROUNDING)
            b_norm_loss = tl.load(p_norms + 2 * o_row + 1, mask=m_unsettled, other=0.0) * b_rounding_loss
            b_upper = b_z * b_scale[:, None] + b_offset[:, None]
            b_upper += b_error[:, None] * b_centered_norm[None, :] + b_weight_norms[:, None] * b_norm_loss[None, :]
            if TOP_K:
                m_excluded = b_upper < b_min_active[None, :]
            else:
                m_excluded = b_upper <= tl.maximum(b_lower_bound[None, :], b_threshold[:, None])
            # Comparisons with NaN are false, so that a NaN is a candidate.
            m_candidate = m_unsettled[None, :] & ~m_excluded
            m_latent = m_latent & (tl.max(m_candidate.to(tl.int32), axis=1) > 0)
    b_n_read = tl.sum(m_latent.to(tl.int32), axis=0)
    if b_n_read > 0:
        b_pre = product_tile(
            p_encoder_rows, p_x, i_latent, m_latent, i_row, m_unsettled, d_in, BLOCK_L, BLOCK_N, BLOCK_K, PRECISION
        )
        b_pre += tl.load(p_b_enc + o_latent, mask=m_latent, other=0.0)[:, None]
        m_active = m_latent[:, None] & (b_pre > 0)
        if not TOP_K:
            m_active = m_active & (b_pre > b_threshold[:, None])
        b_tile_max = tl.max(tl.where(m_active, b_pre, 0.0), axis=0)
        # Non-negative floats order like their bits, and an integer maximum does not depend on the order of programs.
        m_raised = m_unsettled & (b_tile_max > 0)
        tl.atomic_max(p_running_max + o_row, b_tile_max.to(tl.int32, bitcast=True), mask=m_raised, sem="relaxed")
        if TOP_K:
            b_index = o_latent
            if p_order is not None:
                b_index = tl.load(p_order + o_latent, mask=m_latent, other=0)
            for i_slot in range(n_slots):
                b_slot = tl.load(p_slots + b_plan.to(tl.int64) * n_slots + i_slot, mask=m_unsettled, other=-1)
                b_f = tl.load(
                    p_latent_values + o_row.to(tl.int64) * (n_slots + n_large) + i_slot, mask=m_unsettled, other=0.0
                )
                b_own_index = tl.load(p_columns + b_slot, mask=m_unsettled & (b_slot >= 0), other=-1)
                m_ahead = (b_pre > b_f[None, :]) | ((b_pre == b_f[None, :]) & (b_index[:, None] < b_own_index[None, :]))
                m_ahead = m_ahead & m_latent[:, None] & (b_index[:, None] != b_own_index[None, :])
                b_n_ahead = tl.sum(m_ahead.to(tl.int32), axis=0)
                tl.atomic_add(p_rank + o_row * n_slots + i_slot, b_n_ahead, mask=m_unsettled & (b_f > 0), sem="relaxed")
    return b_n_read
