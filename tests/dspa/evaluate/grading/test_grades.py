"""Grades of methods against means, intervals and tests that are computed by other means."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from statistics import mean

import numpy as np
import pytest

from dspa.evaluate.benchmarks import BenchmarkQuestion
from dspa.evaluate.grading.grades import LOSS, TIE, WIN, MethodGrades
from dspa.evaluate.grading.judging import Judgment, Task
from dspa.judges.questions import Answer, Question, chat

ASKED = Question(chat("x"), float)


def questions(*categories: str) -> list[BenchmarkQuestion]:
    return [BenchmarkQuestion(n, category, ("?", "?"), ("", "")) for n, category in enumerate(categories)]


QUESTIONS = questions("a", "a", "b")


def rated(
    values: Mapping[tuple[int, int, int], float | None], asked: list[BenchmarkQuestion] = QUESTIONS
) -> MethodGrades:
    """Ratings by question, turn and seed."""
    judgments = [
        Judgment(
            Task("single", asked[n], "m", turn, seed, "", ASKED),
            Answer(value, "text", "" if value is not None else f"unread {n}"),
        )
        for (n, turn, seed), value in values.items()
    ]
    return MethodGrades(judgments, asked)


def compared(verdicts: Mapping[tuple[int, int, int], str], asked: list[BenchmarkQuestion] = QUESTIONS) -> MethodGrades:
    """Two verdicts per question, turn and seed: of the order with the method first, and of that with it second."""
    judgments = [
        Judgment(
            Task("pairwise", asked[n], "m", turn, seed, first, ASKED),
            Answer(None if verdict == "-" else verdict, "text", "unread" if verdict == "-" else ""),
        )
        for (n, turn, seed), pair in verdicts.items()
        for first, verdict in zip(("m", "base"), pair, strict=True)
    ]
    return MethodGrades(judgments, asked)


def test_means_of_turns_and_categories():
    one = rated({(0, 1, 0): 2, (0, 2, 0): 4, (1, 1, 0): 6, (1, 2, 0): 9, (2, 1, 0): 7, (2, 2, 0): 8})
    assert one.mean().value == 6
    assert [one.mean(turn=turn).value for turn in one.turns] == [5, 7]
    assert [one.mean(category=name).value for name in one.categories] == [5.25, 7.5]
    assert one.mean_of_categories == 6.375
    assert one.n_unanswered == 0 and one.n_questions == 3


def test_what_is_unanswered_is_counted_and_in_no_mean():
    one = rated({(0, 1, 0): 2, (0, 2, 0): None, (1, 1, 0): 6, (1, 2, 0): 8, (2, 1, 0): None, (2, 2, 0): None})
    assert one.mean().value == pytest.approx(16 / 3)
    assert (one.n_unanswered, one.n_answered, one.n_questions, one.problem) == (3, 3, 2, "unread 0")
    assert one.mean(category="b") is None and one.mean_of_categories is None
    nothing = rated({(0, 1, 0): None})
    assert nothing.mean() is None and nothing.over(nothing) is None
    assert nothing.record()["mean"] is None


def test_questions_are_drawn_whole():
    """Answers of the same rating by more seeds are no more evidence, and the interval stays as wide."""
    rng = np.random.default_rng(0)
    ratings = rng.integers(1, 11, size=40).astype(float)
    asked = questions(*"a" * 40)
    once = rated({(n, 1, 0): value for n, value in enumerate(ratings)}, asked).mean()
    often = rated({(n, turn, s): v for n, v in enumerate(ratings) for turn in (1, 2) for s in range(3)}, asked).mean()
    assert once == often
    draws = ratings[rng.integers(0, 40, size=(20000, 40))].mean(axis=1)
    expected = np.quantile(draws, [0.025, 0.975])
    assert (once.low, once.high) == pytest.approx(expected, abs=0.05)


def test_differences_use_what_both_methods_have():
    mine = rated({(0, 1, 0): 8, (0, 2, 0): 10, (1, 1, 0): 5, (2, 1, 0): None, (2, 2, 0): 3})
    base = rated({(0, 1, 0): 7, (0, 2, 0): None, (1, 1, 0): 3, (2, 1, 0): 9, (2, 2, 0): 3})
    paired = mine.over(base)
    # Question 0 by its first turn, 1, and 2 by its second turn.
    assert paired.figure.value == pytest.approx(mean([1, 2, 0])) and paired.n_questions == 3
    # Of the eight signs of (1, 2, 0), four give a sum as far from 0 as 3.
    assert paired.p == pytest.approx(4 / 8)
    assert base.over(mine).figure.value == -paired.figure.value
    assert mine.over(rated({(2, 1, 0): 4})) is None


def test_the_paired_test_is_the_sign_flip_test_of_questions():
    differences = [3, 1, -1, 2, 2, 0, 4, 1]
    asked = questions(*"a" * 8)
    # Each question has two turns, whose differences add up.
    mine = rated({(n, turn, 0): 5 + d for n, d in enumerate(differences) for turn in (1, 2)}, asked)
    base = rated({(n, turn, 0): 5 for n in range(8) for turn in (1, 2)}, asked)
    sums = [
        sum(s * d for s, d in zip(signs, differences, strict=True)) for signs in itertools.product((1, -1), repeat=8)
    ]
    expected = mean(abs(one) >= sum(differences) for one in sums)
    paired = mine.over(base)
    assert paired.p == pytest.approx(expected) and paired.figure.value == pytest.approx(1.5)


def test_a_win_is_one_in_both_orders():
    """The two verdicts are of the method as A, and of it as B."""
    pairs = {"AB": WIN, "BA": LOSS, "AA": TIE, "BB": TIE, "CC": TIE, "AC": TIE, "CA": TIE, "CB": TIE, "BC": TIE}
    unread = {"A-": None, "--": None, "-B": None}
    for pair, value in {**pairs, **unread}.items():
        assert list(compared({(0, 1, 0): pair}).values.values()) == [value], pair


def test_comparisons():
    one = compared(
        {(0, 1, 0): "AB", (0, 2, 0): "AB", (1, 1, 0): "BA", (1, 2, 0): "AA", (2, 1, 0): "CC", (2, 2, 0): "A-"}
    )
    assert [one.count(value) for value in (WIN, TIE, LOSS)] == [2, 2, 1] and one.n_unanswered == 1
    assert [one.share(value).value for value in (WIN, TIE, LOSS)] == [0.4, 0.4, 0.2]
    assert one.mean().value == pytest.approx(3 / 5)
    assert one.mean(turn=1).value == pytest.approx(0.5) and one.mean(turn=2).value == 0.75
    # A won in six of the nine verdicts that are no tie: A, A; B, A... of each pair the first and the second.
    verdicts = "ABABBAAAA"
    assert one.first_wins.value == pytest.approx(verdicts.count("A") / len(verdicts))
    # Values minus a half by question: 1, -0.5, 0. Four of eight signs reach 0.5: +1 -0.5 and all that are farther.
    signs = list(itertools.product((1, -1), repeat=2))
    assert one.p == pytest.approx(mean(abs(a - 0.5 * b) >= 0.5 for a, b in signs))


def test_a_judge_that_takes_the_first_answer_shows_it():
    one = compared({(n, 1, 0): "AA" for n in range(3)})
    assert one.first_wins.value == 1 and one.count(TIE) == 3 and one.mean().value == 0.5 and one.p == 1
    assert compared({(0, 1, 0): "CC"}).first_wins is None


def test_one_question_has_no_interval():
    asked = questions("a")
    one, other = rated({(0, 1, 0): 4}, asked), rated({(0, 1, 0): 2}, asked)
    assert one.record()["mean"] == {"value": 4.0, "low": None, "high": None}
    assert one.over(other).record() == {"value": 2.0, "low": None, "high": None, "p": 1.0, "n_questions": 1}
    assert compared({(0, 1, 0): "AB"}, asked).record()["p"] == 1
