"""The specification of `activation_counts`, in plain PyTorch."""

import torch
from torch import Tensor

from dspa_kernels.formulas import (
    active_latents,
    compute_dtype,
    latent_blocks,
    normalise,
    pre_activations,
    row_blocks,
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
    everything = slice(0, d_sae)
    # A rank needs whole rows. A threshold does not, so that each block of the encoder is read once.
    tiles = (
        ((rows, everything) for rows in row_blocks(len(counted), d_sae))
        if k
        else ((slice(None), latents) for latents in latent_blocks(len(counted), d_sae))
    )
    for rows, latents in tiles:
        pre = pre_activations(hn[rows], encoder_rows[latents], b_enc[latents])
        active = active_latents(pre, threshold[latents], k)
        counts[:, latents].index_add_(0, sequence[rows], active.to(torch.int32))
