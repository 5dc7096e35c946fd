"""Scores of preference triples: SimPO's loss, reward accuracy, and win rate over the base model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dspa.data.triples import Source
from dspa.errors import ModelError, refusal
from dspa.evaluate.responses import Response, batches, log_probabilities, responses_of
from dspa.intervals import wilson
from dspa.models.layers import NOT_FINITE, base_model, check_eval


@dataclass(frozen=True)
class Scores:
    """Scores of N triples, from the mean log-probability per token of both responses.

    SimPO's loss (arXiv 2405.14734, equation 6) has `gamma = beta gamma_beta_ratio`.

    Attributes:
        chosen: mean log-probability per token of the chosen responses, [N] fp32 on the CPU.
        rejected: the same of the rejected responses, [N] fp32 on the CPU.
        beta: factor of the margin in SimPO's loss.
        gamma_beta_ratio: SimPO's target margin, in units of beta.
    """

    chosen: Tensor
    rejected: Tensor
    beta: float = 10.0
    gamma_beta_ratio: float = 0.5

    def __post_init__(self) -> None:
        check_scoring(self.beta, self.gamma_beta_ratio)

    @property
    def margins(self) -> Tensor:
        """Chosen minus rejected, [N]."""
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
        """Share of triples whose chosen response has the larger log-probability per token."""
        return float((self.margins > 0).double().mean())

    def win_rate(self, base: Scores) -> float:
        """Return the share of triples whose margin is larger than under the base model; a tie is half a win.

        Raises:
            ValueError: scores of another number of triples.
        """
        return self._count_wins(base) / len(self.margins)

    def accuracy_interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Return Wilson's interval of the accuracy."""
        return wilson(int((self.margins > 0).sum()), len(self.margins), confidence)

    def win_rate_interval(self, base: Scores, confidence: float = 0.95) -> tuple[float, float]:
        """Return Wilson's interval of the win rate.

        Half a win counts as none at the lower end and as a whole one at the upper end.
        """
        return wilson(self._count_wins(base), len(self.margins), confidence)

    def _count_wins(self, base: Scores) -> float:
        if len(base.margins) != len(self.margins):
            got, accepted = f"scores of {len(base.margins)} triples", f"scores of the same {len(self.margins)}"
            raise refusal(ValueError, "`base`", got, accepted)
        return float((self.margins > base.margins).sum()) + 0.5 * float((self.margins == base.margins).sum())


def check_scoring(beta: float, gamma_beta_ratio: float) -> None:
    """Check the settings of SimPO's loss.

    Raises:
        ValueError: an invalid setting.
    """
    for name, value, valid, accepted in (
        ("beta", beta, 0 < beta < math.inf, "a finite number > 0"),
        ("gamma_beta_ratio", gamma_beta_ratio, 0 <= gamma_beta_ratio < math.inf, "a finite number >= 0"),
    ):
        if not valid:
            raise refusal(ValueError, f"`{name}`", repr(value), accepted)


def score_triples(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    triples: Source,
    *,
    beta: float = 10.0,
    gamma_beta_ratio: float = 0.5,
    max_length: int | None = None,
    batch_tokens: int = 8192,
    progress: bool = True,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Scores:
    """Score triples under the model as it is now, all that is attached to it included.

    Args:
        model: a transformers causal language model in evaluation mode.
        tokenizer: the model's tokenizer.
        triples: what `load_triples` takes.
        beta: factor of the margin in SimPO's loss.
        gamma_beta_ratio: SimPO's target margin, in units of beta.
        max_length: tokens of prompt and response together, to which responses are cut; by default the model's
            positions.
        batch_tokens: tokens per batch, padding included. A longer response runs alone.
        progress: show a bar.
        chat_template_kwargs: values of the chat template's variables by name, for conversations.

    Raises:
        PreferenceError: a bad triple.
        ModelError: a model in training mode, or log-probabilities that are not finite.
        ValueError: an invalid setting.
    """
    responses = responses_of(model, tokenizer, triples, max_length, chat_template_kwargs)
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
    on_batch: Callable[[list[int]], None] | None = None,
) -> Scores:
    """Score the responses that `responses_of` made of triples, as `score_triples` does.

    For triples that are scored several times. `on_batch` is called with the indices of the responses of each batch,
    after it.
    """
    check_scoring(beta, gamma_beta_ratio)
    values = mean_log_probabilities(model, responses, batch_tokens=batch_tokens, progress=progress, on_batch=on_batch)
    return Scores(values[0::2], values[1::2], beta, gamma_beta_ratio)


def mean_log_probabilities(
    model: nn.Module,
    responses: Sequence[Response],
    *,
    batch_tokens: int = 8192,
    progress: bool = True,
    on_batch: Callable[[list[int]], None] | None = None,
) -> Tensor:
    """Return the mean log-probability per token of each response, [R] fp32 on the CPU.

    The arguments are those of `score_responses`.

    Raises:
        ModelError: a model in training mode, or log-probabilities that are not finite.
    """
    inner = base_model(model)
    check_eval(inner)
    values = torch.empty(len(responses), dtype=torch.float32)
    with tqdm(total=len(responses), unit="response", desc="score", leave=False, disable=not progress) as bar:
        for batch in batches(responses, batch_tokens):
            values[batch] = log_probabilities(inner, [responses[n] for n in batch])
            bar.update(len(batch))
            if on_batch is not None:
                on_batch(batch)
    if not bool(values.isfinite().all()):
        raise ModelError(f"Log-probabilities of responses are NaN or infinite. {NOT_FINITE}")
    return values
