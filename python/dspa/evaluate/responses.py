"""Responses to score, and their log-probabilities under a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from dspa.data.tokens import response_tokens
from dspa.data.triples import Triple, load_triples
from dspa.models.layers import CausalLM, base_model, context_length, device_of


@dataclass(frozen=True)
class Response:
    """Token ids of a prompt, and of a response to it; neither is empty."""

    prompt: list[int]
    ids: list[int]

    def __len__(self) -> int:
        """Tokens of both."""
        return len(self.prompt) + len(self.ids)


def responses_of(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    triples: Iterable[Triple | Mapping[str, Any]] | str | Path,
    max_length: int | None = None,
) -> list[Response]:
    """Both responses of every triple as the model reads them, a chosen one and its rejected one in turn.

    Raises:
        PreferenceError: a bad triple. ValueError: a `max_length` that the model does not have.
    """
    context = context_length(base_model(model))
    limit = context if max_length is None else max_length
    if limit is not None and not 2 <= limit <= (context or limit):
        raise ValueError(f"`max_length` is {limit!r}; accepted: 2 to {context or 'any'}, the model's positions.")
    found = []
    for triple in load_triples(triples):
        prompt, chosen, rejected = response_tokens(triple, tokenizer, max_length=limit)
        found += [Response(prompt, chosen), Response(prompt, rejected)]
    return found


def batches(responses: Sequence[Response], batch_tokens: int) -> Iterator[list[int]]:
    """Numbers of responses that run together, those of like length, the longest first.

    Raises `ValueError` for a budget below one token.
    """
    if batch_tokens < 1:
        raise ValueError(f"`batch_tokens` is {batch_tokens}; accepted: a whole number >= 1.")
    order = sorted(range(len(responses)), key=lambda n: len(responses[n]), reverse=True)
    while order:
        size = max(1, batch_tokens // len(responses[order[0]]))
        yield order[:size]
        order = order[size:]


def padded(model: CausalLM, batch: Sequence[Response]) -> dict[str, Any]:
    """`input_ids` and `attention_mask` [B, T] of prompts with their responses, padded on the right."""
    rows = [torch.tensor(response.prompt + response.ids) for response in batch]
    masks = [torch.ones_like(row) for row in rows]
    device = device_of(model.get_input_embeddings())
    # Zeros behind the end, which nothing before them attends to.
    pad = nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(rows, batch_first=True).to(device),
        "attention_mask": pad(masks, batch_first=True).to(device),
    }


@torch.no_grad()
def log_probabilities(model: CausalLM, batch: Sequence[Response]) -> Tensor:
    """Mean log-probability a token of each response after its prompt, [B] fp32 on the CPU."""
    inputs = padded(model, batch)
    # Logits are wide: none are made of what all of the batch has as prompt.
    first = min(len(response.prompt) for response in batch) - 1
    kept = inputs["input_ids"].shape[1] - first
    logits = model(**inputs, use_cache=False, logits_to_keep=kept).logits
    found = []
    for row, response in zip(logits, batch, strict=True):
        start = len(response.prompt) - 1 - first
        predicted = row[start : start + len(response.ids)].float()
        found.append(-cross_entropy(predicted, torch.tensor(response.ids, device=predicted.device)))
    return torch.stack(found).cpu()
