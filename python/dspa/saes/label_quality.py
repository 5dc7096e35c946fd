"""How well labels agree with labels by hand: accuracy, F1 and Matthews' correlation, from a confusion matrix."""

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
    """A category: how many latents are of it by hand and by label, and how well the two agree. Precision is None where
    no label is of it, and recall where none by hand is."""

    category: str
    n_hand: int
    n_label: int
    n_both: int
    precision: float | None
    recall: float | None
    f1: float


@dataclass(frozen=True)
class Agreement:
    """Labels beside labels by hand, on the latents that have both.

    confusion [K, K] int64: latents by their category by hand (rows) and by label (columns), in the order of
    `categories`. n_unlabelled: latents labelled by hand alone, which count nowhere else.
    """

    categories: list[str]
    confusion: Tensor
    n_unlabelled: int

    @property
    def n(self) -> int:
        """Latents that are compared."""
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        """Share of latents of the same category by label as by hand."""
        return int(self.confusion.trace()) / self.n

    def accuracy_interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Wilson's interval of the accuracy."""
        return wilson(int(self.confusion.trace()), self.n, confidence)

    @property
    def per_category(self) -> list[CategoryAgreement]:
        """Each category that is given by hand or by label; F1 = 2 n_both / (n_hand + n_label)."""
        found = []
        for k, name in enumerate(self.categories):
            both = int(self.confusion[k, k])
            hand, label = int(self.confusion[k].sum()), int(self.confusion[:, k].sum())
            precision, recall = both / label if label else None, both / hand if hand else None
            found.append(CategoryAgreement(name, hand, label, both, precision, recall, 2 * both / (hand + label)))
        return found

    @property
    def macro_f1(self) -> float:
        """Mean F1 of the categories."""
        return sum(each.f1 for each in self.per_category) / len(self.categories)

    @property
    def mcc(self) -> float:
        """Matthews' correlation coefficient of several categories, Gorodkin's R_K (Computational Biology and Chemistry
        28, 2004): `(c s - sum_k p_k t_k) / sqrt((s^2 - sum_k p_k^2) (s^2 - sum_k t_k^2))` with s latents, c of them
        agreed on, and t_k by hand and p_k by label of category k. 0 where either knows one category alone."""
        s, c = self.n, int(self.confusion.trace())
        t, p = self.confusion.sum(dim=1).tolist(), self.confusion.sum(dim=0).tolist()
        spread = (s * s - sum(each * each for each in p)) * (s * s - sum(each * each for each in t))
        agreed = c * s - sum(a * b for a, b in zip(p, t, strict=True))
        return agreed / math.sqrt(spread) if spread else 0.0


def compare_labels(labels: Labels, hand: Labels) -> Agreement:
    """Compare labels with those of a subset by hand. Raises `LabelError` where no latent has both."""
    shared = sorted(labels.categories.keys() & hand.categories.keys())
    if not shared:
        raise LabelError(
            f"None of the {len(hand.categories)} latents labelled by hand has a label; accepted: one or more that has."
        )
    categories = sorted({each.categories[latent] for latent in shared for each in (labels, hand)})
    place = {name: k for k, name in enumerate(categories)}
    confusion = torch.zeros(len(categories), len(categories), dtype=torch.int64)
    for latent in shared:
        confusion[place[hand.categories[latent]], place[labels.categories[latent]]] += 1
    return Agreement(categories, confusion, len(hand.categories) - len(shared))
