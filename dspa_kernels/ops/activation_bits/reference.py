"""The specification of `activation_bits`, in plain PyTorch."""

from torch import Tensor

from dspa_kernels.formulas import (
    WORD,
    active_latents,
    compute_dtype,
    encoder_tiles,
    n_words,
    normalise,
    pack_latents,
    pre_activations,
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
    for rows, latents in encoder_tiles(len(kept), d_sae, k, WORD):
        pre = pre_activations(hn[rows], encoder_rows[latents], b_enc[latents])
        words = slice(latents.start // WORD, n_words(latents.stop))
        bits[slots[rows], words] = pack_latents(active_latents(pre, threshold[latents], k))
