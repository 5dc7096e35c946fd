"""`sparse_encode` in Triton: a GEMM that keeps what may be active, some rows at a time, then a program a row.

GEMM and ranks are also those of `activation_counts`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dspa_kernels.ops.shared.triton_encode import BLOCK, row_keys
from dspa_kernels.ops.shared.triton_ranks import active_block, rank_cut


@triton.jit(do_not_specialize=["k", "capacity"])
def compact_kernel(
    p_key,
    p_h,
    p_indices,
    p_values,
    p_counts,
    d_in,
    width,
    k,
    capacity,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """indices, values = the active latents of a row in order of their index, then -1 and 0; counts = how many.

    All values are NaN where they do not fit or h is not finite. A program a row.
    """
    i_row = tl.program_id(0).to(tl.int64)
    p_row, p_index, p_value = p_key + i_row * width, p_indices + i_row * capacity, p_values + i_row * capacity
    b_level, b_room = rank_cut(p_row, width, k, TOP_K, BLOCK)
    b_taken, b_ties = tl.zeros([], dtype=tl.int32), tl.zeros([], dtype=tl.int32)
    o = tl.arange(0, BLOCK)
    for i in range(0, width, BLOCK):
        b_key, m_active, b_ties = active_block(p_row, i, width, b_level, b_room, b_ties, TOP_K, BLOCK)
        b_place = tl.cumsum(m_active.to(tl.int32), axis=0) + b_taken - 1
        m_fits = m_active & (b_place < capacity)
        tl.store(p_index + b_place, i + o, mask=m_fits)
        tl.store(p_value + b_place, b_key.to(tl.float32, bitcast=True), mask=m_fits)
        b_taken += tl.sum(m_active.to(tl.int32), axis=0)
    tl.store(p_counts + i_row, b_taken)

    b_infinite = tl.zeros([BLOCK], dtype=tl.int32)
    for i in range(0, d_in, BLOCK):
        b_h = tl.load(p_h + i_row * d_in + i + o, mask=o < d_in - i, other=0.0).to(tl.float32)
        # A NaN compares false.
        b_infinite |= tl.where(tl.abs(b_h) < float("inf"), 0, 1)
    b_lost = (b_taken > capacity) | (tl.max(b_infinite, axis=0) > 0)
    b_rest = tl.where(b_lost, float("nan"), 0.0)
    b_kept = tl.where(b_lost, 0, b_taken)
    # The values of a lost row were stored by other threads than those that now take them back.
    tl.debug_barrier()
    for i in range(0, capacity, BLOCK):
        m_place = o < capacity - i
        tl.store(p_index + i + o, -1, mask=m_place & (i + o >= b_taken))
        tl.store(p_value + i + o, b_rest, mask=m_place & (i + o >= b_kept))


def sparse_encode(
    h: Tensor, encoder_rows: Tensor, b_enc: Tensor, threshold: Tensor, k: int, normalize: str, capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    """indices, values [N, capacity] and counts [N]."""
    h = h.contiguous()
    indices = h.new_empty(len(h), capacity, dtype=torch.int32)
    values = h.new_empty(len(h), capacity, dtype=torch.float32)
    counts = h.new_empty(len(h), dtype=torch.int32)
    for rows, keys in row_keys(h, encoder_rows, b_enc, threshold, k, normalize):
        compact_kernel[(len(keys),)](
            keys,
            h[rows],
            indices[rows],
            values[rows],
            counts[rows],
            h.shape[1],
            keys.shape[1],
            k,
            capacity,
            TOP_K=k > 0,
            BLOCK=BLOCK,
            num_warps=8,
            enable_fp_fusion=False,
        )
    return indices, values, counts
