"""Category shares against a control, with the published counts of DSPA (arXiv 2603.21461)."""

from __future__ import annotations

import pytest

from dspa.audit.shares import compare_shares

# Ablated, augmented and random latents, 50 each.
PUBLISHED = {
    "Content": (5, 7, 18),
    "Discourse": (34, 28, 15),
    "Grammatical": (10, 10, 11),
    "Structure": (1, 5, 6),
}
ABLATED, AUGMENTED, RANDOM = (
    [name for name, counts in PUBLISHED.items() for _ in range(counts[side])] for side in range(3)
)


def test_published_counts():
    ablated = {test.category: test for test in compare_shares(ABLATED, RANDOM)}
    augmented = {test.category: test for test in compare_shares(AUGMENTED, RANDOM)}
    assert list(ablated) == sorted(PUBLISHED)
    assert ablated["Discourse"].p == pytest.approx(0.0003, abs=5e-5)
    assert augmented["Discourse"].p == pytest.approx(0.015, abs=5e-4)
    assert ablated["Content"].p == pytest.approx(0.004, abs=5e-4)
    one = ablated["Discourse"]
    assert (one.n_sample, one.n_control, one.share, one.control_share) == (34, 15, 34 / 50, 15 / 50)
    assert one.share_low < one.share < one.share_high


def test_a_category_of_one_side():
    (a, b) = compare_shares(["a"] * 4, ["b"] * 4)
    # Two of the 70 ways to draw 4 of 8 are as extreme.
    assert (a.category, a.n_sample, a.n_control, a.p) == ("a", 4, 0, pytest.approx(2 / 70))
    assert (b.category, b.n_sample, b.n_control, b.p) == ("b", 0, 4, pytest.approx(2 / 70))


def test_nothing_to_compare():
    with pytest.raises(ValueError, match="The control has no latent with a category"):
        compare_shares(["a"], [])
