"""The tail of `steer`: the edits of a row, and the residual that follows from them."""

import triton
import triton.language as tl

from dspa_kernels.formulas import AUGMENT_ALWAYS, CLAMP, CLAMP_ALWAYS, RESIDUAL_LIMIT
from dspa_kernels.ops.shared.triton_grid import prefetch
from dspa_kernels.ops.shared.triton_tiles import rounded
from dspa_kernels.ops.steer.triton_select import NOT_FINITE, UNSTEERED, strength, summarise

# Slots that are processed together, and columns of one item.
BLOCK_SLOTS, BLOCK_D = 16, 1024
_BLOCK_SLOTS, _BLOCK_D = tl.constexpr(BLOCK_SLOTS), tl.constexpr(BLOCK_D)
_RESIDUAL_LIMIT = tl.constexpr(RESIDUAL_LIMIT)
_UNSTEERED, _NOT_FINITE = tl.constexpr(UNSTEERED), tl.constexpr(NOT_FINITE)
_CLAMP, _AUGMENT_ALWAYS = tl.constexpr(CLAMP), tl.constexpr(AUGMENT_ALWAYS)
_CLAMP_ALWAYS = tl.constexpr(CLAMP_ALWAYS)
# Decoder rows are prefetched in lines of 128 bytes.
_LINES = tl.constexpr(BLOCK_D // 32)


@triton.jit
def prefetch_row(columns, p_slots, scratch, i_item, d_in, n_slots):
    """Prefetch what `edit_row` reads of the decoder in an item, if it is an item of a steered row."""
    i_row, i_column_tile = i_item // tl.cdiv(d_in, _BLOCK_D), i_item % tl.cdiv(d_in, _BLOCK_D)
    b_state = tl.load(scratch.state + i_row)
    line: tl.constexpr = 1024 // columns.W_dec.dtype.element_ty.primitive_bitwidth
    o_d = i_column_tile * _BLOCK_D + tl.arange(0, _LINES) * line
    for i in range(0, n_slots, _BLOCK_SLOTS):
        o_slot = i + tl.arange(0, _BLOCK_SLOTS)
        m_slot = o_slot < tl.where(b_state >= 0, n_slots, 0)
        b_f = tl.load(scratch.selected + tl.cast(i_row, tl.int64) * n_slots + o_slot, mask=m_slot, other=0.0)
        b_slot = tl.load(p_slots + tl.cast(b_state, tl.int64) * n_slots + o_slot, mask=m_slot & (b_f > 0), other=0)
        m_d = (o_d < d_in) & (tl.arange(0, _LINES) * line < _BLOCK_D)
        m_line = (m_slot & (b_f > 0))[:, None] & m_d[None, :]
        p_line = columns.W_dec + b_slot.to(tl.int64)[:, None] * d_in + o_d[None, :]
        # Where there is nothing to prefetch, any valid address will do.
        prefetch(tl.where(m_line, p_line.to(tl.int64), scratch.state.to(tl.int64)))


@triton.jit
def moved(b_f, b_sign, b_strength):
    """f' = max(f - s, 0) (ABLATE), max(f + s, 0) (AUGMENT) or s (CLAMP) where f > 0, and f + s or s (ALWAYS)."""
    b_sum = tl.where(b_sign < 0, b_f - b_strength, b_f + b_strength)
    b_sum = tl.where(b_sign == _AUGMENT_ALWAYS, b_sum, tl.maximum(b_sum, 0.0))
    b_moved = tl.where((b_sign == _CLAMP) | (b_sign == _CLAMP_ALWAYS), b_strength, b_sum)
    return tl.where((b_f > 0) | (b_sign >= _AUGMENT_ALWAYS), b_moved, 0.0)


@triton.jit
def edit_row(
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
    i_item,
    alpha,
    p_alphas,
    k,
    d_in,
    n_rows,
    n_slots,
    n_large,
):
    """out = total + scale sum_j (f'_j - f_j) W_dec[j] at BLOCK_D columns; f' = f + alpha M or max(f - alpha M, 0).

    With p_strengths, f' is that of `moved`.

    Without p_out, h = out and residual = 0 in a row that changes, and any other stays as it is.
    The first column tile of a row also records the edits and counts the row in `paths`. Each tile that is not finite
    once edited counts there as not finite.
    """
    n_column_tiles = tl.cdiv(d_in, _BLOCK_D)
    i_row, i_column_tile = (i_item // n_column_tiles).to(tl.int64), i_item % n_column_tiles
    o_d = i_column_tile * _BLOCK_D + tl.arange(0, _BLOCK_D)
    m_d = o_d < d_in
    b_h = tl.load(p_total + i_row * d_in + o_d, mask=m_d, other=0.0)
    # Other programs wrote this, so the load bypasses the L1 cache.
    b_running_max = tl.load(scratch.running_max + i_row, cache_modifier=".cg").to(tl.float32, bitcast=True)
    b_states, summary = summarise(
        scratch, alpha, p_alphas, i_row + tl.arange(0, 1), tl.full([1], True, tl.int1), n_rows, n_slots, n_large, 1
    )
    b_state, b_lower_bound = tl.max(b_states, axis=0), tl.max(summary.lower_bound, axis=0)
    b_required_shift = tl.max(summary.required_shift, axis=0)
    b_maximum = tl.maximum(b_running_max, b_lower_bound)
    if scratch.screen_bound is not None:
        # It is never above a maximum that is known, and settles rows whose maximum is not.
        b_screen_bound = tl.load(scratch.screen_bound + i_row, cache_modifier=".cg")
        b_maximum = tl.maximum(b_maximum, b_screen_bound.to(tl.float32, bitcast=True))
    b_maximum = tl.where(b_state >= 0, b_maximum, 0.0)
    b_alpha = strength(alpha, p_alphas, b_state)
    b_shift = b_alpha * b_maximum

    b_delta = tl.zeros([_BLOCK_D], dtype=tl.float32)
    b_changed, b_active = tl.zeros([], dtype=tl.float32), tl.zeros([], dtype=tl.float32)
    for i in range(0, n_slots, _BLOCK_SLOTS):
        o_slot = i + tl.arange(0, _BLOCK_SLOTS)
        m_slot = o_slot < tl.where(b_state >= 0, n_slots, 0)
        b_f = tl.load(scratch.selected + i_row * n_slots + o_slot, mask=m_slot, other=0.0)
        if scratch.rank is not None:
            b_rank = tl.load(scratch.rank + i_row * n_slots + o_slot, mask=m_slot, other=0, cache_modifier=".cg")
            b_f = tl.where(b_rank < k, b_f, 0.0)
        b_slot = tl.load(p_slots + b_state.to(tl.int64) * n_slots + o_slot, mask=m_slot, other=-1)
        b_sign = tl.load(p_signs + b_state.to(tl.int64) * n_slots + o_slot, mask=m_slot, other=0)
        if p_strengths is None:
            b_edited = tl.where(b_sign > 0, b_f + b_shift, tl.maximum(b_f - b_shift, 0.0))
            b_edited = tl.where(b_f > 0, b_edited, 0.0)
        else:
            b_strength = tl.load(p_strengths + b_state.to(tl.int64) * n_slots + o_slot, mask=m_slot, other=0.0)
            b_edited = moved(b_f, b_sign, b_strength)
        b_change = b_edited - b_f
        p_w = columns.W_dec + b_slot.to(tl.int64)[:, None] * d_in + o_d[None, :]
        b_w = tl.load(p_w, mask=(b_change != 0)[:, None] & m_d[None, :], other=0.0)
        b_delta += tl.sum(b_change[:, None] * b_w.to(tl.float32), axis=0)
        b_changed = tl.maximum(b_changed, tl.max(tl.where(b_change != 0, 1.0, 0.0), axis=0))
        b_active = tl.maximum(b_active, tl.max(b_f, axis=0))
        if record is not None:
            if i_column_tile == 0:
                tl.store(record.before + i_row * n_slots + o_slot, b_f, mask=o_slot < n_slots)
                tl.store(record.after + i_row * n_slots + o_slot, b_edited, mask=o_slot < n_slots)

    if scratch.scale is not None:
        b_delta *= tl.load(scratch.scale + i_row, mask=b_state >= 0, other=0.0)
    b_out = rounded(b_h.to(tl.float32) + b_delta, b_h.dtype)
    if p_out is not None:
        tl.store(p_out + i_row * d_in + o_d, tl.where(b_changed > 0, b_out, b_h), mask=m_d)
    elif b_changed > 0:
        tl.store(p_h + i_row * d_in + o_d, b_out, mask=m_d)
        if p_residual is not None:
            tl.store(p_residual + i_row * d_in + o_d, tl.zeros_like(b_h), mask=m_d)
    if p_paths is not None:
        # Comparisons with NaN are false.
        m_finite = (tl.abs(b_out.to(tl.float32)) < _RESIDUAL_LIMIT) | (m_d == 0)
        if (b_changed > 0) & (tl.min(m_finite.to(tl.int32), axis=0) == 0):
            tl.atomic_add(p_paths + 1, 1, sem="relaxed")

    if i_column_tile == 0:
        if record is not None:
            b_recorded = tl.where(b_active > 0, b_maximum, 0.0)
            tl.store(record.maximum + i_row, tl.where(b_state == _NOT_FINITE, float("nan"), b_recorded))
        if p_paths is not None:
            b_path = tl.where(b_required_shift > 0, 4, 2)
            if p_strengths is not None:
                b_path = tl.where((b_required_shift == 0) & ((b_active > 0) | (b_changed > 0)), 3, b_path)
            elif record is None and scratch.rank is None:
                b_path = tl.where((b_required_shift > 0) & (b_required_shift <= b_alpha * b_lower_bound), 3, b_path)
            b_path = tl.where(b_state == _UNSTEERED, 0, tl.where(b_state == _NOT_FINITE, 1, b_path))
            tl.atomic_add(p_paths + b_path, 1, sem="relaxed")
