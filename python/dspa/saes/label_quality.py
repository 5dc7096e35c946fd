"""Agreement of labels with labels by hand: accuracy, F1 and Matthews' correlation, from a confusion matrix.

What falls short of full agreement also shows how far the share of a category in all labels is from the true one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dspa.confusion import Confusion, expanded, matthews, matthews_interval
from dspa.errors import LabelError
from dspa.intervals import wilson
from dspa.saes.labels import Labels


@dataclass(frozen=True)
class CategoryAgreement:
    """Agreement on one category.

    Attributes:
        n_hand: latents of the category by hand.
        n_label: latents of the category by label.
        n_both: latents of the category by both.
        precision: `n_both / n_label`, None if `n_label` is 0.
        recall: `n_both / n_hand`, None if `n_hand` is 0.
        f1: `2 n_both / (n_hand + n_label)`.
        balanced_accuracy: mean of the shares of agreement on latents of the category and on others by hand, None if
            there are no such latents.
        mcc: Matthews' correlation of being of the category.
        mcc_low, mcc_high: its bootstrap interval of 95 %.
        share: share of the category in all labels.
        corrected_share: share of latents of the category that the agreement makes of it (`Confusion.corrected_share`),
            None if it shows no more than guesses.
        corrected_low, corrected_high: its bootstrap interval of 95 % over the latents with labels by hand, None without
            a corrected share.
    """

    category: str
    n_hand: int
    n_label: int
    n_both: int
    precision: float | None
    recall: float | None
    f1: float | None
    balanced_accuracy: float | None
    mcc: float
    mcc_low: float
    mcc_high: float
    share: float
    corrected_share: float | None
    corrected_low: float | None
    corrected_high: float | None


@dataclass(frozen=True)
class Agreement:
    """Labels compared with labels by hand, on the latents that have both.

    Attributes:
        categories: names of the K categories.
        confusion: number of latents by their category by hand (rows) and by label (columns) [K, K] int64.
        n_unlabelled: latents labelled only by hand, which count nowhere else.
        shares: share of each category in all labels, those of other latents among them.
    """

    categories: list[str]
    confusion: Tensor
    n_unlabelled: int
    shares: list[float]

    @property
    def n(self) -> int:
        """Number of latents that are compared."""
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        """Share of latents whose category is the same by label and by hand."""
        return int(self.confusion.trace()) / self.n

    def accuracy_interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Return Wilson's interval of the accuracy."""
        return wilson(int(self.confusion.trace()), self.n, confidence)

    @property
    def per_category(self) -> list[CategoryAgreement]:
        """Agreement on each category that occurs by hand or by label."""
        agreements = []
        for name, share, one in zip(self.categories, self.shares, self._confusions, strict=True):
            mcc_low, mcc_high = one.mcc_interval()
            low, high = one.corrected_share_interval(share) or (None, None)
            agreements.append(
                CategoryAgreement(
                    name,
                    n_hand=one.tp + one.fn,
                    n_label=one.tp + one.fp,
                    n_both=one.tp,
                    precision=one.precision,
                    recall=one.recall,
                    f1=one.f1,
                    balanced_accuracy=one.balanced_accuracy,
                    mcc=one.mcc,
                    mcc_low=mcc_low,
                    mcc_high=mcc_high,
                    share=share,
                    corrected_share=one.corrected_share(share),
                    corrected_low=low,
                    corrected_high=high,
                )
            )
        return agreements

    @property
    def macro_f1(self) -> float:
        """Mean F1 of the categories."""
        return sum(one.f1 or 0.0 for one in self._confusions) / len(self.categories)

    @property
    def mcc(self) -> float:
        """Matthews' correlation coefficient of all categories (`matthews`)."""
        return float(matthews(*expanded(self.confusion.numpy())))

    def mcc_interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Return the bootstrap interval of Matthews' correlation coefficient."""
        return matthews_interval(*expanded(self.confusion.numpy()), confidence)

    @property
    def _confusions(self) -> list[Confusion]:
        """Each category against the others, with the labels by hand as the truth."""
        both, hand, label = (
            self.confusion.diag().tolist(),
            self.confusion.sum(1).tolist(),
            self.confusion.sum(0).tolist(),
        )
        return [Confusion(b, h - b, k - b, self.n - h - k + b) for b, h, k in zip(both, hand, label, strict=True)]


def compare_labels(labels: Labels, hand: Labels) -> Agreement:
    """Compare labels with those of a subset by hand, or raise `LabelError` if no latent has both."""
    shared = sorted(labels.categories.keys() & hand.categories.keys())
    if not shared:
        raise LabelError(
            f"None of the {len(hand.categories)} latents labelled by hand has a label; accepted: one or more with both."
        )
    categories = sorted({side.categories[latent] for latent in shared for side in (labels, hand)})
    place = {name: k for k, name in enumerate(categories)}
    confusion = torch.zeros(len(categories), len(categories), dtype=torch.int64)
    for latent in shared:
        confusion[place[hand.categories[latent]], place[labels.categories[latent]]] += 1
    given = list(labels.categories.values())
    shares = [given.count(name) / len(given) for name in categories]
    return Agreement(categories, confusion, len(hand.categories) - len(shared), shares)
