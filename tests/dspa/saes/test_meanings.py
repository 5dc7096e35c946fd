"""`dspa.top_tokens`, against the head of the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dspa
from dspa import ModelError, SAEError
from dspa.testing import D_SAE_OUT, ENGLISH, L_OUT, make_model, make_sae, word_tokenizer

LATENTS = [3, 90, 17, 64]
N_WORDS = 3 + len(ENGLISH)


@pytest.fixture(scope="module")
def model() -> Any:
    """A model whose final norm has a weight of its own."""
    model = make_model("gemma2")
    torch.nn.init.normal_(model.model.norm.weight, generator=torch.Generator().manual_seed(0))
    return model


@torch.no_grad()
def test_tokens_are_those_of_decoder_rows(model: Any, sae_out: dspa.FrozenSAE) -> None:
    """The head of the model applied to a row times (1 + w), as in Gemma; the head has more rows than words."""
    tokenizer = word_tokenizer()
    logits = model.lm_head(sae_out.W_dec * (1 + model.model.norm.weight))[:, :N_WORDS]
    words = ["<pad>", "<bos>", "<unk>", *ENGLISH]
    tokens = dspa.top_tokens(sae_out, model, tokenizer)
    assert list(tokens) == list(range(D_SAE_OUT))
    for latent, texts in tokens.items():
        assert texts == [words[i] for i in logits[latent].argsort(descending=True)[:5]]
    assert dspa.top_tokens(sae_out, model, tokenizer, LATENTS, n=2) == {j: tokens[j][:2] for j in LATENTS}
    lowest = dspa.top_tokens(sae_out, model, tokenizer, torch.tensor([90, 90]), n=3, suppressed=True)
    assert lowest == {90: [words[i] for i in logits[90].argsort()[:3]]}
    assert dspa.top_tokens(sae_out, model, tokenizer, []) == {}


def test_tokens_of_bad_arguments(model: Any, sae_out: dspa.FrozenSAE) -> None:
    with pytest.raises(SAEError, match=r"`latents` is -1, 128; accepted: 0 to 127"):
        dspa.top_tokens(sae_out, model, word_tokenizer(), [5, -1, 128])
    for n in (0, N_WORDS + 1):
        with pytest.raises(ValueError, match=f"`n` is {n}; accepted: 1 to {N_WORDS}"):
            dspa.top_tokens(sae_out, model, word_tokenizer(), n=n)
    with pytest.raises(ModelError, match="hidden size"):
        dspa.top_tokens(make_sae(L_OUT, 8, d_in=24), model, word_tokenizer())
