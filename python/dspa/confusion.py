"""Answers compared with the truth: counts of the four outcomes, and the figures that they give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from dspa.intervals import bootstrap

Categories: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Confusion:
    """Numbers of true and false positives and negatives.

    Attributes:
        tp: positives that are given as positive.
        fn: positives that are given as negative.
        fp: negatives that are given as positive.
        tn: negatives that are given as negative.
    """

    tp: int
    fn: int
    fp: int
    tn: int

    @classmethod
    def of(cls, truth: Sequence[bool], given: Sequence[bool]) -> Confusion:
        """Count the outcomes of answers `given` to questions whose answers are `truth`."""
        pairs = list(zip(truth, given, strict=True))
        return cls(*(pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False))))

    @property
    def n(self) -> int:
        """Number of all."""
        return self.tp + self.fn + self.fp + self.tn

    @property
    def accuracy(self) -> float | None:
        """Share of right ones, None if there are none at all."""
        return _ratio(self.tp + self.tn, self.n)

    @property
    def precision(self) -> float | None:
        """Share of positives in what is given as positive, None if nothing is."""
        return _ratio(self.tp, self.tp + self.fp)

    @property
    def recall(self) -> float | None:
        """Share of the positives that are given as positive (TPR), None if there are none."""
        return _ratio(self.tp, self.tp + self.fn)

    @property
    def specificity(self) -> float | None:
        """Share of the negatives that are given as negative (TNR), None if there are none."""
        return _ratio(self.tn, self.tn + self.fp)

    @property
    def balanced_accuracy(self) -> float | None:
        """`(TPR + TNR) / 2`, None without positives or negatives. Guessing gives 0.5."""
        tpr, tnr = self.recall, self.specificity
        return None if tpr is None or tnr is None else (tpr + tnr) / 2

    @property
    def f1(self) -> float | None:
        """`2 tp / (2 tp + fp + fn)`, None if nothing is positive or given as positive."""
        return _ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    @property
    def mcc(self) -> float:
        """Matthews' correlation coefficient, 0 if either side has only one value."""
        return float(matthews(*self.samples))

    def mcc_interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Return the bootstrap interval of Matthews' correlation coefficient."""
        return matthews_interval(*self.samples, confidence)

    def corrected_share(self, share: float) -> float | None:
        """Return the share of positives in a population of which this share is given as positive.

        Rogan and Gladen's estimate (American Journal of Epidemiology 107, 1978) is
        `(share + TNR - 1) / (TPR + TNR - 1)`, here within 0 to 1. It takes both rates to be those of the population.

        Args:
            share: share of what is given as positive.

        Returns:
            None if the rates are unknown, or no better than those of guessing.
        """
        tpr, tnr = self.recall, self.specificity
        if tpr is None or tnr is None or tpr + tnr <= 1:
            return None
        return min(1.0, max(0.0, (share + tnr - 1) / (tpr + tnr - 1)))

    def corrected_share_interval(self, share: float, confidence: float = 0.95) -> tuple[float, float] | None:
        """Return the bootstrap interval of `corrected_share`, None where there is none.

        The entries are drawn, and `share` is taken to be exact. A draw whose rates are no better than guesses says
        nothing: it counts as 0 for the lower end, and as 1 for the upper one.
        """
        if self.corrected_share(share) is None:
            return None
        low, high = (bootstrap(self.samples, partial(_corrected, share, nothing), confidence) for nothing in (0.0, 1.0))
        return low[0], high[1]

    @property
    def samples(self) -> tuple[Categories, Categories]:
        """The truth and what is given, 0 or 1, [n] each."""
        counts = np.array([[self.tn, self.fp], [self.fn, self.tp]])
        return expanded(counts)


def expanded(confusion: np.ndarray[Any, Any]) -> tuple[Categories, Categories]:
    """Return the categories of single entries, by the truth (rows) and as given (columns) of their counts [K, K]."""
    rows, columns = np.indices(confusion.shape)
    counts = confusion.flatten()
    return np.repeat(rows.flatten(), counts), np.repeat(columns.flatten(), counts)


def matthews(truth: Categories, given: Categories, axis: int = -1) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return Matthews' correlation coefficient of several categories, 0 where either side has only one.

    Gorodkin's R_K (Computational Biology and Chemistry 28, 2004) is
    `(c s - sum_k p_k t_k) / sqrt((s^2 - sum_k p_k^2) (s^2 - sum_k t_k^2))` with s entries, c of them agreed on, and t_k
    by the truth and p_k as given of category k. For two categories it is Matthews' own.

    Args:
        truth: categories [..., s], numbers from 0.
        given: categories [..., s].
        axis: the axis of the entries.
    """
    s, c = truth.shape[axis], (truth == given).sum(axis=axis)
    kinds = range(1 + max(truth.max(initial=0), given.max(initial=0)))
    t, p = (np.stack([(side == k).sum(axis=axis) for k in kinds]).astype(float) for side in (truth, given))
    spread = (s * s - (p * p).sum(axis=0)) * (s * s - (t * t).sum(axis=0))
    return np.where(spread > 0, (c * s - (p * t).sum(axis=0)) / np.sqrt(np.where(spread > 0, spread, 1)), 0)


def matthews_interval(truth: Categories, given: Categories, confidence: float = 0.95) -> tuple[float, float]:
    """Return the bootstrap interval of Matthews' correlation coefficient of entries [s]; -1 to 1 for a single one."""
    return bootstrap((truth, given), matthews, confidence) if len(truth) > 1 else (-1.0, 1.0)


def _corrected(
    share: float, nothing: float, truth: Categories, given: Categories, axis: int = -1
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the corrected share by entries of 0 and 1 [..., n], `nothing` where rates are no better than guesses."""
    with np.errstate(divide="ignore", invalid="ignore"):
        tpr = (truth * given).sum(axis=axis) / truth.sum(axis=axis)
        tnr = ((1 - truth) * (1 - given)).sum(axis=axis) / (1 - truth).sum(axis=axis)
        corrected = (share + tnr - 1) / (tpr + tnr - 1)
    return np.where(tpr + tnr > 1, np.clip(corrected, 0, 1), nothing)


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
