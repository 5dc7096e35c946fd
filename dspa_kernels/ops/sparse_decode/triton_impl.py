"""`sparse_decode` in Triton: a program writes a few columns of one row, so that even one row keeps the GPU busy."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dspa_kernels.ops.shared.triton_grid import n_programs
from dspa_kernels.ops.shared.triton_tiles import rounded, tree_sum

# Entries at a time. Columns per program: a cache line of bf16, or a sector of it if there are too few programs.
BLOCK_S, WIDE_D, NARROW_D = 64, 64, 16


@triton.jit(do_not_specialize=["n_rows", "n_entries"], do_not_specialize_on_alignment=["p_indices", "p_values"])
def decode_kernel(
    p_indices,
    p_values,
    p_W_dec,
    p_b_dec,
    p_out,
    d_in,
    n_rows,
    n_entries,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    LOG_S: tl.constexpr,
):
    """out_n = b_dec + sum_s values[n, s] W_dec[indices[n, s]] over the entries s with an index >= 0, in fp32."""
    # Consecutive programs take the same columns of all rows, so that their part of W_dec stays in the cache.
    i_row = (tl.program_id(0) % n_rows).to(tl.int64)
    o_d = tl.program_id(0) // n_rows * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < d_in
    o_entry = tl.arange(0, BLOCK_S)
    b_acc = tl.zeros([BLOCK_S, BLOCK_D], dtype=tl.float32)
    for i in range(0, n_entries, BLOCK_S):
        m_entry = o_entry < n_entries - i
        b_index = tl.load(p_indices + i_row * n_entries + i + o_entry, mask=m_entry, other=-1)
        m_entry = b_index >= 0
        b_value = tl.load(p_values + i_row * n_entries + i + o_entry, mask=m_entry, other=0.0).to(tl.float32)
        p_w = p_W_dec + b_index.to(tl.int64)[:, None] * d_in + o_d[None, :]
        b_w = tl.load(p_w, mask=m_entry[:, None] & m_d[None, :], other=0.0).to(tl.float32)
        b_acc += b_value[:, None] * b_w
    # The order of this sum does not depend on the columns per program, and so not on the number of rows.
    b_out = tree_sum(b_acc, LOG_S)
    if p_b_dec is not None:
        b_out += tl.load(p_b_dec + o_d, mask=m_d, other=0.0).to(tl.float32)
    tl.store(p_out + i_row * d_in + o_d, rounded(b_out, p_out.dtype.element_ty), mask=m_d)


def sparse_decode(indices: Tensor, values: Tensor, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    """Return out [N, d_in]."""
    (n_rows, n_entries), d_in = indices.shape, W_dec.shape[1]
    out = W_dec.new_empty(n_rows, d_in)
    if n_rows:
        idle = n_rows * triton.cdiv(d_in, WIDE_D) < n_programs(out.device, per_multiprocessor=2)
        block = NARROW_D if idle else WIDE_D
        decode_kernel[(n_rows * triton.cdiv(d_in, block),)](
            indices.contiguous(),
            values.contiguous(),
            W_dec.contiguous(),
            None if b_dec is None else b_dec.contiguous(),
            out,
            d_in,
            n_rows,
            n_entries,
            BLOCK_D=block,
            BLOCK_S=BLOCK_S,
            LOG_S=BLOCK_S.bit_length() - 1,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return out
