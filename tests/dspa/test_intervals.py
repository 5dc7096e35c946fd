"""Intervals against their closed forms."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from dspa.intervals import bootstrap, sign_flip_p, wilson

from ..rounding import rounding


@pytest.mark.parametrize(("k", "n"), [(0, 5), (7, 20), (20, 20)])
def test_wilson_is_the_closed_form(k, n):
    z, p = 1.959963984540054, k / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    apart = rounding(20, 1.0, torch.float64)
    assert wilson(k, n) == pytest.approx((max(0.0, middle - half), min(1.0, middle + half)), rel=0, abs=apart)


def test_a_bootstrap_draws_paired_samples_together():
    """The difference of two samples that differ by a constant has no width; that of their means apart would."""
    one = np.random.default_rng(0).normal(size=30)

    def difference(a, b, axis=-1):
        return a.mean(axis=axis) - b.mean(axis=axis)

    assert bootstrap([one + 2, one], difference) == pytest.approx((2, 2))


def test_a_bootstrap_of_a_mean_is_near_the_normal_interval():
    values = np.random.default_rng(0).normal(size=400)
    half = 1.959963984540054 * values.std() / math.sqrt(400)
    expected = values.mean() - half, values.mean() + half
    # The ends of 9999 draws are known to about 0.025 deviations.
    assert bootstrap([values], np.mean) == pytest.approx(expected, abs=0.05 * values.std() / math.sqrt(400))
    assert bootstrap([values], np.mean, seed=1) != bootstrap([values], np.mean)


def test_the_sign_flip_test_counts_signs():
    differences = np.array([0.5, 2.0, -1.0, 3.0, 1.0])
    sums = [np.dot(signs, differences) for signs in itertools.product((1, -1), repeat=5)]
    expected = np.mean(np.abs(sums) >= differences.sum() - 1e-9)
    assert sign_flip_p(differences) == pytest.approx(expected)
    assert sign_flip_p(-differences) == pytest.approx(expected)
    assert sign_flip_p(np.zeros(4)) == sign_flip_p(np.array([3.0])) == 1


def test_the_sign_flip_test_of_many_is_near_the_t_test():
    differences = np.random.default_rng(0).normal(0.15, 1, size=200)
    t = differences.mean() / differences.std(ddof=1) * math.sqrt(200)
    expected = math.erfc(abs(t) / math.sqrt(2))
    assert 0.01 < expected < 0.2 and sign_flip_p(differences) == pytest.approx(expected, abs=0.015)
