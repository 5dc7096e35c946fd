"""Meanings of latents: the tokens that they promote."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from dspa.data.token_texts import token_text
from dspa.errors import SAEError, listed, refusal
from dspa.models.logit_lens import LogitLens
from dspa.saes.frozen import FrozenSAE
from dspa.saes.placement import check_made_for

# Tokens that are recorded and shown per latent.
N_TOKENS = 5


def top_tokens(
    sae: FrozenSAE,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    latents: Iterable[int] | None = None,
    *,
    n: int = N_TOKENS,
    suppressed: bool = False,
    layers: str | None = None,
    model_name: str | None = None,
    progress: bool = False,
) -> dict[int, list[str]]:
    """Return the tokens that latents promote most when they are active, by the logit lens (`LogitLens`).

    It looks at the decoder rows alone, needs no text, and says most of late layers. Of an early layer, or of what makes
    a latent active, `dspa.top_contexts` says more.

    Args:
        sae: the SAE.
        model: its model.
        tokenizer: the model's tokenizer.
        latents: latents of the SAE. Default: all.
        n: number of tokens per latent.
        suppressed: return the tokens that the latents suppress most, instead.
        layers: as for `Steering.attach`.
        model_name: as for `Steering.attach`.
        progress: show a bar.

    Returns:
        Texts of tokens by latent, the most promoted first.

    Raises:
        SAEError: a latent that the SAE does not have.
        ModelError: an SAE that does not fit the model, or a model whose final norm or head cannot be read.
        ValueError: an invalid `n`.
    """
    check_made_for("sae", sae, model, model_name)
    wanted, lens = checked_latents(latents, sae), LogitLens(model, layers)
    vocabulary = min(len(tokenizer), len(lens.unembedding))
    if not 1 <= n <= vocabulary:
        raise refusal(ValueError, "`n`", n, f"1 to {vocabulary}, the number of tokens")
    directions = sae.W_dec[torch.tensor(wanted, dtype=torch.long, device=sae.device)]
    ids = lens.top(-directions if suppressed else directions, n, vocabulary, progress=progress).tolist()
    texts = {token: token_text(tokenizer, token) for token in {token for row in ids for token in row}}
    return {latent: [texts[token] for token in row] for latent, row in zip(wanted, ids, strict=True)}


def checked_latents(latents: Iterable[int] | None, sae: FrozenSAE) -> list[int]:
    """Return latents, each once; raise `SAEError` for those that the SAE does not have."""
    wanted = list(dict.fromkeys(range(sae.d_sae) if latents is None else map(int, latents)))
    if outside := [latent for latent in wanted if not 0 <= latent < sae.d_sae]:
        raise refusal(SAEError, "`latents`", listed(outside), f"0 to {sae.d_sae - 1}, those of {sae!r}")
    return wanted
