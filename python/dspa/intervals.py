"""Intervals and overlaps: small statistics that several parts report."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from scipy import stats

Values: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]

RESAMPLES = 9999


def bootstrap(
    samples: Sequence[np.ndarray[Any, Any]], statistic: Callable[..., Any], confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of a statistic of paired samples.

    Args:
        samples: arrays [n] whose n-th entries belong together, and are drawn together.
        statistic: takes the samples [..., n] and `axis`, and returns its value [...].
        confidence: level of the interval.
        seed: of the draws.
    """
    result = stats.bootstrap(
        tuple(samples),
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=1000,
        confidence_level=confidence,
        method="percentile",
        random_state=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def sign_flip_p(differences: Values, seed: int = 0) -> float:
    """Return the two-sided p-value of the sign-flip test that paired differences are as likely above 0 as below.

    Args:
        differences: one per pair [n].
        seed: of the draws of signs, which are all signs that there are for up to 13 pairs.
    """
    if len(differences) == 1:
        # Either sign is as far from 0.
        return 1.0
    test = stats.permutation_test(
        (differences,),
        np.sum,
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=1000,
        random_state=np.random.default_rng(seed),
    )
    return float(test.pvalue)


def wilson(successes: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's interval of `successes / n`.

    Args:
        successes: a whole number, or one with a half, as ties give. The interval then covers those of its neighbours.
        n: number of trials.
        confidence: level of the interval.
    """
    low, high = (
        stats.binomtest(k, n).proportion_ci(confidence, method="wilson")
        for k in (math.floor(successes), math.ceil(successes))
    )
    return float(low.low), float(high.high)


def jaccard(a: set[int], b: set[int]) -> float:
    """Return the Jaccard index of two sets, 1 where both are empty."""
    return len(a & b) / len(a | b) if a | b else 1.0
