"""Responses to score, and their log-probabilities under a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from dspa.data.tokens import response_tokens
from dspa.data.triples import Example, Source, load_triples
from dspa.errors import refusal
from dspa.models.attachment import Attachment, raw_logits
from dspa.models.layers import CausalLM, base_model, context_length, device_of
from dspa.schemas import PositiveInt, check


@dataclass(frozen=True)
class Response:
    """Token ids of a prompt and of a response to it; neither is empty."""

    prompt: list[int]
    ids: list[int]

    def __len__(self) -> int:
        """Return the number of tokens of both."""
        return len(self.prompt) + len(self.ids)


def responses_of(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    triples: Source,
    max_length: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[Response]:
    """Return both responses of every triple as the model reads them, chosen and rejected in turn.

    The triples are tokenized by `response_tokens`, which `chat_template_kwargs` are for.

    Raises:
        PreferenceError: a bad triple.
        ValueError: a `max_length` outside the model's positions.
    """
    return list(
        chain(*responses_of_examples(model, tokenizer, load_triples(triples), max_length, chat_template_kwargs))
    )


def responses_of_examples(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Iterable[Example],
    max_length: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[list[Response]]:
    """Return the responses of each triple or ranking as `responses_of` does."""
    context = context_length(base_model(model))
    limit = context if max_length is None else max_length
    if limit is not None and not 2 <= limit <= (context or limit):
        raise refusal(ValueError, "`max_length`", repr(limit), f"2 to {context or 'any'}, the model's positions")
    responses = []
    for example in examples:
        prompt, *answers = response_tokens(
            example, tokenizer, max_length=limit, chat_template_kwargs=chat_template_kwargs
        )
        responses.append([Response(prompt, ids) for ids in answers])
    return responses


def batches(responses: Sequence[Response], batch_tokens: int) -> Iterator[list[int]]:
    """Yield the indices of responses that run together: those of similar length, the longest first.

    Raises:
        ValueError: a `batch_tokens` below 1.
    """
    check(PositiveInt, batch_tokens, ValueError, "`batch_tokens`")
    order = sorted(range(len(responses)), key=lambda n: len(responses[n]), reverse=True)
    while order:
        size = max(1, batch_tokens // len(responses[order[0]]))
        yield order[:size]
        order = order[size:]


def padded(model: CausalLM, batch: Sequence[Response]) -> dict[str, Any]:
    """Return `input_ids` and `attention_mask` [B, T] of prompts with their responses, padded on the right."""
    rows = [torch.tensor(response.prompt + response.ids) for response in batch]
    masks = [torch.ones_like(row) for row in rows]
    device = device_of(model.get_input_embeddings())
    # Zeros after the end: no token before them attends to them.
    pad = nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(rows, batch_first=True).to(device),
        "attention_mask": pad(masks, batch_first=True).to(device),
    }


@contextmanager
def teacher_forced(model: CausalLM, batch: Sequence[Response]) -> Iterator[None]:
    """Let all that is attached to the model act on a pass over `padded(model, batch)`, within a `with` block."""
    starts = [len(response.prompt) for response in batch]
    with ExitStack() as acting:
        for attachable in Attachment.of(model).attached:
            acting.enter_context(attachable.responses(starts))
        yield


@torch.no_grad()
def log_probabilities(model: CausalLM, batch: Sequence[Response]) -> Tensor:
    """Return the mean log-probability per token of each response after its prompt, [B] fp32 on the CPU.

    All that is attached to the model acts on them. Where some of it is `stepwise`, they are read token by token.
    """
    if any(attachable.stepwise and attachable.enabled for attachable in Attachment.of(model).attached):
        return _stepwise_log_probabilities(model, batch)
    inputs = padded(model, batch)
    # A row of logits is as wide as the vocabulary: none are computed where all rows of the batch are prompt.
    first = min(len(response.prompt) for response in batch) - 1
    kept = inputs["input_ids"].shape[1] - first
    with teacher_forced(model, batch):
        logits = model(**inputs, use_cache=False, logits_to_keep=kept).logits
    means = []
    for row, response in zip(logits, batch, strict=True):
        start = len(response.prompt) - 1 - first
        predicted = row[start : start + len(response.ids)].float()
        means.append(-cross_entropy(predicted, torch.tensor(response.ids, device=predicted.device)))
    return torch.stack(means).cpu()


class Forced(LogitsProcessor):
    """Lets `generate()` write given responses, and keeps the log-probability of each of their tokens.

    Attributes:
        ids: tokens of the responses [B, N].
        logps: their log-probabilities so far, [B] per token.
    """

    supports_continuous_batching = False

    def __init__(self, model: CausalLM, ids: Tensor) -> None:
        self._model, self.ids, self.logps = model, ids, list[Tensor]()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores that leave one token, and keep that of the model's own logits."""
        if len(self.logps) == self.ids.shape[1]:
            # On a GPU, generate() may run a pass before it sees that it has all tokens.
            return scores
        token = self.ids[:, len(self.logps), None]
        logits = raw_logits(self._model)[:, -1].float()
        self.logps.append(logits.log_softmax(dim=-1).gather(1, token.to(logits.device))[:, 0])
        return torch.full_like(scores, -torch.inf).scatter(1, token.to(scores.device), 0.0)


def generate_given(model: CausalLM, batch: Sequence[Response]) -> Tensor:
    """Write given responses by `generate()`, and return the log-probabilities of their tokens [B, N] fp32.

    All that is attached to the model acts as if it had chosen these tokens. After the end of a response, there are the
    log-probabilities of padding.
    """
    width, device = max(len(response.prompt) for response in batch), device_of(model.get_input_embeddings())
    rows = [[0] * (width - len(response.prompt)) + response.prompt for response in batch]
    masks = [[0] * (width - len(response.prompt)) + [1] * len(response.prompt) for response in batch]
    ids = nn.utils.rnn.pad_sequence([torch.tensor(response.ids) for response in batch], batch_first=True)
    forced = Forced(model, ids.to(device))
    model.generate(
        torch.tensor(rows, device=device),
        attention_mask=torch.tensor(masks, device=device),
        logits_processor=[forced],
        max_new_tokens=ids.shape[1],
        do_sample=False,
        num_beams=1,
        pad_token_id=0,
        # The logits of a compiled pass are not kept.
        disable_compile=True,
        # No token is an end, since a response may go on after one.
        eos_token_id=model.config.get_text_config().vocab_size,
    )
    return torch.stack(forced.logps, dim=1)


def _stepwise_log_probabilities(model: CausalLM, batch: Sequence[Response]) -> Tensor:
    logps = generate_given(model, batch)
    means = [row[: len(response.ids)].mean() for row, response in zip(logps, batch, strict=True)]
    return torch.stack(means).cpu()
