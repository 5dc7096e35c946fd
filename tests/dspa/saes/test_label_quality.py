"""Agreement with labels by hand."""

from __future__ import annotations

import pytest

from dspa.confusion import Confusion
from dspa.fsrl import LabelError, Labels, compare_labels


def labels_of(confusion: list[list[int]], names: str) -> tuple[Labels, Labels]:
    """Labels and labels by hand whose confusion matrix this is, with those by hand in rows."""
    pairs = [
        (names[i], names[j]) for i, row in enumerate(confusion) for j, count in enumerate(row) for _ in range(count)
    ]
    hand, label = ({n: pair[side] for n, pair in enumerate(pairs)} for side in (0, 1))
    return Labels(label, 100), Labels(hand, 100)


def test_agreement_of_three_categories_by_hand():
    agreement = compare_labels(*labels_of([[5, 1, 0], [2, 3, 1], [0, 0, 4]], "abc"))
    assert (agreement.n, agreement.accuracy, agreement.n_unlabelled) == (16, 12 / 16, 0)
    a, b, c = agreement.per_category
    assert (a.n_hand, a.n_label, a.n_both) == (6, 7, 5)
    assert (a.precision, a.recall, a.f1) == (5 / 7, 5 / 6, 10 / 13)
    assert (b.precision, b.recall, b.f1) == (3 / 4, 3 / 6, 6 / 10)
    assert (c.precision, c.recall, c.f1) == (4 / 5, 1, 8 / 9)
    assert agreement.macro_f1 == pytest.approx((10 / 13 + 6 / 10 + 8 / 9) / 3)
    # c s - sum p t = 12 16 - (7 6 + 4 6 + 5 4) = 106; s^2 less sums of squares: 256 - 90 and 256 - 88.
    assert agreement.mcc == pytest.approx(106 / (166 * 168) ** 0.5)
    low, high = agreement.accuracy_interval()
    assert 0.5 < low < 0.75 < high < 0.92


def test_two_categories_have_matthews_own_coefficient():
    tp, fn, fp, tn = 6, 2, 1, 9
    agreement = compare_labels(*labels_of([[tp, fn], [fp, tn]], "ab"))
    own = (tp * tn - fp * fn) / ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    assert agreement.mcc == pytest.approx(own)


def test_agreement_at_its_ends():
    assert compare_labels(*labels_of([[3, 0], [0, 4]], "ab")).mcc == 1
    assert compare_labels(*labels_of([[0, 3], [4, 0]], "ab")).mcc == -1
    one = compare_labels(*labels_of([[3, 0], [4, 0]], "ab"))
    assert one.mcc == 0
    assert one.per_category[1].precision is None and one.per_category[1].f1 == 0


def test_what_has_one_label_alone_is_told_and_not_compared():
    agreement = compare_labels(Labels({1: "a", 2: "b", 9: "c"}, 10), Labels({1: "a", 2: "a", 3: "b", 4: "b"}, 10))
    assert (agreement.n, agreement.n_unlabelled, agreement.categories) == (2, 2, ["a", "b"])
    with pytest.raises(LabelError, match="None of the 1 latents labelled by hand has a label"):
        compare_labels(Labels({1: "a"}, 10), Labels({2: "a"}, 10))


def test_all_figures_of_a_category():
    """The labels of 300 latents and the shares of all of them, as published for the formatting of a 9B model."""
    hand = {n: "a" if n < 67 else "b" for n in range(300)}
    label = {n: "a" if n < 23 or 67 <= n < 72 else "b" for n in range(300)}
    # Of all labels 1889 in 16384 are of the category.
    label |= {n: "a" if n < 300 + 1889 - 28 else "b" for n in range(300, 16384)}
    agreement = compare_labels(Labels(label, 16384), Labels(hand, 16384))
    a = agreement.per_category[0]
    assert (a.n_hand, a.n_label, a.n_both) == (67, 28, 23)
    assert a.balanced_accuracy == pytest.approx(0.6609, abs=5e-5)
    assert a.mcc == agreement.mcc == pytest.approx(0.4608, abs=5e-5)
    assert (a.mcc_low, a.mcc_high) == pytest.approx(agreement.mcc_interval(), abs=0.01)
    assert a.share == 1889 / 16384
    assert a.corrected_share == pytest.approx(0.29, abs=0.005)
    assert (a.corrected_low, a.corrected_high) == Confusion(23, 44, 5, 228).corrected_share_interval(a.share)
