"""The look at a few answers with an adapter, and what is said of an adapter that is not sparse or spoils them."""

from __future__ import annotations

import math
import re

import pytest
import torch

from dspa.evaluate.responses import Response
from dspa.fsrl import answers
from dspa.fsrl.answers import Answers, compare_answers, warnings_about
from dspa.testing import make_model

from ...rounding import PASS, rounding
from ..support.adapters import ending_tokenizer

N_ANSWERS, ANSWER_TOKENS = 3, 24


@pytest.fixture(scope="module")
def model():
    return make_model("gemma2")


def plain_answers(model, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy answers, one prompt at a time."""
    rows = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER_TOKENS, do_sample=False)
        rows.append(out[0, len(prompt) :].tolist())
    return rows


def nats_per_token(model, prompt: list[int], answer: list[int]) -> float:
    with torch.no_grad():
        logps = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(dim=-1)
    places = torch.arange(len(prompt), len(prompt) + len(answer))
    return -float(logps[places - 1, torch.tensor(answer)].double().mean())


def repeated(answer: list[int]) -> float:
    grams = [tuple(answer[n : n + 4]) for n in range(len(answer) - 3)]
    return sum(gram in grams[:n] for n, gram in enumerate(grams)) / len(grams)


def test_answers_are_to_the_first_different_prompts_that_leave_room(model, adapter, monkeypatch):
    """The model has 128 positions and no end token."""
    monkeypatch.setattr(answers, "N_ANSWERS", N_ANSWERS)
    monkeypatch.setattr(answers, "ANSWER_TOKENS", ANSWER_TOKENS)
    prompts = [[1, 5 + n, 9] for n in range(N_ANSWERS + 2)]
    long = [7] * (128 - ANSWER_TOKENS + 1)
    responses = [Response(prompt, [3]) for prompt in (long, *(p for p in prompts for _ in range(2)))]
    # Without an end token, all answers are of one length.
    tokenizer = ending_tokenizer()
    tokenizer.eos_token = None
    compared = compare_answers(model, tokenizer, adapter, responses)
    steered = plain_answers(model, prompts[:N_ANSWERS])
    with adapter.disabled():
        base = plain_answers(model, prompts[:N_ANSWERS])
    for measured, written in zip(compared, (base, steered), strict=True):
        with adapter.disabled():
            nats = [nats_per_token(model, *pair) for pair in zip(prompts[:N_ANSWERS], written, strict=True)]
        expected = sum(map(math.exp, nats)) / N_ANSWERS
        # An error of log-probabilities is a relative one of the perplexity.
        assert measured.perplexity == pytest.approx(expected, rel=rounding(PASS, max(nats)))
        assert measured.repetition == pytest.approx(sum(map(repeated, written)) / N_ANSWERS)
    assert compared[0] != compared[1]


def test_one_prompt_is_too_few(model, adapter, tokenizer):
    assert compare_answers(model, tokenizer, adapter, [Response([1, 5], [3]), Response([1, 5], [4])]) is None


BASE = Answers(perplexity=2.0, repetition=0.3)


@pytest.mark.parametrize(
    ("l0", "compared", "said"),
    [
        (4050, None, ["not sparse: it moves 4050 of 4096 latents per token"]),
        (2048, None, []),
        (60, (BASE, Answers(10.0, 0.1)), ["broken: their perplexity under the base model is 10, and .* answers 2"]),
        (60, (BASE, Answers(2.5, 0.6)), ["repeat themselves: 60% of their 4-grams stood there before, and 30%"]),
        (4000, (BASE, Answers(60.0, 0.9)), ["not sparse", "broken", "repeat"]),
        (60, (BASE, Answers(5.9, 0.45)), []),
        (60, (BASE, Answers(5.9, math.nan)), []),
    ],
)
def test_warnings(l0, compared, said):
    texts = warnings_about(l0, 4096, compared)
    assert len(texts) == len(said)
    for text, pattern in zip(texts, said, strict=True):
        assert re.search(pattern, text), text
