"""Sparse Junction Steering against the published rule by hand, and its value head against a solver."""

from __future__ import annotations

import math
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dspa import Method, compare
from dspa.baselines.junction.processor import JunctionProcessor
from dspa.baselines.junction.value import ValueHead, ValueModel, fit_value_head, value_head_of_triples
from dspa.data.triples import load_triples
from dspa.demo import language
from dspa.demo.load import N_TRIPLES, World
from dspa.errors import ModelError, VectorError
from dspa.evaluate.responses import Response, responses_of
from dspa.testing import make_model, word_tokenizer

from ...rounding import assert_same_logits

RESPONSES = [Response([1, 5, 9], [7, 8, 20]), Response([1, 4], [30, 2, 9, 9, 11]), Response([1, 6, 6], [12])]
REWARDS = [1.0, 0.0, 0.25]


@pytest.fixture(scope="module")
def head(gemma: Any) -> ValueHead:
    return fit_value_head(gemma, RESPONSES, REWARDS, progress=False)


def test_the_published_rule_by_hand() -> None:
    """The anchors of METHODS: an entropy of 1.02, and the policy after adding the values of the three best."""
    logits = torch.tensor([[2.0, -1.0, 1.5, 1.0]])
    asked = []

    def values(ids: Tensor, candidates: Tensor) -> Tensor:
        asked.append((ids.tolist(), candidates.tolist()))
        return torch.tensor([[0.0, 1.0, 0.5]])

    processor = JunctionProcessor(values, k=3)
    policy = processor(torch.tensor([[4, 2]]), logits).softmax(dim=-1)
    assert policy[0].tolist() == pytest.approx([0.307196, 0, 0.506480, 0.186324], abs=1e-6)
    assert asked == [([[4, 2]], [[0, 2, 3]])] and processor.junctions[0].tolist() == [True]
    decided = JunctionProcessor(values, k=3, threshold=1.03)
    assert torch.equal(decided(torch.tensor([[4, 2]]), logits), logits) and len(asked) == 1
    assert decided.junctions[0].tolist() == [False]
    dense = JunctionProcessor(values, k=3, threshold=None, weight=2.0)
    assert dense(torch.tensor([[4, 2]]), logits)[0].tolist() == [2.0, -math.inf, 3.5, 2.0]


def test_only_rows_at_junctions_are_scored() -> None:
    logits = torch.tensor([[9.0, 0.0, 0.0], [1.0, 1.0, 0.9], [0.0, 0.0, 0.0]])
    processor = JunctionProcessor(lambda ids, tokens: ids[:, -1:] * 10.0 + tokens, k=2, threshold=0.6)
    moved = processor(torch.tensor([[1], [2], [3]]), logits)
    assert torch.equal(moved[0], logits[0])
    assert moved[1].tolist() == [21.0, 22.0, -math.inf]
    assert sorted(moved[2].tolist())[0] == -math.inf and processor.junctions[0].tolist() == [False, True, True]


def test_refusals(gemma: Any, head: ValueHead) -> None:
    for settings, message in (({"k": 1}, "`k` is 1"), ({"weight": -1.0}, "`weight`"), ({"threshold": -1.0}, "`thre")):
        with pytest.raises(ValueError, match=message):
            JunctionProcessor(lambda _ids, tokens: tokens, **settings)
    for wrong in (lambda _ids, tokens: tokens[0], lambda _ids, tokens: tokens * math.nan, lambda _ids, _tokens: None):
        with pytest.raises(ValueError, match="`value_model` returned"):
            JunctionProcessor(wrong, threshold=None)(torch.tensor([[1]]), torch.zeros(1, 5))
    other = make_model("gemma2", seed=7)
    with pytest.raises(ModelError, match="made with"):
        ValueModel(head, other)
    with pytest.raises(ModelError, match="made with"):
        compare(other, word_tokenizer(), ["the cat"], [Method.junction(head)], progress=False)
    for rewards in ([1.0, 0.0], [1.0, 1.0, 1.0]):
        with pytest.raises(ValueError, match="not all equal"):
            fit_value_head(gemma, RESPONSES, rewards)
    with pytest.raises(ValueError, match="`ridge`"):
        fit_value_head(gemma, RESPONSES, REWARDS, ridge=0.0)


