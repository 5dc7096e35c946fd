"""`activation_counts` in Triton: counts of active rows, added up in the tiles of an encoder."""

from __future__ import annotations

from torch import Tensor

from dspa_kernels.ops.shared.triton_totals import add_totals


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
    """Add to counts [S, d_sae] int32."""
    add_totals(h, encoder_rows, b_enc, threshold, k, normalize, sequences, counts)
