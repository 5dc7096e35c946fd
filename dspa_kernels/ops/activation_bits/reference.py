"""The specification of `activation_bits`, in plain PyTorch."""

from torch import Tensor

from dspa_kernels.formulas import (
    WORD,
    active_latents,
    compute_dtype,
    latent_blocks,
    n_words,
    normalise,
    pack_latents,
    pre_activations,
    row_blocks,
)


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
    """Bit j of bits[slots[n]] = 1 if latent j is active on row n, else 0, for rows n with slots[n] >= 0."""
    d_sae = encoder_rows.shape[0]
    kept = (slots >= 0).nonzero().flatten()
    if not len(kept):
        return
    hn, slots = normalise(h[kept], normalize, compute_dtype(h, encoder_rows)).rows, slots[kept]
    # A rank needs whole rows. A threshold does not, so that each block of the encoder is read once.
    tiles = (
        ((rows, slice(0, d_sae)) for rows in row_blocks(len(kept), d_sae))
        if k
        else ((slice(None), latents) for latents in latent_blocks(len(kept), d_sae, WORD))
    )
    for rows, latents in tiles:
        pre = pre_activations(hn[rows], encoder_rows[latents], b_enc[latents])
        words = slice(latents.start // WORD, n_words(latents.stop))
        bits[slots[rows], words] = pack_latents(active_latents(pre, threshold[latents], k))
