"""`activation_bits` in Triton: the GEMM of `sparse_encode` with an epilogue that packs, so no latent is stored.

Top-k needs whole rows. It stores the keys of a block of rows, which are then packed by one program per row.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dspa_kernels.launch import precision
from dspa_kernels.ops.shared.triton_encode import BLOCK, launch_encode, normalised_rows, row_keys, store_bits
from dspa_kernels.ops.shared.triton_ranks import active_keys, top_k_pivot


@triton.jit(
    do_not_specialize=["width", "n_slots", "n_words", "k"], do_not_specialize_on_alignment=["p_slots", "p_bits"]
)
def pack_row_kernel(p_key, p_slots, p_bits, width, n_slots, n_words, k, BLOCK: tl.constexpr):
    """Bit j of slot_n = 1 if latent j of row n is positive and among its k largest, else 0. One program per row."""
    i_row = tl.program_id(0).to(tl.int64)
    b_slot = tl.load(p_slots + i_row + tl.arange(0, 1))
    if (tl.max(b_slot, axis=0) >= 0) & (tl.max(b_slot, axis=0) < n_slots):
        p_row = p_key + i_row * width
        b_pivot, b_n_ties = top_k_pivot(p_row, width, k, True, BLOCK)
        b_ties_seen = tl.zeros([], dtype=tl.int32)
        for i in range(0, width, BLOCK):
            _, m_active, b_ties_seen = active_keys(p_row, i, width, b_pivot, b_n_ties, b_ties_seen, True, BLOCK)
            store_bits(p_bits, b_slot, m_active[None, :], i, n_words)


def activation_bits(
    h: Tensor,
    encoder_rows: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    k: int,
    normalize: str,
    slots: Tensor,
    bits: Tensor,
) -> None:
    """Write the bits [n_slots, n_words] of `slots`."""
    n_slots, n_words = bits.shape
    slots = slots.contiguous()
    if k:
        # As one sequence in 32 bits, because 64 take registers that a tile of stored latents does not have.
        kept = -(slots < 0).int()
        for rows, keys in row_keys(h, encoder_rows, b_enc, threshold, k, normalize, kept, 1):
            pack_row_kernel[(len(keys),)](
                keys,
                slots[rows],
                bits,
                keys.shape[1],
                n_slots,
                n_words,
                k,
                BLOCK=BLOCK,
                num_warps=8,
                enable_fp_fusion=False,
            )
    elif len(h):
        x, multiply = normalised_rows(h, normalize), precision(h, encoder_rows, normalize)
        launch_encode(x, encoder_rows, b_enc, threshold, k, multiply, slots, n_slots, bits=bits)
