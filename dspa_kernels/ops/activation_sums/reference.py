"""The specification of `activation_sums`, in plain PyTorch."""

import torch
from torch import Tensor

from dspa_kernels.ops.shared.reference import add_totals


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
    """sums[s, j] += latent j of the rows n with sequences[n] = s on which it is active."""
    add_totals(h, encoder_rows, b_enc, threshold, k, normalize, sequences, sums, _latents)


def _latents(pre: Tensor, active: Tensor) -> Tensor:
    return torch.where(active, pre, 0)
