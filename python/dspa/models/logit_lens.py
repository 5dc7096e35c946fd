"""The logit lens: the tokens that a direction of the residual stream promotes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dspa.errors import ModelError, refusal
from dspa.models.layers import CausalLM, base_model, find_layers
from dspa_kernels import product

# Logits of this many directions and tokens are held at once.
DIRECTIONS_PER_BLOCK = 1024
TOKENS_PER_BLOCK = 8192


class LogitLens:
    """The end of a model as a linear map from the residual stream to logits.

    A small step along a direction d of a residual h changes its logits by

        W_U (gamma * d) / s(h)

    as long as s(h), by which the final norm divides, is held fixed. gamma is the weight of that norm (1 + w in Gemma),
    and for LayerNorm d is taken less its mean. s(h), a bias of the head, a cap or scale of logits and the centring of
    `W_U` over the vocabulary do not change the order of the tokens, and are left out. This is nostalgebraist's logit
    lens ("interpreting GPT: the logit lens", 2020), and with the rows of an SAE's decoder as directions the order of
    Neuronpedia's "positive logits". It ignores all layers in between, so that it says little of early ones.

    Args:
        model: a transformers causal language model, or one in a PEFT wrapper.
        layers: dotted path of the list of decoder layers, for an unknown architecture.

    Attributes:
        gamma: weight of the final norm, [d_in] fp32.
        centered: True if the norm takes out the mean.
        unembedding: `W_U` [vocabulary, d_in], the weight of the language-model head.

    Raises:
        ModelError: there is no norm beside the decoder layers, or no head whose weight can be read.
    """

    def __init__(self, model: nn.Module, layers: str | None = None) -> None:
        inner = base_model(model)
        self.unembedding = _unembedding(inner)
        norm, W_U = final_norm(inner, layers), self.unembedding
        ones = torch.ones(W_U.shape[1], device=W_U.device, dtype=next(norm.parameters(), W_U).dtype)
        signs = ones.cumsum(0) % 2 * 2 - 1
        # Signs have mean 0 and size 1, so a norm multiplies them by its weight. LayerNorm makes nothing of ones. In a
        # difference, a bias cancels.
        probes = torch.stack((signs, ones))[None]
        with torch.no_grad():
            signs_out, ones_out = ((norm(probes) - norm(-probes)) / 2)[0].to(W_U.device, torch.float32)
        self.gamma, self.centered = signs_out * signs, not bool(ones_out.any())

    @torch.no_grad()
    def top(self, directions: Tensor, n: int, vocabulary: int, *, progress: bool = False) -> Tensor:
        """Return the ids of the n tokens that directions promote most, [L, n], the most promoted first.

        The logits are computed in the dtype of the head, as the model computes its own.

        Args:
            directions: [L, d_in].
            n: number of tokens.
            vocabulary: number of tokens to choose from: a head may have rows beyond those of the tokenizer.
            progress: show a bar.
        """
        ids = torch.empty(len(directions), n, dtype=torch.long)
        with tqdm(total=len(directions), unit="latent", desc="logit lens", leave=False, disable=not progress) as bar:
            for start in range(0, len(directions), DIRECTIONS_PER_BLOCK):
                block = slice(start, start + DIRECTIONS_PER_BLOCK)
                ids[block] = self._top_of(directions[block], n, vocabulary).cpu()
                bar.update(len(ids[block]))
        return ids

    def _top_of(self, directions: Tensor, n: int, vocabulary: int) -> Tensor:
        """Return the same for one block of directions, keeping the largest logits of the tokens so far."""
        d = directions.to(self.gamma)
        if self.centered:
            d = d - d.mean(dim=1, keepdim=True)
        d = (d * self.gamma).to(self.unembedding.dtype)
        values, ids = d.new_empty(len(d), 0), torch.empty(len(d), 0, dtype=torch.long, device=d.device)
        for start in range(0, vocabulary, TOKENS_PER_BLOCK):
            logits = product(d, self.unembedding[start : min(start + TOKENS_PER_BLOCK, vocabulary)].T)
            largest, places = logits.topk(min(n, logits.shape[1]), dim=1)
            values, ids = torch.cat((values, largest), dim=1), torch.cat((ids, places + start), dim=1)
            values, kept = values.topk(min(n, values.shape[1]), dim=1)
            ids = ids.gather(1, kept)
        return ids


def final_norm(model: CausalLM, layers: str | None = None) -> nn.Module:
    """Return the norm between the last decoder layer and the head: the last norm beside the list of layers.

    Args:
        model: a transformers causal language model.
        layers: dotted path of the list of decoder layers, for an unknown architecture.

    Raises:
        ModelError: there is none.
    """
    stack = find_layers(model, layers)
    owner: nn.Module = next(module for module in model.modules() if any(child is stack for child in module.children()))
    norms = [child for child in owner.children() if "norm" in type(child).__name__.lower()]
    if not norms:
        beside = ", ".join(f"{name} ({type(child).__name__})" for name, child in owner.named_children())
        what = f"The final norm of {type(model).__name__}"
        raise refusal(ModelError, what, "not known", "a norm beside the decoder layers", f"There are: {beside}.")
    return norms[-1]


def _unembedding(model: CausalLM) -> Tensor:
    head: Any = model.get_output_embeddings()
    weight: Any = getattr(head, "weight", None)
    if type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point() or weight.is_meta:
        what, got = f"The language-model head of {type(model).__name__}", type(weight).__name__
        accepted = "a layer whose weight can be read, neither quantized nor offloaded"
        raise refusal(ModelError, what, f"a {type(head).__name__} with a weight of type {got}", accepted)
    unembedding: Tensor = weight.detach()
    return unembedding