def hidden(model: Any, response: Response) -> Tensor:
    with torch.no_grad():
        return model.model(torch.tensor([response.prompt + response.ids])).last_hidden_state[0]


def test_the_head_is_the_least_squares_one(gemma: Any, head: ValueHead) -> None:
    """Ridge as least squares with rows for the penalty, on the centred hidden states of single passes."""
    x = torch.cat([hidden(gemma, r)[len(r.prompt) :] for r in RESPONSES]).double()
    y = torch.cat([torch.full((len(r.ids),), reward) for r, reward in zip(RESPONSES, REWARDS, strict=True)]).double()
    centred, d = x - x.mean(0), x.shape[1]
    penalty = len(x) * 1e-3 * centred.square().mean()
    rows = torch.cat([centred, penalty.sqrt() * torch.eye(d).double()])
    wanted = torch.linalg.lstsq(rows, torch.cat([y - y.mean(), torch.zeros(d).double()])[:, None]).solution[:, 0]
    torch.testing.assert_close(head.weight.double(), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
    assert float(head.bias) == pytest.approx(float(y.mean() - x.mean(0) @ wanted), abs=1e-3)
    rest = (y - head(x.float()).double()).square().mean() / y.var(correction=0)
    assert head.record.r2 == pytest.approx(float(1 - rest), abs=1e-4)
    assert (head.record.n_responses, head.record.n_tokens) == (3, 9)


def test_values_are_those_of_whole_passes(gemma: Any, head: ValueHead) -> None:
    """With rows padded on the left, as `generate()` passes them."""
    rows, candidates = [[0, 0, 1, 5], [1, 9, 3, 44]], [[7, 8, 50], [3, 2, 1]]
    values = ValueModel(head, gemma, 0)(torch.tensor(rows), torch.tensor(candidates))
    for row, tokens, scored in zip(rows, candidates, values, strict=True):
        prompt = [token for token in row if token]
        wanted = torch.stack([head(hidden(gemma, Response(prompt, [token])))[-1] for token in tokens])
        assert_same_logits(scored, wanted)


def test_files(head: ValueHead, tmp_path: Path) -> None:
    head.save(tmp_path / "value.safetensors")
    again = ValueHead.load(tmp_path / "value.safetensors")
    assert again.digest == head.digest and again.record.n_tokens == 9 and torch.equal(again.weight, head.weight)
    data = bytearray((tmp_path / "value.safetensors").read_bytes())
    data[-3] ^= 1
    (tmp_path / "value.safetensors").write_bytes(bytes(data))
    with pytest.raises(VectorError, match="damaged"):
        ValueHead.load(tmp_path / "value.safetensors")


def test_in_the_world_of_the_demo() -> None:
    """A head on one style's share moves answers towards it. A preference that flips with the prompt is not linear."""
    world = World()
    triples = list(islice(load_triples(world.triples), N_TRIPLES))
    responses = responses_of(world.model, world.tokenizer, triples)

    def formal(_prompt: str, answer: str) -> float:
        wanted, total = language.count_style_words(answer, "formal")
        return wanted / max(1, total)

    rewards = [formal("", text) for triple in triples for text in (triple.chosen, triple.rejected)]
    head = fit_value_head(world.model, responses, rewards, progress=False)
    assert 0.3 < head.record.r2 < 1
    flips = value_head_of_triples(world.model, world.tokenizer, triples, progress=False)
    assert flips.record.r2 < 0.1 and flips.record.n_responses == 2 * N_TRIPLES
    methods = [Method.junction(head, weight=weight, name=f"junction {weight}") for weight in (0.0, 4.0)]
    comparison = compare(
        *(world.model, world.tokenizer, [row["prompt"] for row in world.held_out[:20]], methods),
        counters={"formal": formal},
        held_out=triples[:4],
        seeds=(0,),
        max_new_tokens=20,
        progress=False,
    )
    assert comparison.gain("formal", "junction 4.0").low > 0.05
    assert comparison.gain("formal", "junction 4.0", "junction 0.0").low > 0
    assert 0 < comparison.figure("touched", "junction 4.0").value < 1
    assert comparison.figure("margin", "junction 4.0") is None
    assert comparison.operations["junction 4.0"] > 2 * comparison.operations["base"]
