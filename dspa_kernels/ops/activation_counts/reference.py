"""The specification of `activation_counts`, in plain PyTorch."""

import torch
from torch import Tensor

from dspa_kernels.formulas import (
    active_latents,
    compute_dtype,
    encoder_tiles,
    normalise,
    pre_activations,
)


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
    """counts[s, j] += number of rows n with sequences[n] = s on which latent j is active."""
    d_sae = encoder_rows.shape[0]
    counted = (sequences >= 0).nonzero().flatten()
    hn = normalise(h[counted], normalize, compute_dtype(h, encoder_rows)).rows
    sequence = sequences[counted].long()
    for rows, latents in encoder_tiles(len(counted), d_sae, k):
        pre = pre_activations(hn[rows], encoder_rows[latents], b_enc[latents])
        active = active_latents(pre, threshold[latents], k)
        counts[:, latents].index_add_(0, sequence[rows], active.to(torch.int32))
