"""Figures of four counts, against published ones and the closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dspa.confusion import Confusion, matthews

# Labels of 300 latents by a model, against labels by hand, of the FSRL paper (arXiv 2509.12934): TP, TN, FP, FN, and
# accuracy, MCC, precision, recall and balanced accuracy.
PUBLISHED = {
    "2B alignment": ((27, 227, 22, 24), (0.8467, 0.4482, 0.551, 0.529, 0.7205)),
    "2B formatting": ((69, 201, 5, 25), (0.9000, 0.7637, 0.932, 0.734, 0.8549)),
    "9B alignment": ((27, 238, 24, 11), (0.8833, 0.5480, 0.529, 0.711, 0.8095)),
    "9B formatting": ((23, 228, 5, 44), (0.8367, 0.4608, 0.821, 0.343, 0.6609)),
}


def confusion_of(name: str) -> Confusion:
    (tp, tn, fp, fn), _ = PUBLISHED[name]
    return Confusion(tp=tp, fn=fn, fp=fp, tn=tn)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_figures(name: str):
    one, expected = confusion_of(name), PUBLISHED[name][1]
    assert one.n == 300
    figures = (one.accuracy, one.mcc, one.precision, one.recall, one.balanced_accuracy)
    for figure, value, digits in zip(figures, expected, (4, 4, 3, 3, 4), strict=True):
        assert figure == pytest.approx(value, abs=0.5 * 10**-digits)


def test_the_interval_of_a_correlation():
    """It is near that of the large-sample variance (Bishop, Fienberg and Holland, Discrete Multivariate Analysis).

    The published interval, 0.367 to 0.546, is that of Fisher's z, for correlations of normal variables: too narrow.
    """
    one = confusion_of("9B formatting")
    t, p, r = (one.tp + one.fn) / one.n, (one.tp + one.fp) / one.n, one.mcc
    skew = (2 * t - 1) * (2 * p - 1) / math.sqrt(t * (1 - t) * p * (1 - p))
    spread = (2 * t - 1) ** 2 / (t * (1 - t)) + (2 * p - 1) ** 2 / (p * (1 - p))
    variance = (1 - r**2 + r * (1 + r**2 / 2) * skew - 0.75 * r**2 * spread) / one.n
    half = 1.96 * math.sqrt(variance)
    assert one.mcc_interval() == pytest.approx((r - half, r + half), abs=0.01)


def test_published_shares_corrected_for_errors():
    one = confusion_of("9B formatting")
    # In the sample itself the correction gives the share by hand.
    assert one.corrected_share(28 / 300) == pytest.approx(67 / 300)
    assert one.corrected_share(1889 / 16384) == pytest.approx(0.29, abs=0.005)
    assert one.corrected_share(0.001) == 0
    assert one.corrected_share(0.9) == 1


def test_the_interval_of_a_corrected_share():
    """It is that of draws of the four counts from their multinomial distribution."""
    one, share = confusion_of("9B formatting"), 1889 / 16384
    tp, fn, fp, tn = np.random.default_rng(5).multinomial(300, np.array([23, 44, 5, 228]) / 300, size=100_000).T
    tpr, tnr = tp / (tp + fn), tn / (tn + fp)
    expected = np.quantile((share + tnr - 1) / (tpr + tnr - 1), [0.025, 0.975])
    assert one.corrected_share_interval(share) == pytest.approx(expected, abs=0.01)


def test_draws_that_say_nothing_widen_the_interval_of_a_corrected_share():
    """With four entries, many draws have no positive, or rates that are those of guesses."""
    assert Confusion(tp=1, fn=0, fp=1, tn=2).corrected_share_interval(0.5) == (0, 1)
    assert Confusion(tp=50, fn=0, fp=0, tn=50).corrected_share_interval(0.3) == pytest.approx((0.3, 0.3))
    assert Confusion(tp=2, fn=2, fp=3, tn=3).corrected_share_interval(0.5) is None
    assert Confusion(0, 0, 0, 0).corrected_share_interval(0.5) is None


def test_figures_that_there_are_not():
    nothing = Confusion(0, 0, 0, 0)
    assert nothing.accuracy is nothing.precision is nothing.recall is nothing.balanced_accuracy is nothing.f1 is None
    assert (nothing.mcc, nothing.corrected_share(0.5)) == (0, None)
    assert Confusion(1, 0, 0, 0).mcc_interval() == nothing.mcc_interval() == (-1, 1)
    # Half of the positives and half of the negatives right, as by guessing.
    assert Confusion(2, 2, 3, 3).corrected_share(0.5) is None


def test_outcomes_are_counted():
    one = Confusion.of([True, True, True, False, False], [True, True, False, True, False])
    assert one == Confusion(tp=2, fn=1, fp=1, tn=1)
    assert one.f1 == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))


def test_correlation_along_an_axis():
    g = np.random.default_rng(0)
    truth, given = g.integers(0, 3, (2, 4, 30))
    alone = [matthews(truth[n], given[n]) for n in range(4)]
    assert matthews(truth, given) == pytest.approx(np.array(alone))
    assert matthews(truth.T, given.T, axis=0) == pytest.approx(np.array(alone))
