"""`activation_sums` in Triton: latents, added up in the tiles of an encoder."""

from __future__ import annotations

from torch import Tensor

from dspa_kernels.ops.shared.triton_totals import add_totals


def activation_sums(
    h: Tensor,
    encoder_rows: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    k: int,
    normalize: str,
    sequences: Tensor,
    sums: Tensor,
) -> None:
    """Add to sums [S, d_sae] fp32."""
    add_totals(h, encoder_rows, b_enc, threshold, k, normalize, sequences, sums)
