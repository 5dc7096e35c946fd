"""Measures as sums, their intervals and paired differences, against plain loops over resampled prompts."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from dspa.evaluate.compare.measures import Sums, answer_measures, count, triple_measures
from dspa.evaluate.compare.runs import Answers, TripleScores

RNG = np.random.default_rng(0)
NLL = RNG.gamma(4.0, 5.0, (3, 25))
TOKENS = RNG.integers(5, 20, (3, 25)).astype(np.float64)
PERPLEXITY = Sums(NLL, TOKENS, exponential=True)
OTHER = Sums(NLL * RNG.uniform(1.0, 1.3, (3, 25)), TOKENS, exponential=True)


def quantiles(statistic, n: int) -> tuple[float, float]:
    """The percentile interval of a statistic of drawn prompts, by a loop with other draws."""
    rng = np.random.default_rng(99)
    drawn = [statistic(rng.integers(n, size=n)) for _ in range(4000)]
    return tuple(np.quantile(drawn, [0.025, 0.975]))


def test_a_perplexity_weighs_tokens_and_draws_prompts_with_all_seeds():
    figure = PERPLEXITY.figure()
    assert figure.value == pytest.approx(math.exp(NLL.sum() / TOKENS.sum()))
    expected = quantiles(lambda drawn: math.exp(NLL[:, drawn].sum() / TOKENS[:, drawn].sum()), 25)
    assert (figure.low, figure.high) == pytest.approx(expected, rel=0.01)


def test_a_difference_draws_the_same_prompts_for_both():
    change = OTHER.difference(PERPLEXITY)

    def relative(drawn) -> float:
        mine, theirs = (
            math.exp(sums.numerators[:, drawn].sum() / TOKENS[:, drawn].sum()) for sums in (OTHER, PERPLEXITY)
        )
        return mine / theirs - 1

    assert change.value == pytest.approx(relative(np.arange(25)))
    assert (change.low, change.high) == pytest.approx(quantiles(relative, 25), rel=0.03)
    # The interval of unpaired perplexities is many times wider.
    assert (change.high - change.low) * 3 < (OTHER.figure().high - OTHER.figure().low) / OTHER.figure().value


def test_seeds_of_one_method_and_one_run_of_another():
    """A control that draws has a run per seed, and the base model one."""
    three, one = RNG.normal(size=(3, 10)), RNG.normal(size=(1, 10))
    change = Sums(three, np.ones((3, 10))).difference(Sums(one, np.ones((1, 10))))
    assert change.value == pytest.approx(three.mean() - one.mean())


def test_prompts_without_the_measure_are_left_out_of_both():
    mine = Sums(np.array([[1.0, 0.0, 3.0, 5.0]]), np.array([[1.0, 0.0, 1.0, 1.0]]))
    theirs = Sums(np.array([[1.0, 7.0, 0.0, 2.0]]), np.array([[1.0, 1.0, 0.0, 1.0]]))
    assert mine.figure().value == 3.0 and mine.difference(theirs).value == (1 + 5) / 2 - (1 + 2) / 2
    assert mine.of([1]).figure() is None and mine.of([1, 2]).difference(theirs.of([1, 2])) is None
    assert mine.values() == [[1.0, None, 3.0, 5.0]]


def test_one_prompt_has_no_interval():
    figure = PERPLEXITY.of([3]).figure()
    assert (figure.low, figure.high) == (-math.inf, math.inf)
    assert figure.record() == {"value": figure.value, "low": None, "high": None}


def test_answers_by_hand():
    runs = [
        Answers([[4, 4, 5, 9], [6]], nll=[4.0, 1.5], edited=[[0, 2], []], unsteered=[False, True], seconds=1.0),
        Answers([[7, 8, 7, 8], [9]], nll=[2.0, 0.5], edited=[[1], [0]], unsteered=[False, True], seconds=1.0),
    ]
    counters = {"a": re.compile("a+"), "same": lambda prompt, answer: float(prompt == answer)}
    texts = [["aa b a", "x"], ["", "y"]]
    measured = answer_measures(runs, texts, ["aa b a", "y"], {9}, counters)
    values = {name: sums.values() for name, sums in measured.items()}
    assert values["a"] == [[2, 0], [0, 0]] and values["same"] == [[1, 0], [0, 1]]
    assert values["distinct_1"] == [[2 / 3, 1], [2 / 4, None]]
    assert values["distinct_2"] == [[1, None], [2 / 3, None]]
    assert values["length"] == [[3, 1], [4, 0]] and values["ended"] == [[1, 0], [0, 1]]
    assert values["edited"] == [[2 / 4, 0], [1 / 4, 1]]
    assert values["perplexity"] == [
        [pytest.approx(math.exp(1)), pytest.approx(math.exp(1.5))],
        pytest.approx([math.exp(0.5), math.exp(0.5)]),
    ]
    assert measured["perplexity"].figure().value == pytest.approx(math.exp(8 / 10))
    mean = (math.exp(1) + math.exp(1.5) + 2 * math.exp(0.5)) / 4
    assert measured["answer_perplexity"].figure().value == pytest.approx(mean)


def test_triples_by_hand():
    measured = triple_measures([TripleScores([-1.0, -2.0, -4.0], [-2.0, -2.0, -3.0], None)])
    values = {name: sums.figure().value for name, sums in measured.items()}
    # A tie is no success.
    assert values == pytest.approx({"chosen": -7 / 3, "rejected": -7 / 3, "margin": 0, "accuracy": 1 / 3})


def test_counters():
    assert count("greeting", re.compile("(?i)hello|hi"), "", "Hello, hi there") == 2
    assert count("longer", lambda prompt, answer: len(answer) - len(prompt), "abc", "abcde") == 2
