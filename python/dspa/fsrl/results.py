"""Results of adapters on held-out triples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dspa.data.triples import Triple
from dspa.evaluate.responses import Response, batches, responses_of
from dspa.evaluate.scores import Scores, score_responses
from dspa.fsrl.adapter import FSRLAdapter
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


def held_out(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    triples: Iterable[Triple | Mapping[str, Any]] | str | Path,
    adapter: FSRLAdapter | None = None,
    *,
    max_length: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    **scoring: Any,
) -> HeldOut:
    """Measure a model in evaluation mode on held-out triples, with `adapter` if it is given.

    `adapter` has to be attached to the model. The other arguments and the exceptions are those of `score_triples`.
    """
    if adapter is not None:
        adapter.check_attached(model)
    responses = responses_of(model, tokenizer, triples, max_length, chat_template_kwargs)
    scores, moved = score_moves(model, responses, adapter, **scoring)
    l0, l1 = (moved.sum(dim=0) / sum(len(response.ids) for response in responses)).tolist()
    return HeldOut(len(scores.margins), scores.loss, scores.accuracy, scores.margin, l0, l1)


def score_moves(
    model: CausalLM, responses: Sequence[Response], adapter: FSRLAdapter | None, **scoring: Any
) -> tuple[Scores, Tensor]:
    """Score responses as `score_responses` does, and return with the scores how far `adapter` moves latents.

    The movement is that on the response tokens: the sums of L0 and of L1 per response, [R, 2] fp64; 0 without an
    adapter.
    """
    moved = torch.zeros(len(responses), 2, dtype=torch.float64)
    if adapter is None:
        return score_responses(model, responses, batch_tokens=BATCH_TOKENS, **scoring), moved
    with adapter.recording() as moves:
        scores = score_responses(model, responses, batch_tokens=BATCH_TOKENS, **scoring)
    for batch, l0, l1 in zip(batches(responses, BATCH_TOKENS), moves.l0, moves.l1, strict=True):
        for row, number in enumerate(batch):
            places = slice(len(responses[number].prompt), len(responses[number]))
            moved[number] = torch.stack([values[row, places].double().sum() for values in (l0, l1)])
    return scores, moved


@dataclass(frozen=True)
class Trained:
    """Adapter of a sweep: its settings, its folder and its figures on held-out triples."""

    layer: int
    activation: str
    l1: float
    folder: Path
    held_out: HeldOut


@dataclass(frozen=True)
class Sweep:
    """Figures of the base model, and the adapters, in the order of layers and then of settings."""

    base: HeldOut
    adapters: list[Trained]

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for the base model, without layer and lambda, and one per adapter."""
        rows: list[dict[str, Any]] = [{"layer": None, "activation": "none", "lambda": None, **asdict(self.base)}]
        for adapter in self.adapters:
            settings = {"layer": adapter.layer, "activation": adapter.activation, "lambda": adapter.l1}
            rows.append(settings | asdict(adapter.held_out))
        return rows
