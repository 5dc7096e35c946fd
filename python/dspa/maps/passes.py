"""The two ways to run a batch of triples: responses from a cache of their prompt, or with it from the start."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from dspa.data.tokens import TokenizedTriple
from dspa.errors import ModelError, refusal
from dspa.maps.batches import Group, Rows
from dspa.models.layers import CausalLM, device_of
from dspa.models.reading import read_layers, takes_cache

# Layers of a cache that hold keys and values of tokens, one row per text, and nothing else.
KEYS_AND_VALUES = (DynamicLayer, DynamicSlidingWindowLayer)


class Passes(ABC):
    """Passes of a model over the prompts and responses of one batch of triples.

    Args:
        model: the model.
        triples: the batch, B triples.
        layer_in: layer whose residuals are read on prompts.
        layer_out: layer whose residuals are read on responses.
        layers: as for `Steering.attach`.
    """

    def __init__(
        self, model: CausalLM, triples: Sequence[TokenizedTriple], layer_in: int, layer_out: int, layers: str | None
    ) -> None:
        self.model, self.triples, self.layers = model, triples, layers
        self.layer_in, self.layer_out = layer_in, layer_out

    @abstractmethod
    def read_prompts(self) -> tuple[Tensor, Rows]:
        """Return the residuals [B, T, d_in] of the prompts at `layer_in`, and which of them are of tokens.

        Raises:
            ModelError: a model that cannot be read, or run in this way.
        """

    @abstractmethod
    def read_responses(self, group: Group) -> tuple[Tensor, Rows]:
        """Return the residuals [N, T, d_in] of N responses at `layer_out`, and which of them are of their tokens."""

    def _read(self, tokens: Tensor, indices: Sequence[int], cache: DynamicCache | None = None, **inputs: Tensor) -> Any:
        device = device_of(self.model.get_input_embeddings())
        inputs = {name: tensor.to(device) for name, tensor in (inputs | {"input_ids": tokens}).items()}
        return read_layers(self.model, indices, self.layers, cache, **inputs)


class SharedPrompts(Passes):
    """Each prompt runs once, and both of its responses continue from copies of its key/value cache.

    Prompts are padded on the left, so that a sliding window of attention reaches back over tokens alone. Responses are
    padded on the right.
    """

    def read_prompts(self) -> tuple[Tensor, Rows]:
        """As for `Passes`, by a pass up to the output layer that fills the cache."""
        ids, text = [t.prompt for t in self.triples], [t.prompt_text for t in self.triples]
        self.prompts, self.cache = Rows.padded(ids, text, left=True), DynamicCache(config=self.model.config)
        mask = self.prompts.mask
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        h = self._read(
            self.prompts.tokens,
            [self.layer_in, self.layer_out],
            self.cache,
            attention_mask=mask,
            position_ids=positions,
        )
        # Transformers knows too little of a model that keeps a state in its layers: they leave the cache empty.
        cached: Sequence[Any] = self.cache.layers[: self.layer_out + 1]
        if any(layer.get_seq_length() != mask.shape[1] for layer in cached):
            got = "a model that keeps no key/value cache of a prompt, from which its responses could continue"
            accepted = "models that fill the cache they take, in all layers"
            raise refusal(ModelError, type(self.model).__name__, got, accepted, "Update transformers.")
        return h[self.layer_in], self.prompts

    def read_responses(self, group: Group) -> tuple[Tensor, Rows]:
        """As for `Passes`, from copies of the prompts' cache."""
        answers, rows = Rows.padded(group.ids, group.text), torch.tensor(group.rows) % len(self.triples)
        before = self.prompts.mask[rows]
        h = self._read(
            answers.tokens,
            [self.layer_out],
            _copy_rows(self.cache, rows),
            attention_mask=torch.cat((before, answers.mask), dim=1),
            position_ids=before.sum(dim=1, keepdim=True) + answers.mask.cumsum(dim=1) - 1,
        )
        return h[self.layer_out], answers


class WholePasses(Passes):
    """Each prompt runs alone up to `layer_in`, and each response with its prompt, without a cache.

    Rows are padded on the right and no mask is passed: no layer of a causal model, recurrent or not, sees what follows
    a token.
    """

    def read_prompts(self) -> tuple[Tensor, Rows]:
        """As for `Passes`."""
        prompts = Rows.padded([t.prompt for t in self.triples], [t.prompt_text for t in self.triples])
        return self._read(prompts.tokens, [self.layer_in])[self.layer_in], prompts

    def read_responses(self, group: Group) -> tuple[Tensor, Rows]:
        """As for `Passes`, from passes over prompts and responses."""
        prompts = [self.triples[row % len(self.triples)].prompt for row in group.rows]
        whole = Rows.padded(
            [prompt + ids for prompt, ids in zip(prompts, group.ids, strict=True)],
            [[True] * len(prompt) + text for prompt, text in zip(prompts, group.text, strict=True)],
        )
        response = torch.arange(whole.mask.shape[1]) >= torch.tensor([[len(prompt)] for prompt in prompts])
        answers = replace(whole, mask=whole.mask * response)
        return self._read(whole.tokens, [self.layer_out])[self.layer_out], answers


def shares_prompts(model: CausalLM) -> bool:
    """Return True if responses can continue, exactly, from copies of the cache of their prompt.

    They cannot where a layer keeps another state than keys and values of tokens, as recurrent layers and convolutions
    do, nor where the model takes no cache of transformers.
    """
    layers = DynamicCache(config=model.config).layers
    return takes_cache(model) and all(type(layer) in KEYS_AND_VALUES for layer in layers)


def _copy_rows(cache: DynamicCache, rows: Tensor) -> DynamicCache:
    """Return a cache of some rows of another, which stays as it is."""
    new = copy.copy(cache)
    new.layers = [copy.copy(layer) for layer in cache.layers]
    new.batch_select_indices(rows)
    return new
