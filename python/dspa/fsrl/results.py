"""What an adapter reaches on triples that it was not trained on."""

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

# Of the passes, whose order is known only with it.
BATCH_TOKENS = 8192


@dataclass(frozen=True)
class HeldOut:
    """On N triples: SimPO's loss, the share whose chosen response is the likelier a token, the mean margin in
    log-probability a token; and of response tokens, how many v_j are not 0 and the sum of their sizes, on average, both
    0 without an adapter."""

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
    """The figures of a model in evaluation mode, to which `adapter` is attached if it is given. The other arguments
    are those of `score_triples`, and so is what is raised."""
    if adapter is not None:
        adapter.check_attached(model)
    responses = responses_of(model, tokenizer, triples, max_length)
    with nullcontext(Moves()) if adapter is None else adapter.recording() as moves:
        scores = score_responses(model, responses, batch_tokens=BATCH_TOKENS, **scoring)
    l0, l1 = (0.0, 0.0) if adapter is None else _moved(responses, moves)
    return HeldOut(len(scores.margins), scores.loss, scores.accuracy, scores.margin, l0, l1)


def _moved(responses: Sequence[Response], moves: Moves) -> tuple[float, float]:
    """L0 and L1 a token, of the passes that scored `responses`."""
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
    """An adapter of a sweep: its settings, its folder, and its figures on held-out triples."""

    layer: int
    activation: str
    l1: float
    folder: Path
    held_out: HeldOut


@dataclass(frozen=True)
class Sweep:
    """The figures of the base model, and the adapters, in the order of layers and then of settings."""

    base: HeldOut
    adapters: list[Trained]

    def rows(self) -> list[dict[str, Any]]:
        """A dictionary an adapter, after one of the base model, where there is neither layer nor lambda."""
        rows: list[dict[str, Any]] = [{"layer": None, "activation": "none", "lambda": None, **asdict(self.base)}]
        for each in self.adapters:
            settings = {"layer": each.layer, "activation": each.activation, "lambda": each.l1}
            rows.append(settings | asdict(each.held_out))
        return rows
