"""Scores of preference triples: log-probabilities, and SimPO's measures of them."""

from __future__ import annotations

import json
import math

import pytest
import torch

from dspa.config import SteeringConfig
from dspa.errors import ModelError
from dspa.fsrl import Scores, held_out, responses_of, score_triples
from dspa.intervals import wilson
from dspa.steering.dspa import Steering
from dspa.testing import D_SAE_IN, D_SAE_OUT, L_IN, L_OUT, make_map, make_model, make_sae

from ...rounding import PASS, rounding
from ..support.adapters import TRIPLES, acting_adapter, ending_tokenizer


@pytest.fixture(scope="module", params=["gemma2", "gpt2"])
def model(request):
    return make_model(request.param)


@pytest.fixture(scope="module")
def tokenizer():
    return ending_tokenizer()


def by_hand(model, tokenizer, text: dict[str, str], field: str) -> float:
    """Mean log-probability per token of a response and the end token, from the logits of one unpadded row."""
    prompt = tokenizer(text["prompt"])["input_ids"]
    answer = [*tokenizer(text[field], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].double().log_softmax(dim=-1)
    logps = [float(logits[len(prompt) - 1 + n, token]) for n, token in enumerate(answer)]
    return sum(logps) / len(logps)


def test_scores_are_mean_log_probabilities_whatever_the_batch(model, tokenizer):
    expected = {f: torch.tensor([by_hand(model, tokenizer, t, f) for t in TRIPLES]) for f in ("chosen", "rejected")}
    for batch_tokens in (1, 60, 8192):
        scores = score_triples(model, tokenizer, TRIPLES, batch_tokens=batch_tokens, progress=False)
        for field, wanted in expected.items():
            atol = rounding(PASS, float(wanted.abs().max()))
            torch.testing.assert_close(getattr(scores, field), wanted, rtol=0, atol=atol)


def test_an_attached_adapter_is_scored_and_a_disabled_one_is_not(tokenizer):
    model = make_model("gemma2")
    base = score_triples(model, tokenizer, TRIPLES, progress=False)
    adapter = acting_adapter(model, responses_of(model, tokenizer, TRIPLES))
    with adapter.attach(model):
        moved = score_triples(model, tokenizer, TRIPLES, progress=False)
        with adapter.disabled():
            still = score_triples(model, tokenizer, TRIPLES, progress=False)
    assert torch.equal(still.margins, base.margins)
    assert float((moved.margins - base.margins).abs().min()) > 1e-4


def test_an_attached_steering_is_scored(tokenizer):
    """As a caller's own passes, who says where each response begins."""
    model, saes = make_model("gemma2"), (make_sae(L_IN, D_SAE_IN, seed=1), make_sae(L_OUT, D_SAE_OUT, seed=2))
    responses = responses_of(model, tokenizer, TRIPLES[:4])
    base = score_triples(model, tokenizer, TRIPLES[:4], progress=False)
    with Steering(*saes, make_map(*saes), SteeringConfig(alpha=1.0, mode="both")).attach(model) as steering:
        scores = score_triples(model, tokenizer, TRIPLES[:4], progress=False)
        expected = []
        for response in responses:
            start = len(response.prompt)
            with torch.no_grad(), steering.responses([start]):
                logits = model(torch.tensor([response.prompt + response.ids])).logits[0]
            picked = logits.log_softmax(dim=-1)[start - 1 : -1].gather(1, torch.tensor(response.ids)[:, None])
            expected.append(float(picked.mean()))
        with steering.disabled():
            assert torch.equal(score_triples(model, tokenizer, TRIPLES[:4], progress=False).chosen, base.chosen)
    assert scores.chosen.tolist() == pytest.approx(expected[0::2], rel=1e-4)
    assert scores.rejected.tolist() == pytest.approx(expected[1::2], rel=1e-4)
    assert not torch.allclose(scores.chosen, base.chosen, rtol=1e-3)


def test_measures_worked_by_hand():
    scores = Scores(torch.tensor([-1.0, -2.0, -1.0]), torch.tensor([-1.5, -1.0, -1.0]), beta=2.0, gamma_beta_ratio=0.25)
    # Margins 0.5, -1 and 0; beta margin - gamma is 0.5, -2.5 and -0.5.
    expected = [math.log(1 + math.exp(-z)) for z in (0.5, -2.5, -0.5)]
    assert scores.loss == pytest.approx(sum(expected) / 3)
    assert scores.accuracy == pytest.approx(1 / 3)
    assert scores.margin == pytest.approx(-0.5 / 3)
    base = Scores(torch.tensor([0.0, -2.0, -1.0]), torch.tensor([0.0, -1.0, -3.0]))
    # Larger than 0, equal to -1, less than 2.
    assert scores.win_rate(base) == pytest.approx(0.5)
    assert scores.win_rate_interval(base) == (wilson(1, 3)[0], wilson(2, 3)[1])
    with pytest.raises(ValueError, match="`base` is scores of 2 triples; accepted: scores of the same 3"):
        scores.win_rate(Scores(torch.zeros(2), torch.zeros(2)))


def test_refusals(tokenizer):
    model = make_model("gemma2")
    with pytest.raises(ValueError, match="`batch_tokens` is 0"):
        score_triples(model, tokenizer, TRIPLES, batch_tokens=0, progress=False)
    with pytest.raises(ValueError, match="`max_length` is 1000; accepted: 2 to 128"):
        score_triples(model, tokenizer, TRIPLES, max_length=1000, progress=False)
    with pytest.raises(ModelError, match="training mode"):
        score_triples(model.train(), tokenizer, TRIPLES, progress=False)
    broken = make_model("gemma2")
    broken.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(ModelError, match="NaN or infinite"):
        score_triples(broken, tokenizer, TRIPLES, progress=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": float("nan")}, "`beta` is nan; accepted: a finite number > 0"),
        ({"beta": -1.0}, "`beta` is -1.0"),
        ({"gamma_beta_ratio": float("nan")}, "`gamma_beta_ratio` is nan; accepted: a finite number >= 0"),
    ],
)
def test_an_invalid_loss_is_refused(tokenizer, settings, message):
    with pytest.raises(ValueError, match=message):
        score_triples(make_model("qwen3"), tokenizer, TRIPLES, progress=False, **settings)


def test_figures_of_a_file_and_of_an_adapter_that_is_not_attached(tokenizer, tmp_path):
    model = make_model("qwen3")
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(triple) + "\n" for triple in TRIPLES))
    figures = held_out(model, tokenizer, tmp_path / "held.jsonl", progress=False)
    assert figures == held_out(model, tokenizer, TRIPLES, progress=False) and figures.n_triples == len(TRIPLES)
    adapter = acting_adapter(model, responses_of(model, tokenizer, TRIPLES))
    with pytest.raises(ModelError, match="not attached"):
        held_out(model, tokenizer, TRIPLES, adapter, progress=False)
