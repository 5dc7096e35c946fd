"""The tail of `steer`: the edits of a row, and the residual that follows from them."""

import triton
import triton.language as tl

from dspa_kernels.ops.shared.triton_tiles import rounded
from dspa_kernels.ops.steer.triton_select import summarise


@triton.jit
def edit_row(
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
    i_column_tile,
    b_plan,
    alpha,
    k,
    d_in,
    n_slots,
    n_large,
    RECORD: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out = h + scale sum_j (f'_j - f_j) W_dec[j] at BLOCK_D columns; f' = f + alpha M or max(f - alpha M, 0).

    The first column tile of a row also records the edits and counts the row in `paths`.
    """
    m_finite, b_required_shift, _, b_lower_bound = summarise(
        p_signs,
        p_finite,
        p_latent_values,
        i_row + tl.arange(0, 1),
        b_plan + tl.arange(0, 1),
        n_slots,
        n_large,
        1,
        BLOCK_SLOTS,
    )
    b_lower_bound, b_required_shift = tl.sum(b_lower_bound, axis=0), tl.sum(b_required_shift, axis=0)
    b_finite = tl.sum(m_finite.to(tl.int32), axis=0)
    # Other programs wrote this, so the load bypasses the L1 cache.
    b_running_max = tl.load(p_running_max + i_row, mask=b_finite == 1, other=0, cache_modifier=".cg")
    b_maximum = tl.maximum(b_running_max.to(tl.float32, bitcast=True), b_lower_bound)
    b_shift = alpha * b_maximum

    o_d = i_column_tile * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < d_in
    b_delta = tl.zeros([BLOCK_D], dtype=tl.float32)
    b_changed, b_active = tl.zeros([], dtype=tl.float32), tl.zeros([], dtype=tl.float32)
    for i in range(0, n_slots, BLOCK_SLOTS):
        o_slot = i + tl.arange(0, BLOCK_SLOTS)
        m_slot = o_slot < n_slots * b_finite
        b_f = tl.load(p_latent_values + i_row * (n_slots + n_large) + o_slot, mask=m_slot, other=0.0)
        if p_rank is not None:
            b_rank = tl.load(p_rank + i_row * n_slots + o_slot, mask=m_slot, other=0, cache_modifier=".cg")
            b_f = tl.where(b_rank < k, b_f, 0.0)
        b_slot = tl.load(p_slots + b_plan.to(tl.int64) * n_slots + o_slot, mask=m_slot, other=-1)
        b_sign = tl.load(p_signs + b_plan.to(tl.int64) * n_slots + o_slot, mask=m_slot, other=0)
        b_edited = tl.where(b_sign > 0, b_f + b_shift, tl.maximum(b_f - b_shift, 0.0))
        b_edited = tl.where(b_f > 0, b_edited, 0.0)
        b_change = b_edited - b_f
        p_w = p_columns_W_dec + b_slot.to(tl.int64)[:, None] * d_in + o_d[None, :]
        b_w = tl.load(p_w, mask=(b_change != 0)[:, None] & m_d[None, :], other=0.0)
        b_delta += tl.sum(b_change[:, None] * b_w.to(tl.float32), axis=0)
        b_changed = tl.maximum(b_changed, tl.max(tl.abs(b_change), axis=0))
        b_active = tl.maximum(b_active, tl.max(b_f, axis=0))
        if RECORD:
            if i_column_tile == 0:
                tl.store(p_before + i_row * n_slots + o_slot, b_f, mask=o_slot < n_slots)
                tl.store(p_after + i_row * n_slots + o_slot, b_edited, mask=o_slot < n_slots)

    if p_scale is not None:
        b_delta *= tl.load(p_scale + i_row, mask=b_finite == 1, other=0.0)
    b_h = tl.load(p_h + i_row * d_in + o_d, mask=m_d, other=0.0)
    b_out = rounded(b_h.to(tl.float32) + b_delta, b_h.dtype)
    tl.store(p_out + i_row * d_in + o_d, tl.where(b_changed > 0, b_out, b_h), mask=m_d)

    if i_column_tile == 0:
        if RECORD:
            b_is_invalid = (b_plan >= 0) & (b_finite == 0)
            tl.store(p_maximum + i_row, tl.where(b_is_invalid, float("nan"), tl.where(b_active > 0, b_maximum, 0.0)))
        if p_paths is not None:
            b_path = tl.where(b_required_shift > 0, 4, 2)
            if not RECORD and p_rank is None:
                b_path = tl.where((b_required_shift > 0) & (b_required_shift <= alpha * b_lower_bound), 3, b_path)
            b_path = tl.where(b_plan < 0, 0, tl.where(b_finite == 0, 1, b_path))
            tl.atomic_add(p_paths + b_path, 1, sem="relaxed")
