"""Shares of categories in a sample of latents, against a control."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

from dspa.intervals import wilson


@dataclass(frozen=True)
class CategoryTest:
    """Share of a category in a sample, against that in a control.

    Attributes:
        category: name of the category.
        n_sample: latents of the category in the sample.
        n_control: latents of the category in the control.
        share: share of the category in the sample.
        share_low, share_high: its interval of 95 %, by Wilson.
        control_share: share of the category in the control.
        p: two-sided p-value of Fisher's exact test that both shares are the same. It is of one test: with several
            categories and samples, some are small by chance.
    """

    category: str
    n_sample: int
    n_control: int
    share: float
    share_low: float
    share_high: float
    control_share: float
    p: float


def compare_shares(sample: Sequence[str], control: Sequence[str]) -> list[CategoryTest]:
    """Compare the share of each category in a sample of latents with its share in a control.

    Args:
        sample: categories of the latents of the sample.
        control: categories of the latents of the control.

    Returns:
        One test per category of either, by its name.

    Raises:
        ValueError: an empty sample or control.
    """
    for name, categories in (("sample", sample), ("control", control)):
        if not categories:
            raise ValueError(f"The {name} has no latent with a category; accepted: one or more in both.")
    counts, others = Counter(sample), Counter(control)
    tests = []
    for category in sorted(counts | others):
        n, m = counts[category], others[category]
        low, high = wilson(n, len(sample))
        p = stats.fisher_exact([[n, len(sample) - n], [m, len(control) - m]]).pvalue
        tests.append(CategoryTest(category, n, m, n / len(sample), low, high, m / len(control), float(p)))
    return tests
