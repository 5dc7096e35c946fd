"""The loop of the references of `activation_counts` and `activation_sums`, in plain PyTorch."""

from collections.abc import Callable

from torch import Tensor

from dspa_kernels.formulas import active_latents, compute_dtype, encoder_tiles, normalise, pre_activations


def add_totals(
    h: Tensor,
    encoder_rows: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    k: int,
    normalize: str,
    sequences: Tensor,
    totals: Tensor,
    added: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """totals[s] += added(pre, active)[n] over the rows n with sequences[n] = s."""
    d_sae = encoder_rows.shape[0]
    counted = (sequences >= 0).nonzero().flatten()
    hn = normalise(h[counted], normalize, compute_dtype(h, encoder_rows)).rows
    sequence = sequences[counted].long()
    for rows, latents in encoder_tiles(len(counted), d_sae, k):
        pre = pre_activations(hn[rows], encoder_rows[latents], b_enc[latents])
        active = active_latents(pre, threshold[latents], k)
        totals[:, latents].index_add_(0, sequence[rows], added(pre, active).to(totals.dtype))
