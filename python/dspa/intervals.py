"""Intervals and overlaps: the small statistics that several parts report."""

from __future__ import annotations

import math

from scipy.stats import binomtest


def wilson(successes: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of `successes / n`; of a number with a half, what the intervals of its neighbours cover."""
    low, high = (
        binomtest(k, n).proportion_ci(confidence, method="wilson")
        for k in (math.floor(successes), math.ceil(successes))
    )
    return float(low.low), float(high.high)


def jaccard(a: set[int], b: set[int]) -> float:
    """Shared ones over those of either; 1 for two empty sets."""
    return len(a & b) / len(a | b) if a | b else 1.0
