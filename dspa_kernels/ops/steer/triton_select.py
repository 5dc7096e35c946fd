"""The select phase of `steer`: everything about a row that does not need a pass over the encoder."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from dspa_kernels.formulas import AUGMENT_ALWAYS, RESIDUAL_LIMIT
from dspa_kernels.ops.shared.triton_tiles import gathered_tile, rounded, row_chunk, row_scale

# States of a row in scratch: its plan row, or why it has none.
UNSTEERED, NOT_FINITE = -1, -2
_UNSTEERED, _NOT_FINITE = tl.constexpr(UNSTEERED), tl.constexpr(NOT_FINITE)
# Latents of one item, columns that the preparation of a row reads at a time, and partial summaries that are read at a
# time. A tile has at least BLOCK_G latents, which tensor cores need.
BLOCK_S, BLOCK_C, BLOCK_P, BLOCK_G = 16, 1024, 8, 64
_BLOCK_S, _BLOCK_C, _BLOCK_P = tl.constexpr(BLOCK_S), tl.constexpr(BLOCK_C), tl.constexpr(BLOCK_P)
_BLOCK_G, _RESIDUAL_LIMIT = tl.constexpr(BLOCK_G), tl.constexpr(RESIDUAL_LIMIT)
_AUGMENT_ALWAYS = tl.constexpr(AUGMENT_ALWAYS)


class Summary(NamedTuple):
    """The selected and the large latents of rows.

    required_shift: the smallest alpha M that sets all active selected latents to 0; infinite if one of them is
    augmented, 0 if none is active. min_active: the smallest active selected value. lower_bound: a lower bound on M.
    alpha: the strength, one number or one per row.

    In a plan with strengths, required_shift is infinite where a top-k latent has to be ranked, and 0 elsewhere.
    """

    required_shift: Any
    min_active: Any
    lower_bound: Any
    alpha: Any


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
def strength(alpha, p_alphas, b_plan):
    """Return the strength of each plan row, 0 where there is none; without `p_alphas` the number alpha."""
    b_alpha = alpha
    if p_alphas is not None:
        b_alpha = tl.load(p_alphas + b_plan, mask=b_plan >= 0, other=0.0)
    return b_alpha


@triton.jit
def add_residual(p_h, p_residual, p_total, d_in):
    """total = h + residual for one row, rounded to their dtype. Any thread of the block may read it afterwards."""
    o_k = tl.arange(0, _BLOCK_C)
    for i_k in range(0, d_in, _BLOCK_C):
        m_k = o_k < d_in - i_k
        b_h = tl.load(p_h + i_k + o_k, mask=m_k, other=0.0)
        b_residual = tl.load(p_residual + i_k + o_k, mask=m_k, other=0.0)
        b_total = rounded(b_h.to(tl.float32) + b_residual.to(tl.float32), b_h.dtype)
        tl.store(p_total + i_k + o_k, b_total, mask=m_k)
    tl.debug_barrier()


@triton.jit
def prepare_row(p_h, p_residual, screen, scratch, i_row, b_plan, d_in, n_slots, NORMALIZE: tl.constexpr):
    """state = the plan row, or why there is none; running_max, screen_bound, n_candidates and rank are 0.

    Where needed also total = h + residual, x = n(total), its scale, and norms = ||x - mean||, ||x||.
    """
    tl.store(scratch.running_max + i_row, 0)
    if screen is not None:
        tl.store(scratch.screen_bound + i_row, 0)
        if i_row == 0:
            tl.store(scratch.n_candidates, 0)
    tl.store(scratch.state + i_row, _UNSTEERED)
    if b_plan >= 0:
        p_row = p_h + i_row * d_in
        if p_residual is not None:
            p_row = scratch.total + i_row * d_in
            add_residual(p_h + i_row * d_in, p_residual + i_row * d_in, p_row, d_in)
        b_mean, b_divisor, b_scale = row_scale(p_row, d_in, NORMALIZE, _BLOCK_C)
        o_k = tl.arange(0, _BLOCK_C)
        b_infinite = tl.zeros([_BLOCK_C], dtype=tl.int32)
        b_centered_square, b_square = tl.zeros([_BLOCK_C], dtype=tl.float32), tl.zeros([_BLOCK_C], dtype=tl.float32)
        for i_k in range(0, d_in, _BLOCK_C):
            m_k = o_k < d_in - i_k
            b_h = row_chunk(p_row, i_k, o_k, d_in, b_mean, b_divisor, "none")
            # Comparisons with NaN are false.
            b_infinite |= tl.where(tl.abs(b_h) < _RESIDUAL_LIMIT, 0, 1)
            if NORMALIZE != "none":
                b_h = row_chunk(p_row, i_k, o_k, d_in, b_mean, b_divisor, NORMALIZE)
                tl.store(scratch.x + i_row * d_in + i_k + o_k, b_h, mask=m_k)
            if screen is not None:
                b_centered = tl.where(m_k, b_h - tl.load(screen.mean + i_k + o_k, mask=m_k, other=0.0), 0.0)
                b_centered_square += b_centered * b_centered
                b_square += b_h * b_h
        if NORMALIZE != "none":
            tl.store(scratch.scale + i_row, b_scale)
        if screen is not None:
            # Rounded up, for the relative error of the sums and for squares that underflow.
            tl.store(scratch.norms + 2 * i_row, tl.sqrt_rn(tl.sum(b_centered_square, axis=0)) * 1.001 + 1e-17)
            tl.store(scratch.norms + 2 * i_row + 1, tl.sqrt_rn(tl.sum(b_square, axis=0)) * 1.001 + 1e-17)
        tl.store(scratch.state + i_row, tl.where(tl.max(b_infinite, axis=0) > 0, _NOT_FINITE, b_plan))
        if scratch.rank is not None:
            for i in range(0, n_slots, _BLOCK_S):
                o_slot = i + tl.arange(0, _BLOCK_S)
                tl.store(scratch.rank + i_row * n_slots + o_slot, tl.zeros([_BLOCK_S], tl.int32), mask=o_slot < n_slots)


@triton.jit
def select_latents(
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
    i_item,
    d_in,
    n_rows,
    n_slots,
    n_large,
    TOP_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """f_j = pre_j if pre_j > 0 and pre_j > threshold_j, else 0 (top-k: if pre_j > 0), for BLOCK_S latents j.

    They are large latents for a tile of rows in the first items, and selected latents of one row in the others. Both go
    through the product of the stream, so that a latent has the same bits wherever it is evaluated. Only f of selected
    latents is stored, with what an item contributes to the summary of its rows.
    """
    n_slot_blocks, n_large_blocks = tl.cdiv(n_slots, _BLOCK_S), tl.cdiv(n_large, _BLOCK_S)
    n_large_items = n_large_blocks * tl.cdiv(n_rows, BLOCK_N)
    b_is_large = i_item < n_large_items
    n_row_blocks = tl.maximum(tl.where(b_is_large, n_large_blocks, n_slot_blocks), 1)
    i_of_kind = tl.where(b_is_large, i_item, i_item - n_large_items)
    i_block = i_of_kind % n_row_blocks
    i_row = i_of_kind // n_row_blocks * tl.where(b_is_large, BLOCK_N, 1)
    o_n, o_l = tl.arange(0, BLOCK_N), tl.arange(0, _BLOCK_G)
    o_row = i_row + o_n
    m_row = (o_n < tl.where(b_is_large, BLOCK_N, 1)) & (o_row < n_rows)
    b_plan = plan_rows(p_rows, p_positions, p_start, o_row, m_row)
    # The plan row of the only row of selected latents; below 0 in a tile in which no row is steered.
    i_plan = tl.max(b_plan, axis=0)
    o_j = i_block * _BLOCK_S + o_l
    m_block = o_l < _BLOCK_S
    m_large = m_block & (o_j < tl.where(b_is_large & (i_plan >= 0), n_large, 0))
    m_slot = m_block & (o_j < tl.where(b_is_large | (i_plan < 0), 0, n_slots))
    o_slot = tl.cast(i_plan, tl.int64) * n_slots + o_j
    o_latent = tl.where(m_large, o_j, tl.load(p_slots + o_slot, mask=m_slot, other=-1))
    m_latent = o_latent >= 0

    b_f = tl.zeros([_BLOCK_G, BLOCK_N], dtype=tl.float32)
    if tl.max(m_latent.to(tl.int32), axis=0) > 0:
        b_f = gathered_tile(
            tl.where(b_is_large, encoder.rows, columns.encoder_rows),
            p_x,
            o_latent,
            m_latent,
            i_row,
            m_row & (b_plan >= 0),
            d_in,
            _BLOCK_G,
            BLOCK_N,
            BLOCK_K,
            PRECISION,
        )
        p_b_enc = tl.where(b_is_large, encoder.b_enc, columns.b_enc)
        b_f += tl.load(p_b_enc + o_latent, mask=m_latent, other=0.0)[:, None]
        m_active = m_latent[:, None] & (b_plan >= 0)[None, :] & (b_f > 0)
        if not TOP_K:
            p_threshold = tl.where(b_is_large, encoder.threshold, columns.threshold)
            m_active = m_active & (b_f > tl.load(p_threshold + o_latent, mask=m_latent, other=0.0)[:, None])
        b_f = tl.where(m_active, b_f, 0.0)

    p_partial = scratch.partials + i_block * n_rows + o_row
    i_first = tl.where(b_is_large, 3, 2) * n_slot_blocks
    tl.store(p_partial + i_first * n_rows, tl.max(b_f, axis=0), mask=m_row)
    b_sign = tl.load(p_signs + o_slot, mask=m_slot, other=0)
    if p_strengths is None:
        b_shift_to_0 = tl.where(b_f > 0, tl.where((b_sign > 0)[:, None], float("inf"), b_f), 0.0)
    else:
        # What is added in every row needs no rank of its latent, unless its value is recorded.
        m_ranked = b_sign != (0 if record is not None else _AUGMENT_ALWAYS)
        b_shift_to_0 = tl.where((b_f > 0) & m_ranked[:, None] & TOP_K, float("inf"), 0.0)
    m_own = m_row & (o_n < tl.where(b_is_large, 0, 1))
    tl.store(p_partial, tl.max(b_shift_to_0, axis=0), mask=m_own)
    tl.store(p_partial + n_slot_blocks * n_rows, tl.min(tl.where(b_f > 0, b_f, float("inf")), axis=0), mask=m_own)
    p_value = scratch.selected + o_row.to(tl.int64)[None, :] * n_slots + o_j[:, None]
    m_value = (m_block & (o_j < n_slots))[:, None] & m_own[None, :]
    tl.store(p_value, b_f, mask=m_value)


@triton.jit
def summarise(scratch, alpha, p_alphas, o_row, m_row, n_rows, n_slots, n_large, BLOCK_N: tl.constexpr):
    """Return the state and the `Summary` of BLOCK_N rows; nothing is active in a row that is unsteered or not finite.

    A row's partial summaries are required_shift, min_active and lower_bound of its blocks of slots, then lower_bound of
    the blocks of large latents, [3 n_slot_blocks + n_large_blocks, n_rows].
    """
    n_slot_blocks = tl.cdiv(n_slots, _BLOCK_S)
    n_partials = 3 * n_slot_blocks + tl.cdiv(n_large, _BLOCK_S)
    b_state = tl.load(scratch.state + o_row, mask=m_row, other=_UNSTEERED)
    b_required_shift, b_lower_bound = tl.zeros([BLOCK_N], dtype=tl.float32), tl.zeros([BLOCK_N], dtype=tl.float32)
    b_min_active = b_required_shift + float("inf")
    for i in range(0, n_partials, _BLOCK_P):
        o_partial = i + tl.arange(0, _BLOCK_P)[:, None]
        m_partial = m_row[None, :] & (o_partial < n_partials)
        b_partial = tl.load(scratch.partials + o_partial * n_rows + o_row[None, :], mask=m_partial, other=0.0)
        m_shift, m_bound = o_partial < n_slot_blocks, o_partial >= 2 * n_slot_blocks
        b_required_shift = tl.maximum(b_required_shift, tl.max(tl.where(m_shift, b_partial, 0.0), axis=0))
        b_lower_bound = tl.maximum(b_lower_bound, tl.max(tl.where(m_bound, b_partial, 0.0), axis=0))
        m_active = m_partial & (m_shift == 0) & (m_bound == 0)
        b_min_active = tl.minimum(b_min_active, tl.min(tl.where(m_active, b_partial, float("inf")), axis=0))
    m_finite = b_state >= 0
    b_required_shift, b_lower_bound = tl.where(m_finite, b_required_shift, 0.0), tl.where(m_finite, b_lower_bound, 0.0)
    return b_state, Summary(b_required_shift, b_min_active, b_lower_bound, strength(alpha, p_alphas, b_state))
