"""`activation_counts` in Triton: the GEMM of `sparse_encode` with an epilogue that counts, so no latent is stored.

Top-k needs whole rows. It stores the keys of a block of rows, which are then counted by one program per row.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dspa_kernels.launch import precision
from dspa_kernels.ops.shared.triton_encode import BLOCK, launch_encode, normalised_rows, row_keys
from dspa_kernels.ops.shared.triton_ranks import active_keys, top_k_pivot


@triton.jit(do_not_specialize=["d_sae", "n_sequences", "k"], do_not_specialize_on_alignment=["p_sequences"])
def count_row_kernel(p_key, p_sequences, p_counts, d_sae, width, n_sequences, k, BLOCK: tl.constexpr):
    """counts_sj += 1 if latent j of a row of sequence s is positive and among its k largest. One program per row."""
    i_row = tl.program_id(0).to(tl.int64)
    i_sequence = tl.load(p_sequences + i_row)
    if (i_sequence >= 0) & (i_sequence < n_sequences):
        p_row, p_count = p_key + i_row * width, p_counts + i_sequence.to(tl.int64) * d_sae
        b_pivot, b_n_ties = top_k_pivot(p_row, width, k, True, BLOCK)
        b_ties_seen = tl.zeros([], dtype=tl.int32)
        o_latent = tl.arange(0, BLOCK)
        for i in range(0, width, BLOCK):
            _, m_active, b_ties_seen = active_keys(p_row, i, width, b_pivot, b_n_ties, b_ties_seen, True, BLOCK)
            tl.atomic_add(p_count + i + o_latent, 1, mask=m_active, sem="relaxed")


def activation_counts(
    h: Tensor,
    encoder_rows: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    k: int,
    normalize: str,
    sequences: Tensor,
    counts: Tensor,
) -> None:
    """Add to counts [S, d_sae]."""
    n_sequences, d_sae = counts.shape
    sequences = sequences.contiguous()
    if k:
        for rows, keys in row_keys(h, encoder_rows, b_enc, threshold, k, normalize, sequences, n_sequences):
            count_row_kernel[(len(keys),)](
                keys,
                sequences[rows],
                counts,
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
        launch_encode(x, encoder_rows, b_enc, threshold, k, multiply, sequences, n_sequences, counts=counts)
