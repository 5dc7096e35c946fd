"""Grades of methods: means of judgments with intervals over questions, and paired differences from a baseline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np

from dspa.evaluate.benchmarks import BenchmarkQuestion, QuestionId
from dspa.evaluate.compare.measures import Figure, Sums
from dspa.evaluate.grading.judging import Judgment, Mode
from dspa.intervals import sign_flip_p

# A question, a turn from 1 and a seed from 0.
Place: TypeAlias = tuple[QuestionId, int, int]

WIN, TIE, LOSS = 1.0, 0.5, 0.0


@dataclass(frozen=True)
class Paired:
    """A difference of means over what two methods both have.

    Attributes:
        figure: the difference.
        p: two-sided p-value of the sign-flip test over questions.
        n_questions: number of questions that both have.
    """

    figure: Figure
    p: float
    n_questions: int

    def record(self) -> dict[str, Any]:
        """Return the numbers as JSON can hold them."""
        return {**self.figure.record(), "p": self.p, "n_questions": self.n_questions}


class MethodGrades:
    """Grades of one method in one mode: its ratings, or its comparisons with the baseline.

    A comparison has the value 1 if the method's answer is better in both orders, 0 if the baseline's is, and else 0.5,
    a tie. Intervals are of 95 %, by bootstrap over questions: all turns and seeds of a question are drawn together,
    because they do not vary independently.

    Attributes:
        judgments: its judgments.
        values: ratings, or values of comparisons, by question, turn and seed; None where an answer of the judge could
            not be read.
    """

    def __init__(self, judgments: Sequence[Judgment], questions: Sequence[BenchmarkQuestion]) -> None:
        """Collect the judgments of one method in one mode, about these questions."""
        self.judgments = judgments
        self._categories = {question.id: question.category for question in questions}
        by_place: dict[Place, list[float | None]] = {}
        for one in judgments:
            by_place.setdefault((one.task.question.id, one.task.turn, one.task.seed), []).append(one.value)
        self.values = {place: _agreed(values) for place, values in by_place.items()}

    @property
    def method(self) -> str:
        """Name of the method."""
        return self.judgments[0].task.method

    @property
    def mode(self) -> Mode:
        """Mode of all judgments."""
        return self.judgments[0].task.mode

    @property
    def turns(self) -> list[int]:
        """Turns, from 1."""
        return sorted({turn for _, turn, _ in self.values})

    @property
    def categories(self) -> list[str]:
        """Categories of the questions, in their order."""
        return list(dict.fromkeys(self._categories.values()))

    def mean(self, turn: int | None = None, category: str | None = None) -> Figure | None:
        """Return the mean of all values, or of those of a turn or a category; None without any."""
        return self._sums(
            (place[0], value)
            for place, value in self.values.items()
            if turn in (None, place[1]) and category in (None, self._categories[place[0]])
        ).figure()

    def over(self, other: MethodGrades) -> Paired | None:
        """Return how far the mean is above that of another method, None where they share no value."""
        shared = [place for place, value in self.values.items() if None not in (value, other.values.get(place))]
        mine, theirs = (self._sums((place[0], one.values[place]) for place in shared) for one in (self, other))
        figure = mine.difference(theirs)
        if figure is None:
            return None
        apart = (mine.numerators - theirs.numerators)[mine.denominators > 0]
        return Paired(figure, sign_flip_p(apart), len(apart))

    @property
    def n_answered(self) -> int:
        """Number of values."""
        return len(self.values) - self.n_unanswered

    @property
    def n_unanswered(self) -> int:
        """Number of ratings without a value, or of comparisons without an answer in one of the two orders."""
        return list(self.values.values()).count(None)

    @property
    def n_questions(self) -> int:
        """Number of questions with a value."""
        return len({place[0] for place, value in self.values.items() if value is not None})

    @property
    def problem(self) -> str:
        """Why the first of the unanswered ones is unanswered, or empty."""
        return next((one.answer.problem for one in self.judgments if one.answer.problem), "")

    @property
    def mean_of_categories(self) -> float | None:
        """Mean of the means of categories, None if one of them has no value."""
        figures = [self.mean(category=category) for category in self.categories]
        values = [figure.value for figure in figures if figure is not None]
        return float(np.mean(values)) if len(values) == len(figures) else None

    def count(self, value: float) -> int:
        """Return the number of comparisons of this value: `WIN`, `TIE` or `LOSS`."""
        return list(self.values.values()).count(value)

    def share(self, value: float) -> Figure | None:
        """Return the share of comparisons of this value: `WIN`, `TIE` or `LOSS`."""
        return self._sums(
            (place[0], None if one is None else one == value) for place, one in self.values.items()
        ).figure()

    @cached_property
    def p(self) -> float | None:
        """Two-sided p-value of the sign-flip test over questions that wins and losses are equally likely."""
        sums = self._sums((place[0], None if value is None else value - TIE) for place, value in self.values.items())
        there = sums.denominators > 0
        return sign_flip_p(sums.numerators[there]) if there.any() else None

    @cached_property
    def first_wins(self) -> Figure | None:
        """Share of verdicts for the answer that is shown first, among those that are no tie.

        Each answer is shown first once, so that it is 0.5 for a judge that does not look at the order.
        """
        verdicts = ((one.task.question.id, one.answer.value) for one in self.judgments)
        return self._sums(
            (question, verdict == "A") for question, verdict in verdicts if verdict in ("A", "B")
        ).figure()

    def record(self) -> dict[str, Any]:
        """Return all figures as JSON can hold them."""
        figures = {"mean": self.mean()}
        if self.mode == "pairwise":
            figures |= {"wins": self.share(WIN), "ties": self.share(TIE), "losses": self.share(LOSS)}
            figures |= {"first_wins": self.first_wins}
        return {
            **{name: _record(figure) for name, figure in figures.items()},
            **({"p": self.p} if self.mode == "pairwise" else {}),
            "n_asked": len(self.values),
            "n_unanswered": self.n_unanswered,
            "n_questions": self.n_questions,
            "turns": {turn: _record(self.mean(turn=turn)) for turn in self.turns},
            "categories": {category: _record(self.mean(category=category)) for category in self.categories},
            "mean_of_categories": self.mean_of_categories,
        }

    def _sums(self, values: Iterable[tuple[QuestionId, float | None]]) -> Sums:
        """Return the mean of values by question, as sums."""
        columns = {question: n for n, question in enumerate(self._categories)}
        numerators, denominators = np.zeros((2, 1, len(columns)))
        for question, value in values:
            if value is not None:
                numerators[0, columns[question]] += value
                denominators[0, columns[question]] += 1
        return Sums(numerators, denominators)


def _agreed(values: Sequence[float | None]) -> float | None:
    """Return a rating, or the value of a comparison from those of its two orders."""
    if None in values:
        return None
    return values[0] if len(set(values)) == 1 else TIE


def _record(figure: Figure | None) -> dict[str, float | None] | None:
    return figure.record() if figure else None
