"""Texts of the base model and of the steered one, and their measures."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dspa.evaluate.coherence import METRICS, Coherence, distinct, repetition
from dspa.fsrl import FSRLAdapter, compare_texts, responses_of
from dspa.testing import D_SAE_OUT, L_OUT, make_model, make_sae

from ...rounding import PASS, rounding
from ..support.adapters import TRIPLES, acting_adapter

PROMPTS = [[1, 5, 9], [1, 7], [1, 12, 13, 14, 20], [1, 30, 4], [1, 8, 40, 41, 42, 43, 44, 9], [1, 33]]


@pytest.fixture(scope="module")
def model():
    return make_model("gemma2")


def test_n_grams_by_hand():
    text = [1, 2, 1, 2, 1, 2, 3]
    assert distinct(text, 1) == 3 / 7
    # 12, 21, 12, 21, 12, 23.
    assert distinct(text, 2) == 3 / 6
    # 1212, 2121, 1212, 2123.
    assert repetition(text) == 1 / 4
    assert repetition([1, 1, 1, 1, 1]) == 1 / 2
    assert math.isnan(distinct([1, 2], 3))


def test_texts_and_their_measures(tokenizer):
    model = make_model("gemma2")
    responses = responses_of(model, tokenizer, TRIPLES)
    with torch.no_grad():
        alone = [model.generate(torch.tensor([p]), max_new_tokens=12, do_sample=False)[0, len(p) :] for p in PROMPTS]
    # The last new word of the greedy texts ends texts from now on.
    firsts = [(ids.index(token), token) for ids in (text.tolist() for text in alone) for token in ids]
    end = max(firsts)[1]
    model.generation_config.eos_token_id = [end]
    with acting_adapter(model, responses) as adapter:
        adapter.attach(model)
        settings = {"max_new_tokens": 12, "batch_size": 4, "progress": False}
        coherence = compare_texts(model, tokenizer, adapter, PROMPTS, **settings)
    assert any(coherence.base["ended"]) and min(coherence.base["length"]) > 0
    for n, (prompt, ids) in enumerate(zip(PROMPTS, (text.tolist() for text in alone), strict=True)):
        kept = ids[: ids.index(end)] if end in ids else ids
        rated = [*kept, end] if end in ids else kept
        assert coherence.base_texts[n] == tokenizer.decode(rated, skip_special_tokens=True)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + rated])).logits[0].double().log_softmax(dim=-1)
        nll = -sum(float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(rated)) / len(rated)
        values = {name: float(coherence.base[name][n]) for name in METRICS}
        assert values["perplexity"] == pytest.approx(math.exp(nll), rel=rounding(PASS, nll))
        assert (values["length"], values["ended"]) == (len(kept), end in ids)
        assert values["distinct_1"] == len(set(kept)) / len(kept)
    assert coherence.base_texts != coherence.steered_texts


def test_an_adapter_that_does_nothing_changes_nothing(model, tokenizer):
    still = FSRLAdapter(make_sae(L_OUT, D_SAE_OUT, seed=2))
    torch.nn.init.zeros_(still.W_a)
    with still.eval().attach(model):
        coherence = compare_texts(model, tokenizer, still, PROMPTS, max_new_tokens=8, temperature=1.0, progress=False)
    assert coherence.base_texts == coherence.steered_texts
    for metric in METRICS:
        change = coherence.compare(metric)
        assert (change.difference, change.low, change.high, change.n) == (0, 0, 0, len(PROMPTS))


def test_paired_differences_leave_out_what_is_too_short():
    values = {"repetition": np.array([0.1, 0.2, math.nan, 0.4])}, {"repetition": np.array([0.3, math.nan, 0.5, 0.8])}
    change = Coherence([], [], *values).compare("repetition")
    assert (change.n, change.base, change.steered, change.difference) == pytest.approx((2, 0.25, 0.55, 0.3))
    # A mean of two draws from 0.2 and 0.4 is either of them a quarter of the time.
    assert (change.low, change.high) == pytest.approx((0.2, 0.4))
    values[0]["repetition"][0] = math.nan
    with pytest.raises(
        ValueError, match="with two texts that are long enough for repetition is 1 of 4; accepted: 2 or more"
    ):
        Coherence([], [], *values).compare("repetition")


def test_refused_prompts(model, tokenizer, adapter):
    for prompts, settings, message in (
        ([[1, 5]], {}, "`prompts` that are not empty is 1 of 1; accepted: all, and 2 or more for an interval"),
        ([[1, 5], []], {}, "`prompts` that are not empty is 1 of 2; accepted: all"),
        (PROMPTS, {"max_new_tokens": 124}, "is 132 tokens; accepted: up to 128"),
    ):
        with pytest.raises(ValueError, match=message):
            compare_texts(model, tokenizer, adapter, prompts, progress=False, **settings)
