"""Scores of preference triples: tokens, log-probabilities, and what SimPO makes of them."""

from __future__ import annotations

import json
import math

import pytest
import torch

from dspa.data.triples import Triple
from dspa.errors import ModelError
from dspa.fsrl import Scores, held_out, response_tokens, responses_of, score_triples
from dspa.intervals import wilson
from dspa.testing import make_model, word_tokenizer

from ...rounding import PASS, rounding
from ..support.adapters import TRIPLES, acting_adapter, ending_tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ '<bos> ' if loop.first else '' }}{{ m['role'][:1] }} {{ m['content'] }} {% endfor %}"
    "{{ 'a ' if add_generation_prompt else '' }}"
)


@pytest.fixture(scope="module", params=["gemma2", "gpt2"])
def model(request):
    return make_model(request.param)


@pytest.fixture(scope="module")
def tokenizer():
    return ending_tokenizer()


def by_hand(model, tokenizer, text: dict[str, str], field: str) -> float:
    """Mean log-probability a token of a response and the end token, from the logits of one unpadded row."""
    prompt = tokenizer(text["prompt"])["input_ids"]
    answer = [*tokenizer(text[field], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].double().log_softmax(dim=-1)
    found = [float(logits[len(prompt) - 1 + n, token]) for n, token in enumerate(answer)]
    return sum(found) / len(found)


def test_scores_are_mean_log_probabilities_whatever_the_batch(model, tokenizer):
    expected = {f: torch.tensor([by_hand(model, tokenizer, t, f) for t in TRIPLES]) for f in ("chosen", "rejected")}
    for batch_tokens in (1, 60, 8192):
        found = score_triples(model, tokenizer, TRIPLES, batch_tokens=batch_tokens, progress=False)
        for field, wanted in expected.items():
            atol = rounding(PASS, float(wanted.abs().max()))
            torch.testing.assert_close(getattr(found, field), wanted, rtol=0, atol=atol)


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


@pytest.mark.parametrize(("k", "n"), [(0, 5), (7, 20), (20, 20)])
def test_wilson_is_the_closed_form(k, n):
    z, p = 1.959963984540054, k / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    apart = rounding(20, 1.0, torch.float64)
    assert wilson(k, n) == pytest.approx((max(0.0, middle - half), min(1.0, middle + half)), rel=0, abs=apart)


def test_where_an_end_token_goes(tokenizer):
    end = tokenizer.eos_token_id
    triple = Triple("the cat is", "a dog of my own", "we see")
    prompt, chosen, rejected = response_tokens(triple, tokenizer)
    assert (len(prompt), len(chosen), len(rejected)) == (4, 6, 3)
    assert chosen[-1] == rejected[-1] == end
    # Cut to 4 tokens: the text goes on. Exactly full: no room.
    for room, ended in ((4, False), (5, False), (6, True)):
        _, chosen, rejected = response_tokens(triple, tokenizer, max_length=len(prompt) + room)
        assert (chosen[-1] == end, rejected[-1] == end) == (ended, True)
        assert len(chosen) == room
    assert response_tokens(Triple("the cat", "a dog bird", "we"), tokenizer)[1].count(end) == 1
    assert response_tokens(triple, word_tokenizer())[1:] == (
        tokenizer("a dog of my own", add_special_tokens=False)["input_ids"],
        tokenizer("we see", add_special_tokens=False)["input_ids"],
    )


def test_a_chat_template_ends_its_turns_itself():
    tokenizer = ending_tokenizer()
    tokenizer.chat_template = TEMPLATE
    triple = Triple(
        [{"role": "user", "content": "the cat"}],
        [{"role": "assistant", "content": "is a"}],
        [{"role": "assistant", "content": "dog"}],
    )
    assert response_tokens(triple, tokenizer)[2] == tokenizer("dog", add_special_tokens=False)["input_ids"]


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
def test_a_loss_that_is_none_is_refused(tokenizer, settings, message):
    with pytest.raises(ValueError, match=message):
        score_triples(make_model("qwen3"), tokenizer, TRIPLES, progress=False, **settings)


def test_figures_of_a_file_and_of_an_adapter_that_is_not_attached(tokenizer, tmp_path):
    model = make_model("qwen3")
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(each) + "\n" for each in TRIPLES))
    found = held_out(model, tokenizer, tmp_path / "held.jsonl", progress=False)
    assert found == held_out(model, tokenizer, TRIPLES, progress=False) and found.n_triples == len(TRIPLES)
    adapter = acting_adapter(model, responses_of(model, tokenizer, TRIPLES))
    with pytest.raises(ModelError, match="not attached"):
        held_out(model, tokenizer, TRIPLES, adapter, progress=False)
