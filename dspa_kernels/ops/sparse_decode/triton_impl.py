"""`sparse_decode` in Triton: a program writes a few columns of one row, so that one row already fills the chip."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dspa_kernels.ops.shared.triton_grid import n_programs
from dspa_kernels.ops.shared.triton_tiles import rounded, tree_sum

# Places at a time; columns of a program: a cache line of bf16, or a sector of it where that leaves a chip idle.
BLOCK_S, WIDE, NARROW = 64, 64, 16


@triton.jit(do_not_specialize=["n_rows", "n_places"])
def decode_kernel(
    p_indices,
    p_values,
    p_W_dec,
    p_b_dec,
    p_out,
    d_in,
    n_rows,
    n_places,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    LOG_S: tl.constexpr,
):
    """out_n = b_dec + sum_s values[n, s] W_dec[indices[n, s]] over the places s with an index >= 0, in fp32."""
    # Rows go first: what all of them read of W_dec in their columns stays in cache.
    i_row = (tl.program_id(0) % n_rows).to(tl.int64)
    o_d = tl.program_id(0) // n_rows * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < d_in
    o_place = tl.arange(0, BLOCK_S)
    b_acc = tl.zeros([BLOCK_S, BLOCK_D], dtype=tl.float32)
    for i in range(0, n_places, BLOCK_S):
        m_place = o_place < n_places - i
        b_index = tl.load(p_indices + i_row * n_places + i + o_place, mask=m_place, other=-1)
        m_place = b_index >= 0
        b_value = tl.load(p_values + i_row * n_places + i + o_place, mask=m_place, other=0.0).to(tl.float32)
        p_w = p_W_dec + b_index.to(tl.int64)[:, None] * d_in + o_d[None, :]
        b_w = tl.load(p_w, mask=m_place[:, None] & m_d[None, :], other=0.0).to(tl.float32)
        b_acc += b_value[:, None] * b_w
    # For any number of columns a program, and so for any number of rows, in the same order.
    b_out = tree_sum(b_acc, LOG_S)
    if p_b_dec is not None:
        b_out += tl.load(p_b_dec + o_d, mask=m_d, other=0.0).to(tl.float32)
    tl.store(p_out + i_row * d_in + o_d, rounded(b_out, p_out.dtype.element_ty), mask=m_d)


def sparse_decode(indices: Tensor, values: Tensor, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    """out [N, d_in]."""
    (n_rows, n_places), d_in = indices.shape, W_dec.shape[1]
    out = W_dec.new_empty(n_rows, d_in)
    if n_rows:
        idle = n_rows * triton.cdiv(d_in, WIDE) < n_programs(out.device, per_multiprocessor=2)
        block = NARROW if idle else WIDE
        decode_kernel[(n_rows * triton.cdiv(d_in, block),)](
            indices.contiguous(),
            values.contiguous(),
            W_dec.contiguous(),
            None if b_dec is None else b_dec.contiguous(),
            out,
            d_in,
            n_rows,
            n_places,
            BLOCK_D=block,
            BLOCK_S=BLOCK_S,
            LOG_S=BLOCK_S.bit_length() - 1,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return out
