"""Intervals and overlaps: small statistics that several parts report."""

from __future__ import annotations

import math

from scipy.stats import binomtest


def wilson(successes: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's interval of `successes / n`.

    Args:
        successes: a whole number, or one with a half, as ties give. The interval then covers those of its neighbours.
        n: number of trials.
        confidence: level of the interval.
    """
    low, high = (
        binomtest(k, n).proportion_ci(confidence, method="wilson")
        for k in (math.floor(successes), math.ceil(successes))
    )
    return float(low.low), float(high.high)


def jaccard(a: set[int], b: set[int]) -> float:
    """Return the Jaccard index of two sets, 1 where both are empty."""
    return len(a & b) / len(a | b) if a | b else 1.0
