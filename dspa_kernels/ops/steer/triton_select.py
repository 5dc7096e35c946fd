"""The select phase of `steer`: everything about a row that does not need a pass over the encoder."""

import triton
import triton.language as tl

from dspa_kernels.ops.shared.triton_tiles import row_chunk, row_scale


@triton.jit
def plan_rows(p_rows, p_positions, p_start, o_row, m_row):
    """Return the plan row that steers each residual row, or -1."""
    b_plan = o_row
    if p_rows is not None:
        b_plan = tl.load(p_rows + o_row, mask=m_row, other=-1)
    if p_positions is not None:
        b_start = tl.load(p_start + b_plan, mask=m_row & (b_plan >= 0), other=0)
        b_plan = tl.where(tl.load(p_positions + o_row, mask=m_row, other=0) >= b_start, b_plan, -1)
    return tl.where(m_row, b_plan, -1)


@triton.jit
def prepare_row(
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
    NORMALIZE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):
    """finite = isfinite(h) everywhere, running_max = 0 and rank = 0.

    Where needed also normalised = n(h), its scale, and norms = ||n(h) - mean||, ||n(h)||.
    """
    b_mean, b_divisor, b_scale = row_scale(p_row, d_in, NORMALIZE, BLOCK_C)
    o_k = tl.arange(0, BLOCK_C)
    b_infinite = tl.zeros([BLOCK_C], dtype=tl.int32)
    b_centered_square, b_square = tl.zeros([BLOCK_C], dtype=tl.float32), tl.zeros([BLOCK_C], dtype=tl.float32)
    for i_k in range(0, d_in, BLOCK_C):
        m_k = o_k < d_in - i_k
        b_h = row_chunk(p_row, i_k, o_k, d_in, b_mean, b_divisor, "none")
        # Comparisons with NaN are false.
        b_infinite |= tl.where(tl.abs(b_h) < float("inf"), 0, 1)
        if NORMALIZE != "none":
            b_h = row_chunk(p_row, i_k, o_k, d_in, b_mean, b_divisor, NORMALIZE)
            tl.store(p_normalised + i_row * d_in + i_k + o_k, b_h, mask=m_k)
        if p_norms is not None:
            b_centered = tl.where(m_k, b_h - tl.load(p_screen_mean + i_k + o_k, mask=m_k, other=0.0), 0.0)
            b_centered_square += b_centered * b_centered
            b_square += b_h * b_h
    if NORMALIZE != "none":
        tl.store(p_scale + i_row, b_scale)
    if p_norms is not None:
        # Rounded up, for the relative error of the sums and for squares that underflow.
        tl.store(p_norms + 2 * i_row, tl.sqrt_rn(tl.sum(b_centered_square, axis=0)) * 1.001 + 1e-17)
        tl.store(p_norms + 2 * i_row + 1, tl.sqrt_rn(tl.sum(b_square, axis=0)) * 1.001 + 1e-17)
    tl.store(p_finite + i_row, 1 - tl.max(b_infinite, axis=0))
    tl.store(p_running_max + i_row, 0)
    if p_rank is not None:
        for i in range(0, n_slots, BLOCK_SLOTS):
            o_slot = i + tl.arange(0, BLOCK_SLOTS)
            tl.store(p_rank + i_row * n_slots + o_slot, tl.zeros([BLOCK_SLOTS], tl.int32), mask=o_slot < n_slots)


@triton.jit
def latent_values(
    p_row,
    p_encoder_rows,
    p_b_enc,
    p_threshold,
    o_latent,
    m_latent,
    d_in,
    NORMALIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """f_j = pre_j if pre_j > 0 and pre_j > threshold_j, else 0, [BLOCK_S]; top-k: if pre_j > 0."""
    b_mean, b_divisor, _ = row_scale(p_row, d_in, NORMALIZE, BLOCK_C)
    o_k = tl.arange(0, BLOCK_C)
    p_w = p_encoder_rows + o_latent.to(tl.int64)[:, None] * d_in + o_k[None, :]
    b_acc = tl.zeros([BLOCK_S, BLOCK_C], dtype=tl.float32)
    for i_k in range(0, d_in, BLOCK_C):
        b_x = row_chunk(p_row, i_k, o_k, d_in, b_mean, b_divisor, NORMALIZE)
        b_w = tl.load(p_w + i_k, mask=m_latent[:, None] & (o_k < d_in - i_k)[None, :], other=0.0)
        b_acc += b_w.to(tl.float32) * b_x[None, :]
    b_pre = tl.sum(b_acc, axis=1) + tl.load(p_b_enc + o_latent, mask=m_latent, other=0.0)
    m_active = m_latent & (b_pre > 0)
    if not TOP_K:
        m_active = m_active & (b_pre > tl.load(p_threshold + o_latent, mask=m_latent, other=0.0))
    return tl.where(m_active, b_pre, 0.0)


@triton.jit
def summarise(
    p_signs,
    p_finite,
    p_latent_values,
    o_row,
    b_plan,
    n_slots,
    n_large,
    BLOCK_N: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):
    """Return m_finite, required_shift, min_active and lower_bound of BLOCK_N rows.

    required_shift: the smallest alpha M that sets all active selected latents to 0; infinite if one of them is
    augmented, 0 if none is active. min_active: the smallest active selected value. lower_bound: a lower bound on M.
    """
    o_slot = tl.arange(0, BLOCK_SLOTS)
    m_steered = b_plan >= 0
    m_finite = m_steered & (tl.load(p_finite + o_row, mask=m_steered, other=0) == 1)
    p_f = p_latent_values + o_row.to(tl.int64)[:, None] * (n_slots + n_large)
    p_sign = p_signs + b_plan.to(tl.int64)[:, None] * n_slots
    b_required_shift, b_lower_bound = tl.zeros([BLOCK_N], dtype=tl.float32), tl.zeros([BLOCK_N], dtype=tl.float32)
    b_min_active = b_required_shift + float("inf")
    for i in range(0, n_slots, BLOCK_SLOTS):
        m_slot = m_finite[:, None] & (o_slot < n_slots - i)[None, :]
        b_f = tl.load(p_f + i + o_slot[None, :], mask=m_slot, other=0.0)
        b_sign = tl.load(p_sign + i + o_slot[None, :], mask=m_slot, other=0)
        b_shift_to_0 = tl.where(b_f > 0, tl.where(b_sign > 0, float("inf"), b_f), 0.0)
        b_required_shift = tl.maximum(b_required_shift, tl.max(b_shift_to_0, axis=1))
        b_min_active = tl.minimum(b_min_active, tl.min(tl.where(b_f > 0, b_f, float("inf")), axis=1))
        b_lower_bound = tl.maximum(b_lower_bound, tl.max(b_f, axis=1))
    for i in range(0, n_large, BLOCK_SLOTS):
        m_large = m_finite[:, None] & (o_slot < n_large - i)[None, :]
        b_f = tl.load(p_f + n_slots + i + o_slot[None, :], mask=m_large, other=0.0)
        b_lower_bound = tl.maximum(b_lower_bound, tl.max(b_f, axis=1))
    return m_finite, b_required_shift, b_min_active, b_lower_bound
