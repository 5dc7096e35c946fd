"""`activation_counts` and `activation_sums` in Triton: the GEMM of `sparse_encode` with an epilogue that adds up.

No latent is stored. Top-k needs whole rows: it stores the keys of a block of rows, which are then added up by one
program per row.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dspa_kernels.launch import precision
from dspa_kernels.ops.shared.triton_encode import BLOCK, launch_encode, normalised_rows, row_keys
from dspa_kernels.ops.shared.triton_ranks import active_keys, top_k_pivot


@triton.jit(do_not_specialize=["d_sae", "n_sequences", "k"], do_not_specialize_on_alignment=["p_sequences"])
def add_row_kernel(p_key, p_sequences, p_totals, d_sae, width, n_sequences, k, BLOCK: tl.constexpr):
    """totals_sj += 1, or f_nj in fp32, if latent j of a row n of sequence s is positive and among its k largest.

    One program per row.
    """
    i_row = tl.program_id(0).to(tl.int64)
    i_sequence = tl.load(p_sequences + i_row)
    if (i_sequence >= 0) & (i_sequence < n_sequences):
        p_row, p_total = p_key + i_row * width, p_totals + i_sequence.to(tl.int64) * d_sae
        b_pivot, b_n_ties = top_k_pivot(p_row, width, k, True, BLOCK)
        b_ties_seen = tl.zeros([], dtype=tl.int32)
        o_latent = tl.arange(0, BLOCK)
        for i in range(0, width, BLOCK):
            b_key, m_active, b_ties_seen = active_keys(p_row, i, width, b_pivot, b_n_ties, b_ties_seen, True, BLOCK)
            b_added = tl.full([BLOCK], 1, dtype=tl.int32)
            if p_totals.dtype.element_ty == tl.float32:
                b_added = b_key.to(tl.float32, bitcast=True)
            tl.atomic_add(p_total + i + o_latent, b_added, mask=m_active, sem="relaxed")


def add_totals(
    h: Tensor,
    encoder_rows: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    k: int,
    normalize: str,
    sequences: Tensor,
    totals: Tensor,
) -> None:
    """Add to totals [S, d_sae]: numbers of active rows in int32, or latents in fp32."""
    n_sequences, d_sae = totals.shape
    sequences = sequences.contiguous()
    if k:
        for rows, keys in row_keys(h, encoder_rows, b_enc, threshold, k, normalize, sequences, n_sequences):
            add_row_kernel[(len(keys),)](
                keys,
                sequences[rows],
                totals,
                d_sae,
                keys.shape[1],
                n_sequences,
                k,
                BLOCK=BLOCK,
                num_warps=8,
                enable_fp_fusion=False,
            )
    elif len(h):
        x, multiply = normalised_rows(h, normalize), precision(h, encoder_rows, normalize)
        launch_encode(x, encoder_rows, b_enc, threshold, k, multiply, sequences, n_sequences, totals=totals)
