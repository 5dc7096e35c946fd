"""Measures of a method: ratios of sums over prompts or triples, with intervals and paired differences."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any, TypeAlias

import numpy as np

from dspa.errors import refusal
from dspa.evaluate.coherence import distinct
from dspa.evaluate.compare.runs import Answers, TripleScores
from dspa.expressions import compile_expression, count_matches
from dspa.intervals import Values, bootstrap

Counter: TypeAlias = re.Pattern[str] | Callable[[str, str], float]

MARGIN, PERPLEXITY, EDITED, TOUCHED = "margin", "perplexity", "edited", "touched"
# Of a held-out triple: log-probability per token of its responses, their difference, and 1 if that is positive.
OF_TRIPLES = ("chosen", "rejected", MARGIN, "accuracy")
# Of an answer. perplexity: under the base model after the plain prompt, all tokens of all answers weighing the same;
# answer_perplexity: the mean of those of single answers; distinct_n: different n-grams per n-gram; length: in tokens;
# ended: 1 if it ends by itself; edited: share of its tokens that were predicted from an edited residual; touched: share
# of its tokens that a gate let through.
OF_ANSWERS = (
    PERPLEXITY,
    "answer_perplexity",
    "distinct_1",
    "distinct_2",
    "distinct_3",
    "length",
    "ended",
    EDITED,
    TOUCHED,
)


@dataclass(frozen=True)
class Figure:
    """A number, and its 95 % bootstrap interval over prompts or triples, infinite for a single one."""

    value: float
    low: float
    high: float

    def record(self) -> dict[str, float | None]:
        """Return the numbers as JSON can hold them, None for the ends of an infinite interval."""
        return {name: value if math.isfinite(value) else None for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Sums:
    """A measure of one method on U prompts or triples: `sum(numerators) / sum(denominators)`.

    Attributes:
        numerators, denominators: [S, U], one row per seed. A denominator is 0 where an answer does not have the
            measure.
        exponential: True for the exponential of the ratio, as a perplexity is.
    """

    numerators: Values
    denominators: Values
    exponential: bool = False

    def of(self, units: Sequence[int] | None) -> Sums:
        """Return the measure on some prompts or triples alone; None for all."""
        if units is None:
            return self
        return Sums(self.numerators[:, units], self.denominators[:, units], self.exponential)

    def values(self) -> list[list[float | None]]:
        """Return the value of each seed and prompt or triple, None where there is none."""
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = self.numerators / self.denominators
        ratios = np.exp(ratios) if self.exponential else ratios
        return [[None if np.isnan(value) else float(value) for value in row] for row in ratios]

    def figure(self) -> Figure | None:
        """Return the measure with its interval, None where nothing has it. All seeds of a prompt are drawn together."""
        return _figure(self._samples(), self._statistic)

    def difference(self, other: Sums) -> Figure | None:
        """Return how far the measure is above that of another method, on the prompts for which both have it.

        The same prompts are drawn for both. For a perplexity it is relative: 0.1 for ten percent more.
        """

        def statistic(n: Values, d: Values, other_n: Values, other_d: Values, axis: int = -1) -> Any:
            mine, theirs = self._statistic(n, d, axis=axis), other._statistic(other_n, other_d, axis=axis)
            return mine / theirs - 1 if self.exponential else mine - theirs

        return _figure([*self._samples(), *other._samples()], statistic)

    def _samples(self) -> list[Values]:
        return [self.numerators.sum(axis=0), self.denominators.sum(axis=0)]

    def _statistic(self, numerators: Values, denominators: Values, axis: int = -1) -> Any:
        ratio = numerators.sum(axis=axis) / denominators.sum(axis=axis)
        return np.exp(ratio) if self.exponential else ratio


def _figure(samples: Sequence[Values], statistic: Callable[..., Any]) -> Figure | None:
    """Return a statistic of numerators and denominators in turn, over the units that have all of them."""
    there = np.all(samples[1::2], axis=0)
    if not there.any():
        return None
    samples = [sample[there] for sample in samples]
    # One prompt has no interval.
    low, high = bootstrap(samples, statistic) if there.sum() > 1 else (-math.inf, math.inf)
    return Figure(float(statistic(*samples)), low, high)


def check_counters(counters: Mapping[str, Counter]) -> None:
    """Raise `ValueError` for a counter that cannot be called, or has the name of a measure."""
    for name, counter in counters.items():
        if name in (*OF_ANSWERS, *OF_TRIPLES) or not name.strip():
            names = ", ".join((*OF_TRIPLES, *OF_ANSWERS))
            raise refusal(ValueError, "The name of a counter", repr(name), f"any other than {names}")
        if not isinstance(counter, re.Pattern) and not callable(counter):
            got, accepted = f"a {type(counter).__name__}", "a compiled regular expression, or a function"
            raise refusal(ValueError, f"The counter {name!r}", got, f"{accepted} of prompt and answer")
        if isinstance(counter, re.Pattern):
            compile_expression(counter.pattern, counter.flags)


def count(name: str, counter: Counter, prompt: str, answer: str) -> float:
    """Return the matches of a regular expression in an answer, or the value of a function.

    Raises:
        ValueError: a value that is no finite number, or a search that takes too long.
    """
    if isinstance(counter, re.Pattern):
        return float(count_matches(counter, answer))
    value = counter(prompt, answer)
    if not isinstance(value, Real) or not math.isfinite(value):
        raise refusal(ValueError, f"The counter {name!r}", f"a function that returned {value!r}", "a finite number")
    return float(value)


def answer_measures(
    runs: Sequence[Answers],
    texts: Sequence[Sequence[str]],
    prompts: Sequence[str],
    ends: set[int],
    counters: Mapping[str, Counter],
) -> dict[str, Sums]:
    """Return the measures of a method's answers.

    Args:
        runs: the answers, one run per seed.
        texts: their texts, by seed and prompt.
        prompts: texts of the prompts.
        ends: end tokens, which are no part of an answer's n-grams and length.
        counters: of text, by name.
    """
    written = [[ids[:-1] if ids[-1] in ends else ids for ids in run.ids] for run in runs]
    nll = np.array([run.nll for run in runs], dtype=np.float64)
    tokens = np.array([[len(ids) for ids in run.ids] for run in runs], dtype=np.float64)
    measures = {
        name: _means([[count(name, counter, *pair) for pair in zip(prompts, row, strict=True)] for row in texts])
        for name, counter in counters.items()
    }
    measures[PERPLEXITY] = Sums(nll, tokens, exponential=True)
    measures["answer_perplexity"] = _means(np.exp(nll / tokens))
    for n in (1, 2, 3):
        measures[f"distinct_{n}"] = _means([[distinct(ids, n) for ids in row] for row in written])
    measures["length"] = _means([[len(ids) for ids in row] for row in written])
    measures["ended"] = _means([[ids[-1] in ends for ids in run.ids] for run in runs])
    edited = [run.edited for run in runs]
    if None not in edited:
        numbers = [[len(marked) for marked in row or ()] for row in edited]
        measures[EDITED] = Sums(np.array(numbers, dtype=np.float64), tokens)
    touched = [run.touched for run in runs]
    if None not in touched:
        measures[TOUCHED] = Sums(np.array(touched, dtype=np.float64), tokens)
    return measures


def triple_measures(runs: Sequence[TripleScores]) -> dict[str, Sums]:
    """Return the measures of a method's scores of triples, one run per seed."""
    chosen, rejected = (np.array([getattr(run, name) for run in runs]) for name in ("chosen", "rejected"))
    margins = chosen - rejected
    return {
        "chosen": _means(chosen),
        "rejected": _means(rejected),
        MARGIN: _means(margins),
        "accuracy": _means(margins > 0),
    }


def _means(values: Any) -> Sums:
    """Return the measure that is the mean of values [S, U], NaN where there is none."""
    values = np.array(values, dtype=np.float64)
    missing = np.isnan(values)
    return Sums(np.where(missing, 0.0, values), (~missing).astype(np.float64))
