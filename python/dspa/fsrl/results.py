"""Results of adapters on held-out triples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dspa.data.triples import Triple
from dspa.evaluate.responses import Response, batches, responses_of
from dspa.evaluate.scores import score_responses
from dspa.fsrl.adapter import FSRLAdapter, Moves
from dspa.models.layers import CausalLM

# Fixed here, because the recorded passes are matched with the batches of responses.
BATCH_TOKENS = 8192


@dataclass(frozen=True)
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

    n_triples: int
    simpo_loss: float
    accuracy: float
    margin: float
    l0: float
    l1: float


def held_out(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    triples: Iterable[Triple | Mapping[str, Any]] | str | Path,
    adapter: FSRLAdapter | None = None,
    *,
    max_length: int | None = None,
    **scoring: Any,
) -> HeldOut:
    """Measure a model in evaluation mode on held-out triples, with `adapter` if it is given.

    `adapter` has to be attached to the model. The other arguments and the exceptions are those of `score_triples`.
    """
    if adapter is not None:
        adapter.check_attached(model)
    responses = responses_of(model, tokenizer, triples, max_length)
    with nullcontext(Moves()) if adapter is None else adapter.recording() as moves:
        scores = score_responses(model, responses, batch_tokens=BATCH_TOKENS, **scoring)
    l0, l1 = (0.0, 0.0) if adapter is None else _mean_moves(responses, moves)
    return HeldOut(len(scores.margins), scores.loss, scores.accuracy, scores.margin, l0, l1)


def _mean_moves(responses: Sequence[Response], moves: Moves) -> tuple[float, float]:
    """Return L0 and L1 per response token over the passes that scored `responses`."""
    l0 = l1 = 0.0
    for n, batch in enumerate(batches(responses, BATCH_TOKENS)):
        for row, number in enumerate(batch):
            response = responses[number]
            places = slice(len(response.prompt), len(response))
            l0 += float(moves.l0[n][row, places].sum())
            l1 += float(moves.l1[n][row, places].sum())
    n_tokens = sum(len(response.ids) for response in responses)
    return l0 / n_tokens, l1 / n_tokens


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
