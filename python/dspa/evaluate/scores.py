"""How well a model tells chosen from rejected responses: SimPO's loss, reward accuracy, win rate over the base."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, softplus
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dspa.data.tokens import response_tokens
from dspa.data.triples import Triple, load_triples
from dspa.errors import ModelError
from dspa.intervals import wilson
from dspa.models.layers import NOT_FINITE, CausalLM, base_model, check_eval, context_length, device_of


@dataclass(frozen=True)
class Response:
    """Token ids of a prompt, and of a response to it; neither is empty."""

    prompt: list[int]
    ids: list[int]

    def __len__(self) -> int:
        """Tokens of both."""
        return len(self.prompt) + len(self.ids)


@dataclass(frozen=True)
class Scores:
    """Mean log-probability a token of the chosen and the rejected response of each triple, [N] fp32 on the CPU each,
    and what SimPO (arXiv 2405.14734, equation 6) makes of them with `beta` and `gamma = beta gamma_beta_ratio`."""

    chosen: Tensor
    rejected: Tensor
    beta: float = 10.0
    gamma_beta_ratio: float = 0.5

    def __post_init__(self) -> None:
        check_scoring(self.beta, self.gamma_beta_ratio)

    @property
    def margins(self) -> Tensor:
        """Chosen less rejected, [N]."""
        return self.chosen - self.rejected

    @property
    def margin(self) -> float:
        """Mean of the margins."""
        return float(self.margins.double().mean())

    @property
    def loss(self) -> float:
        """`-log sigmoid(beta margin - gamma)`, mean over triples."""
        return float(softplus(-self.beta * (self.margins.double() - self.gamma_beta_ratio)).mean())

    @property
    def accuracy(self) -> float:
        """Share of triples whose chosen response has the larger log-probability a token."""
        return float((self.margins > 0).double().mean())

    def win_rate(self, base: Scores) -> float:
        """Share of triples whose margin is larger than under the base model; a tie is half a win.

        Raises `ValueError` for scores of another number of triples.
        """
        return self._wins(base) / len(self.margins)

    def accuracy_interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Wilson's interval of the accuracy."""
        return wilson(int((self.margins > 0).sum()), len(self.margins), confidence)

    def win_rate_interval(self, base: Scores, confidence: float = 0.95) -> tuple[float, float]:
        """Wilson's interval of the win rate; for half a win, from the lower end without it to the upper end with a
        whole one."""
        return wilson(self._wins(base), len(self.margins), confidence)

    def _wins(self, base: Scores) -> float:
        if len(base.margins) != len(self.margins):
            raise ValueError(f"`base` scores {len(base.margins)} triples; accepted: the same {len(self.margins)}.")
        return float((self.margins > base.margins).sum()) + 0.5 * float((self.margins == base.margins).sum())


def check_scoring(beta: float, gamma_beta_ratio: float) -> None:
    """Raise `ValueError` unless SimPO's loss has these settings."""
    for name, value, right, accepted in (
        ("beta", beta, 0 < beta < math.inf, "a finite number > 0"),
        ("gamma_beta_ratio", gamma_beta_ratio, 0 <= gamma_beta_ratio < math.inf, "a finite number >= 0"),
    ):
        if not right:
            raise ValueError(f"`{name}` is {value!r}; accepted: {accepted}.")


def score_triples(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    triples: Iterable[Triple | Mapping[str, Any]] | str | Path,
    *,
    beta: float = 10.0,
    gamma_beta_ratio: float = 0.5,
    max_length: int | None = None,
    batch_tokens: int = 8192,
    progress: bool = True,
) -> Scores:
    """Score triples under the model as it is now, an attached adapter included.

    Args:
        model, tokenizer: a transformers causal language model in evaluation mode.
        triples: what `load_triples` takes.
        beta, gamma_beta_ratio: of the loss.
        max_length: tokens of prompt and response together, from which on responses are cut; by default the model's
            positions.
        batch_tokens: tokens of a batch, padding counted. A response that is longer runs alone.
        progress: show a bar.

    Raises:
        PreferenceError: a bad triple. ModelError: a model in training mode, log-probabilities that are not finite.
    """
    responses = responses_of(model, tokenizer, triples, max_length)
    return score_responses(
        model,
        responses,
        beta=beta,
        gamma_beta_ratio=gamma_beta_ratio,
        batch_tokens=batch_tokens,
        progress=progress,
    )


def score_responses(
    model: nn.Module,
    responses: Sequence[Response],
    *,
    beta: float = 10.0,
    gamma_beta_ratio: float = 0.5,
    batch_tokens: int = 8192,
    progress: bool = True,
) -> Scores:
    """`score_triples` of what `responses_of` made of triples, for those that are scored several times."""
    inner = base_model(model)
    check_eval(inner)
    check_scoring(beta, gamma_beta_ratio)
    values = torch.empty(len(responses))
    with tqdm(total=len(responses), unit="response", desc="score", leave=False, disable=not progress) as bar:
        for batch in batches(responses, batch_tokens):
            values[batch] = log_probabilities(inner, [responses[n] for n in batch])
            bar.update(len(batch))
    if not bool(values.isfinite().all()):
        raise ModelError(f"Log-probabilities of responses are NaN or infinite. {NOT_FINITE}")
    return Scores(values[0::2], values[1::2], beta, gamma_beta_ratio)


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
