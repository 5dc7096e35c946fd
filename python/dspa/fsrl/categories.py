"""Shares of categories of labelled latents in what an adapter moves."""

from __future__ import annotations

from dataclasses import dataclass

from dspa.fsrl.usage import Usage
from dspa.saes.labels import UNLABELLED, Labels


@dataclass(frozen=True)
class CategoryShare:
    """How much of an adapter's use falls on a category.

    n_latents: labelled latents of it, n_used those that the adapter moves. latents: its share of all labelled latents.
    active, mass: its share of the number of v_j that are not 0, and of the sum of |v_j|, over all latents. Enrichment
    is its share of the use of labelled latents over `latents`. For "unlabelled", `latents` and enrichment are None.
    """

    category: str
    n_latents: int
    n_used: int
    latents: float | None
    active: float
    mass: float
    active_enrichment: float | None
    mass_enrichment: float | None


def category_shares(usage: Usage, labels: Labels) -> list[CategoryShare]:
    """Each category's share of use, the largest mass first, and last what is not labelled.

    Raises `ValueError` for an adapter that moves nothing, labels of another width, and where nothing labelled is moved.
    """
    if len(usage.active) != labels.d_sae:
        raise ValueError(f"The labels are of {labels.d_sae} latents and the use of {len(usage.active)}.")
    members: dict[str, list[int]] = {}
    for latent in range(labels.d_sae):
        members.setdefault(labels.categories.get(latent, UNLABELLED), []).append(latent)
    totals = {name: (usage.active[each].sum().item(), usage.mass[each].sum().item()) for name, each in members.items()}
    all_active, all_mass = float(usage.active.sum()), float(usage.mass.sum())
    rest = totals.get(UNLABELLED, (0, 0.0))
    of_labelled = all_active - rest[0], all_mass - rest[1]
    if not of_labelled[0]:
        raise ValueError(f"The adapter moves {len(usage.ranked)} latents and none of the labelled ones: no shares.")
    found = []
    for name, each in members.items():
        active, mass = totals[name]
        part = None if name == UNLABELLED else len(each) / len(labels.categories)
        enriched = (None, None) if part is None else (active / of_labelled[0] / part, mass / of_labelled[1] / part)
        n_used = int((usage.active[each] > 0).sum())
        found.append(CategoryShare(name, len(each), n_used, part, active / all_active, mass / all_mass, *enriched))
    return sorted(found, key=lambda share: (share.category == UNLABELLED, -share.mass, share.category))
