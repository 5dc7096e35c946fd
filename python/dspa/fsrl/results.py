"""Results of adapters on held-out triples and rankings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dspa.data.triples import Source, load_rankings
from dspa.evaluate.responses import Response, batches, responses_of, responses_of_examples
from dspa.evaluate.scores import Scores, mean_log_probabilities
from dspa.fsrl.adapter import FSRLAdapter
from dspa.fsrl.ranking import order_of, pro_loss
from dspa.models.layers import CausalLM
from dspa.schemas import Fraction, NonNegative, Number, PositiveInt, schema

# Fixed here, because the recorded passes are matched with the batches of responses.
BATCH_TOKENS = 8192


@schema
class HeldOut:
    """Figures on held-out triples.

    Attributes:
        n_triples: number of triples.
        simpo_loss: SimPO's loss.
        accuracy: share of triples whose chosen response is likelier per token.
        margin: mean margin in log-probability per token.
        l0: nonzero v_j per response token; 0 without an adapter.
        l1: sum of |v_j| per response token; 0 without an adapter.
    """

    n_triples: PositiveInt
    simpo_loss: Number
    accuracy: Fraction
    margin: Number
    l0: NonNegative
    l1: NonNegative

    @property
    def counted(self) -> str:
        """The number of triples, in words."""
        return f"{self.n_triples} held-out triples"

    @property
    def named(self) -> dict[str, float]:
        """The figures by their names in tables and plots, the loss first."""
        return {
            "SimPO loss": self.simpo_loss,
            "reward accuracy": self.accuracy,
            "margin": self.margin,
            "L0": self.l0,
            "L1": self.l1,
        }


@schema
class HeldOutRankings:
    """Figures on held-out rankings, each a mean over them.

    Attributes:
        n_rankings: number of rankings.
        pro_loss: PRO's loss, without the SFT term.
        accuracy: share of rankings whose likeliest response per token is a best one.
        pair_accuracy: share of a ranking's pairs of different rewards whose better response is likelier per token.
        margin: log-probability per token of the best response, less the mean over the others.
        l0: nonzero v_j per response token; 0 without an adapter.
        l1: sum of |v_j| per response token; 0 without an adapter.
    """

    n_rankings: PositiveInt
    pro_loss: Number
    accuracy: Fraction
    pair_accuracy: Fraction
    margin: Number
    l0: NonNegative
    l1: NonNegative

    @property
    def counted(self) -> str:
        """The number of rankings, in words."""
        return f"{self.n_rankings} held-out rankings"

    @property
    def named(self) -> dict[str, float]:
        """The figures by their names in tables and plots, the loss first."""
        return {
            "PRO loss": self.pro_loss,
            "best is likeliest": self.accuracy,
            "pairs in order": self.pair_accuracy,
            "margin": self.margin,
            "L0": self.l0,
            "L1": self.l1,
        }


def held_out(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    triples: Source,
    adapter: FSRLAdapter | None = None,
    *,
    max_length: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    progress: bool = True,
    **scoring: Any,
) -> HeldOut:
    """Measure a model in evaluation mode on held-out triples, with `adapter` if it is given.

    `adapter` has to be attached to the model. The other arguments and the exceptions are those of `score_triples`.
    """
    responses = responses_of(model, tokenizer, triples, max_length, chat_template_kwargs)
    values, l0, l1 = _measure(model, responses, adapter, progress)
    scores = Scores(values[0::2], values[1::2], **scoring)
    return HeldOut(len(scores.margins), scores.loss, scores.accuracy, scores.margin, l0, l1)


def held_out_rankings(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rankings: Source,
    adapter: FSRLAdapter | None = None,
    *,
    plain: bool = False,
    max_length: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> HeldOutRankings:
    """Measure a model in evaluation mode on held-out rankings, with `adapter` if it is given.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        rankings: what `load_rankings` takes.
        adapter: an adapter that is attached to the model.
        plain: compute with T = 1, and accept responses without rewards, from the best to the worst.
        max_length: as for `score_triples`.
        chat_template_kwargs: as for `score_triples`.
        progress: show a bar.

    Raises:
        PreferenceError: a bad ranking.
        ModelError: as for `score_triples`.
        ValueError: as for `score_triples`.
    """
    examples = list(load_rankings(rankings, plain=plain))
    responses = responses_of_examples(model, tokenizer, examples, max_length, chat_template_kwargs)
    values, l0, l1 = _measure(model, list(chain(*responses)), adapter, progress)
    scores = values.split([len(ranking.rewards) for ranking in examples])
    rewards = [torch.tensor(ranking.rewards, dtype=torch.float64) for ranking in examples]
    loss = fmean(float(pro_loss(r.double(), R, plain=plain)) for r, R in zip(scores, rewards, strict=True))
    orders = [astuple(order_of(r, R)) for r, R in zip(scores, rewards, strict=True)]
    best, pairs, margin = (fmean(figure) for figure in zip(*orders, strict=True))
    return HeldOutRankings(len(orders), loss, best, pairs, margin, l0, l1)


def _measure(
    model: CausalLM, responses: Sequence[Response], adapter: FSRLAdapter | None, progress: bool
) -> tuple[Tensor, float, float]:
    """Return what `score_moves` returns of an attached adapter, with the means of L0 and of L1 over all tokens."""
    if adapter is not None:
        adapter.check_attached(model)
    scores, moved = score_moves(model, responses, adapter, progress=progress)
    l0, l1 = (moved.sum(dim=0) / sum(len(response.ids) for response in responses)).tolist()
    return scores, l0, l1


def score_moves(
    model: CausalLM, responses: Sequence[Response], adapter: FSRLAdapter | None, *, progress: bool
) -> tuple[Tensor, Tensor]:
    """Return the mean log-probability per token of responses, [R] fp32, and how far `adapter` moves latents.

    The movement is that on the response tokens: the sums of L0 and of L1 per response, [R, 2] fp64; 0 without an
    adapter.
    """
    moved = torch.zeros(len(responses), 2, dtype=torch.float64)
    options: dict[str, Any] = {"batch_tokens": BATCH_TOKENS, "progress": progress}
    if adapter is None:
        return mean_log_probabilities(model, responses, **options), moved
    with adapter.recording() as moves:
        scores = mean_log_probabilities(model, responses, **options)
    for batch, l0, l1 in zip(batches(responses, BATCH_TOKENS), moves.l0, moves.l1, strict=True):
        for row, number in enumerate(batch):
            places = slice(len(responses[number].prompt), len(responses[number]))
            moved[number] = torch.stack([values[row, places].double().sum() for values in (l0, l1)])
    return scores, moved


@dataclass(frozen=True)
class Trained:
    """Adapter of a sweep: its settings, its folder and its figures on held-out examples."""

    layer: int
    activation: str
    l1: float
    folder: Path
    held_out: HeldOut | HeldOutRankings


@dataclass(frozen=True)
class Sweep:
    """Figures of the base model, and the adapters, in the order of layers and then of settings."""

    base: HeldOut | HeldOutRankings
    adapters: list[Trained]

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for the base model, without layer and lambda, and one per adapter."""
        rows: list[dict[str, Any]] = [{"layer": None, "activation": "none", "lambda": None, **asdict(self.base)}]
        for adapter in self.adapters:
            settings = {"layer": adapter.layer, "activation": adapter.activation, "lambda": adapter.l1}
            rows.append(settings | asdict(adapter.held_out))
        return rows
