"""The recommended setting on made-up numbers: which half chooses, which half judges, and which condition fails."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dspa.evaluate.compare.comparison import Comparison
from dspa.evaluate.compare.methods import Method
from dspa.evaluate.compare.recommendation import halves
from dspa.evaluate.compare.runs import Answers, TripleScores

N = 40
FIRST, SECOND = halves(N)


def made(
    margins: dict[str, np.ndarray | float], perplexity: dict[str, float] | None = None, prefer: str | None = "margin"
) -> Comparison:
    """A comparison of DSPA methods and their controls with given margins over the base model, per triple."""
    noise = np.random.default_rng(1).normal(scale=0.01, size=N)
    methods, answers, scores = [Method.base()], {}, {}
    for name in margins:
        control_of = name.partition(":")[0] if ":" in name else ""
        methods.append(Method(name, "control" if control_of else "DSPA", control_of=control_of))
    base = np.random.default_rng(2).normal(size=N)
    for seed, method in enumerate(methods):
        gain = margins.get(method.name, 0.0) + noise * (method.name != "base") * (1 + seed)
        scores[method.name] = [TripleScores((base + gain).tolist(), [0.0] * N, None)]
        nll = float(np.log((perplexity or {}).get(method.name, 10.0)))
        answers[method.name] = [Answers([[3]] * N, [nll] * N, None, None, 1.0)]
    settings: dict[str, Any] = {"settings": {}, "ends": set(), "counters": {"the": re.compile("the")}}
    return Comparison(
        methods=methods,
        prompts=["p"] * N,
        seeds=[0],
        answers=answers,
        scores=scores,
        texts={method.name: [["the"] * N] for method in methods},
        prefer=prefer,
        max_perplexity=1.15,
        tokenizer=None,  # type: ignore[arg-type]
        **settings,
    )


def test_halves():
    assert sorted(FIRST + SECOND) == list(range(N)) and len(FIRST) == len(SECOND) == 20
    # Not in turn, since a file may hold two kinds of prompts in turn.
    assert {n % 2 for n in FIRST} == {n % 2 for n in SECOND} == {0, 1}
    assert [len(half) for half in halves(5)] == [2, 3]


def test_the_best_setting_above_its_controls():
    comparison = made({"a": 0.1, "a: random set": 0.02, "b": 0.3, "b: random set": 0.05, "b: wrong layer": 0.1})
    got = comparison.recommendation
    assert got.method == got.candidate == "b" and got.reason.startswith("Recommended: b.")
    assert "on the 20 triples on which it was not chosen" in got.reason and "(random set +0.0" in got.reason
    assert got.gain.value == pytest.approx(0.3, abs=0.02) and got.gain.low > got.controls["b: wrong layer"].high
    assert got.over_controls["b: wrong layer"].value == pytest.approx(0.2, abs=0.02)
    assert (got.chosen_on, got.judged_on) == (FIRST, SECOND)


def test_choosing_and_judging_see_different_triples():
    """One of two settings is good on the half that chooses, and bad on the half that judges."""
    lucky = np.full(N, 0.5)
    lucky[SECOND] = -0.2
    got = made({"lucky": lucky, "steady": 0.1}).recommendation
    assert (got.method, got.candidate) == (None, "lucky")
    assert got.gain.value == pytest.approx(-0.2, abs=0.02) and "its gain is not above 0" in got.reason
    lucky[FIRST], lucky[SECOND] = -0.2, 0.5
    assert made({"lucky": lucky, "steady": 0.1}).recommendation.method == "steady"


def test_a_control_that_does_as_well():
    got = made({"a": 0.3, "a: random set": 0.0, "a: shuffled map": 0.299}).recommendation
    assert got.method is None and "is not above that of its control shuffled map" in got.reason
    assert "random set (" not in got.reason


def test_a_perplexity_that_is_too_high():
    got = made({"a": 0.3, "b": 0.1}, {"a": 11.6, "b": 11.4}).recommendation
    assert got.method == "b" and "at +14.0% in perplexity" in got.reason
    got = made({"a": 0.3}, {"a": 11.6}).recommendation
    assert got.method is None and got.candidate is None and "perplexity is above 1.15 times" in got.reason


def test_without_controls_it_says_so():
    assert "no controls were run" in made({"a": 0.3}).recommendation.reason


def test_a_preferred_counter():
    got = made({"a": 0.3}, prefer="the").recommendation
    # Every answer holds it once, under every method.
    assert got.method is None and got.gain.value == 0 and "20 prompts on which it was not chosen" in got.reason


def test_nothing_to_decide_by():
    assert "no counter was preferred" in made({"a": 0.3}, prefer=None).recommendation.reason
    assert "no DSPA method" in made({}).recommendation.reason


@pytest.mark.parametrize(("prefer", "needed"), [("margin", "4 prompts and triples"), ("the", "4 prompts")])
def test_too_little_to_decide_by(prefer, needed):
    few = replace(made({"a": 0.3}, prefer=prefer), prompts=["p"] * 3)
    assert few.recommendation.reason == f"No setting is recommended: {needed} or more are needed."


def test_its_record():
    record = made({"a": 0.1, "a: random set": 0.02}).recommendation.record()
    assert record["gain"].keys() == {"value", "low", "high"} and record["method"] == "a"
    assert record["controls"]["a: random set"]["value"] == pytest.approx(0.02, abs=0.02)
