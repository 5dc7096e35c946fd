"""The stream phase of `steer`: the running maximum of the rows that need it, over tiles of the encoder."""

import triton
import triton.language as tl

from dspa_kernels.launch import STEER_WARPS
from dspa_kernels.ops.shared.triton_tiles import product_tile
from dspa_kernels.ops.steer.triton_select import summarise

THREADS = tl.constexpr(32 * STEER_WARPS)


@triton.jit
def waiting_rows(
    scratch, i_row, alpha, p_alphas, n_rows, n_slots, n_large, SETTLE: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Return the state, m_waiting (rows that need the encoder) and the summary of BLOCK_N rows."""
    o_row = i_row + tl.arange(0, BLOCK_N)
    b_state, summary = summarise(scratch, alpha, p_alphas, o_row, o_row < n_rows, n_rows, n_slots, n_large, BLOCK_N)
    m_waiting = unsettled_rows(summary.required_shift > 0, summary, summary.lower_bound, SETTLE)
    return b_state, m_waiting, summary


@triton.jit
def running_maxima(p_running_max, i_row, m_row, BLOCK_N: tl.constexpr):
    """Return the running maxima of BLOCK_N rows, the same in every thread although other programs may raise them.

    Each thread loads a value once, past the L1 cache, and all use the reduced value. Threads that decided by loads of
    their own could take different branches.
    """
    REPLICAS: tl.constexpr = (THREADS + BLOCK_N - 1) // BLOCK_N
    o_n = tl.arange(0, REPLICAS * BLOCK_N) % BLOCK_N
    m_replica = tl.reshape(tl.broadcast_to(m_row[None, :], [REPLICAS, BLOCK_N]), [REPLICAS * BLOCK_N])
    b_running_max = tl.load(p_running_max + i_row + o_n, mask=m_replica, other=0, cache_modifier=".cg")
    return tl.max(tl.reshape(b_running_max, [REPLICAS, BLOCK_N]), axis=0).to(tl.float32, bitcast=True)


@triton.jit
def stream_tile(
    p_x,
    encoder,
    columns,
    p_slots,
    scratch,
    i_latent,
    i_row,
    b_state,
    m_waiting,
    summary,
    d_in,
    d_sae,
    n_slots,
    SETTLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """running_max_n = max(running_max_n, f_nj) over the latents j of a tile, for the rows n that are not settled.

    Returns the number of encoder rows that were read.
    """
    o_latent, o_row = i_latent + tl.arange(0, BLOCK_L), i_row + tl.arange(0, BLOCK_N)
    b_running_max = running_maxima(scratch.running_max, i_row, m_waiting, BLOCK_N)
    m_unsettled = unsettled_rows(m_waiting, summary, b_running_max, SETTLE)
    m_latent = o_latent < d_sae * tl.max(m_unsettled.to(tl.int32), axis=0)
    n_read = tl.sum(m_latent.to(tl.int32), axis=0)
    if n_read > 0:
        b_pre = product_tile(
            encoder.rows, p_x, i_latent, m_latent, i_row, m_unsettled, d_in, BLOCK_L, BLOCK_N, BLOCK_K, PRECISION
        )
        update_rows(b_pre, encoder, columns, p_slots, scratch, o_latent, m_latent, o_row, m_unsettled, b_state, n_slots)
    return n_read


@triton.jit
def unsettled_rows(m_waiting, summary, b_bound, SETTLE: tl.constexpr):
    """Return the waiting rows that neither their own bound on the maximum nor another one settles."""
    m_unsettled = m_waiting
    if SETTLE:
        m_unsettled = m_waiting & (summary.required_shift > summary.alpha * tl.maximum(summary.lower_bound, b_bound))
    return m_unsettled


@triton.jit
def update_rows(b_product, encoder, columns, p_slots, scratch, o_latent, m_latent, o_row, m_row, b_state, n_slots):
    """running_max_n = max(running_max_n, f_nj) over the latents j of a tile, and their part in the ranks of top-k."""
    TOP_K: tl.constexpr = scratch.rank is not None
    b_pre = b_product + tl.load(encoder.b_enc + o_latent, mask=m_latent, other=0.0)[:, None]
    m_active = m_latent[:, None] & (b_pre > 0)
    if not TOP_K:
        m_active = m_active & (b_pre > tl.load(encoder.threshold + o_latent, mask=m_latent, other=0.0)[:, None])
    raise_maxima(scratch.running_max, o_row, m_row, tl.max(tl.where(m_active, b_pre, 0.0), axis=0))
    if TOP_K:
        count_ahead(b_pre, encoder.order, columns, p_slots, scratch, o_latent, m_latent, o_row, m_row, b_state, n_slots)


@triton.jit
def raise_maxima(p_running_max, o_row, m_row, b_maximum):
    """running_max_n = max(running_max_n, maximum_n) where maximum_n > 0."""
    # Non-negative floats order like their bits, and an integer maximum does not depend on the order of programs.
    b_bits = b_maximum.to(tl.int32, bitcast=True)
    tl.atomic_max(p_running_max + o_row, b_bits, mask=m_row & (b_maximum > 0), sem="relaxed")


@triton.jit
def count_ahead(b_pre, p_order, columns, p_slots, scratch, o_latent, m_latent, o_row, m_row, b_plan, n_slots):
    """rank_ns += number of latents of a tile that are ahead of the selected latent in slot s of row n.

    They are larger than f_ns, or equal and of a smaller index.
    """
    b_index = o_latent
    if p_order is not None:
        b_index = tl.load(p_order + o_latent, mask=m_latent, other=0)
    for i_slot in range(n_slots):
        b_slot = tl.load(p_slots + b_plan.to(tl.int64) * n_slots + i_slot, mask=m_row, other=-1)
        b_f = tl.load(scratch.selected + o_row.to(tl.int64) * n_slots + i_slot, mask=m_row, other=0.0)
        b_own_index = tl.load(columns.latents + b_slot, mask=m_row & (b_slot >= 0), other=-1)
        m_ahead = (b_pre > b_f[None, :]) | ((b_pre == b_f[None, :]) & (b_index[:, None] < b_own_index[None, :]))
        m_ahead = m_ahead & m_latent[:, None] & (b_index[:, None] != b_own_index[None, :])
        b_n_ahead = tl.sum(m_ahead.to(tl.int32), axis=0)
        tl.atomic_add(scratch.rank + o_row * n_slots + i_slot, b_n_ahead, mask=m_row & (b_f > 0), sem="relaxed")
