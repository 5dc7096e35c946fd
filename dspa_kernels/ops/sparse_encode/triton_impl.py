"""`sparse_encode` in Triton: a GEMM for a block of rows, then one program per row that compacts its active latents.

`activation_counts` and `activation_sums` use the same GEMM and the same top-k selection.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dspa_kernels.ops.shared.triton_encode import BLOCK, row_keys
from dspa_kernels.ops.shared.triton_ranks import active_keys, top_k_pivot


@triton.jit(do_not_specialize=["k", "capacity"], do_not_specialize_on_alignment=["p_indices", "p_values", "p_counts"])
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
    """Compact the active latents of a row: indices, values in order of index, padded with -1 and 0; counts.

    All values are NaN if there are more than `capacity` or if h is not finite. One program per row.
    """
    i_row = tl.program_id(0).to(tl.int64)
    p_row, p_index, p_value = p_key + i_row * width, p_indices + i_row * capacity, p_values + i_row * capacity
    b_pivot, b_n_ties = top_k_pivot(p_row, width, k, TOP_K, BLOCK)
    b_n_active, b_ties_seen = tl.zeros([], dtype=tl.int32), tl.zeros([], dtype=tl.int32)
    o = tl.arange(0, BLOCK)
    for i in range(0, width, BLOCK):
        b_key, m_active, b_ties_seen = active_keys(p_row, i, width, b_pivot, b_n_ties, b_ties_seen, TOP_K, BLOCK)
        b_position = tl.cumsum(m_active.to(tl.int32), axis=0) + b_n_active - 1
        m_fits = m_active & (b_position < capacity)
        tl.store(p_index + b_position, i + o, mask=m_fits)
        tl.store(p_value + b_position, b_key.to(tl.float32, bitcast=True), mask=m_fits)
        b_n_active += tl.sum(m_active.to(tl.int32), axis=0)
    tl.store(p_counts + i_row, b_n_active)

    b_infinite = tl.zeros([BLOCK], dtype=tl.int32)
    for i in range(0, d_in, BLOCK):
        b_h = tl.load(p_h + i_row * d_in + i + o, mask=o < d_in - i, other=0.0).to(tl.float32)
        # Comparisons with NaN are false.
        b_infinite |= tl.where(tl.abs(b_h) < float("inf"), 0, 1)
    b_is_invalid = (b_n_active > capacity) | (tl.max(b_infinite, axis=0) > 0)
    b_fill = tl.where(b_is_invalid, float("nan"), 0.0)
    b_n_kept = tl.where(b_is_invalid, 0, b_n_active)
    # Other threads than those that now overwrite the values of an invalid row have stored them.
    tl.debug_barrier()
    for i in range(0, capacity, BLOCK):
        m_entry = o < capacity - i
        tl.store(p_index + i + o, -1, mask=m_entry & (i + o >= b_n_active))
        tl.store(p_value + i + o, b_fill, mask=m_entry & (i + o >= b_n_kept))


def sparse_encode(
    h: Tensor, encoder_rows: Tensor, b_enc: Tensor, threshold: Tensor, k: int, normalize: str, capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return indices and values [N, capacity] and counts [N]."""
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
