"""Agreement of labels with labels by hand: accuracy, F1 and Matthews' correlation, from a confusion matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

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
    """

    category: str
    n_hand: int
    n_label: int
    n_both: int
    precision: float | None
    recall: float | None
    f1: float


@dataclass(frozen=True)
class Agreement:
    """Labels compared with labels by hand, on the latents that have both.

    Attributes:
        categories: names of the K categories.
        confusion: number of latents by their category by hand (rows) and by label (columns) [K, K] int64.
        n_unlabelled: latents labelled only by hand, which count nowhere else.
    """

    categories: list[str]
    confusion: Tensor
    n_unlabelled: int

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
        for k, name in enumerate(self.categories):
            both = int(self.confusion[k, k])
            hand, label = int(self.confusion[k].sum()), int(self.confusion[:, k].sum())
            precision, recall = both / label if label else None, both / hand if hand else None
            f1 = 2 * both / (hand + label)
            agreements.append(CategoryAgreement(name, hand, label, both, precision, recall, f1))
        return agreements

    @property
    def macro_f1(self) -> float:
        """Mean F1 of the categories."""
        return sum(category.f1 for category in self.per_category) / len(self.categories)

    @property
    def mcc(self) -> float:
        """Matthews' correlation coefficient of several categories.

        Gorodkin's R_K (Computational Biology and Chemistry 28, 2004) is
        `(c s - sum_k p_k t_k) / sqrt((s^2 - sum_k p_k^2) (s^2 - sum_k t_k^2))` with s latents, c of them agreed on,
        and t_k by hand and p_k by label of category k. It is 0 if either has only one category.
        """
        s, c = self.n, int(self.confusion.trace())
        t, p = self.confusion.sum(dim=1).tolist(), self.confusion.sum(dim=0).tolist()
        spread = (s * s - sum(n * n for n in p)) * (s * s - sum(n * n for n in t))
        agreed = c * s - sum(a * b for a, b in zip(p, t, strict=True))
        return agreed / math.sqrt(spread) if spread else 0.0


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
    return Agreement(categories, confusion, len(hand.categories) - len(shared))
