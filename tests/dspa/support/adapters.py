"""A tiny model with an SAE and an adapter that matters, and triples of many lengths."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dspa.evaluate.responses import Response
from dspa.fsrl import FSRLAdapter, FSRLConfig
from dspa.models.reading import read_layers
from dspa.saes.frozen import FrozenSAE
from dspa.testing import D_SAE_OUT, ENGLISH, L_OUT, make_sae, word_tokenizer

END = "bird"
# Latents that `acting_adapter` never moves.
UNUSED = 20


def words(n: int, length: int) -> str:
    g = torch.Generator().manual_seed(n)
    return " ".join(ENGLISH[i] for i in torch.randint(len(ENGLISH) - 1, (length,), generator=g).tolist())


TRIPLES = [
    {
        "prompt": words(n, 2 + n * 5 % 13),
        "chosen": f" {words(n + 100, 2 + n * 7 % 17)}",
        "rejected": f" {words(n + 200, 2 + n * 3 % 11)}",
    }
    for n in range(14)
]


def ending_tokenizer() -> PreTrainedTokenizerFast:
    """A `word_tokenizer` with an end token, the last word of its vocabulary."""
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"eos_token": END})
    return tokenizer


def hidden_states(model: PreTrainedModel, responses: list[Response]) -> torch.Tensor:
    """Residuals [tokens, d_in] of responses that run alone."""
    rows = []
    for response in responses:
        h = read_layers(model, [L_OUT], input_ids=torch.tensor([response.prompt + response.ids]))[L_OUT][0]
        rows.append(h[len(response.prompt) :])
    return torch.cat(rows)


def make_adapter(sae: FrozenSAE, activation: str = "soft_threshold", *, seed: int = 0) -> FSRLAdapter:
    """An adapter that moves about half of the latents of a random model, far enough to change its tokens."""
    adapter = FSRLAdapter(sae, FSRLConfig(activation))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        adapter.W_a.copy_(torch.randn(adapter.W_a.shape, generator=g))
        adapter.b_a.copy_(torch.randn(adapter.b_a.shape, generator=g))
        for name, parameter in adapter.named_parameters():
            if "threshold" in name:
                parameter.copy_(torch.rand(parameter.shape, generator=g))
    return adapter.requires_grad_(False).eval()


def acting_adapter(
    model: PreTrainedModel, responses: list[Response], sae: FrozenSAE | None = None, *, unused: int = UNUSED
) -> FSRLAdapter:
    """An adapter that moves latents on most to few tokens of `responses` by index, and the last `unused` on none."""
    adapter = FSRLAdapter(sae if sae is not None else make_sae(L_OUT, D_SAE_OUT, seed=2))
    g = torch.Generator().manual_seed(3)
    h = hidden_states(model, responses)
    with torch.no_grad():
        adapter.W_a.copy_(torch.randn(adapter.W_a.shape, generator=g) / h.norm(dim=1).mean())
        u = (h @ adapter.W_a.T).abs()
        wanted = 0.9 * torch.exp(-torch.arange(adapter.sae.d_sae) / 25)
        levels = torch.stack([column.quantile(1 - share) for column, share in zip(u.T, wanted, strict=True)])
        levels[-unused:] = 10 * u.max()
        adapter.threshold.copy_(levels)
    return adapter.requires_grad_(False).eval()
