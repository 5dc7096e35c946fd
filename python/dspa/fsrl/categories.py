"""Shares of label categories in what an adapter moves."""

from __future__ import annotations

from dataclasses import dataclass

from dspa.fsrl.usage import Usage
from dspa.saes.labels import UNLABELLED, Labels


@dataclass(frozen=True)
class CategoryShare:
    """Share of a category in an adapter's use of latents.

    Enrichment is the category's share of the use of labelled latents, divided by its share of labelled latents. For
    "unlabelled", `latents` and enrichment are None.

    Attributes:
        category: name of the category.
        n_latents: number of its latents.
        n_used: number of its latents that the adapter moves.
        latents: its share of all labelled latents.
        active: its share of the nonzero v_j of all latents.
        mass: its share of the sum of |v_j| of all latents.
        active_enrichment: enrichment by number of nonzero v_j.
        mass_enrichment: enrichment by sum of |v_j|.
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
    """Return each category's share of use, by falling mass, and last what is not labelled.

    Raises:
        ValueError: labels of another width, or no labelled latent that the adapter moves.
    """
    if len(usage.active) != labels.d_sae:
        raise ValueError(f"The labels are of {labels.d_sae} latents and the usage is of {len(usage.active)}.")
    members: dict[str, list[int]] = {}
    for latent in range(labels.d_sae):
        members.setdefault(labels.categories.get(latent, UNLABELLED), []).append(latent)
    totals = {
        name: (usage.active[latents].sum().item(), usage.mass[latents].sum().item())
        for name, latents in members.items()
    }
    all_active, all_mass = float(usage.active.sum()), float(usage.mass.sum())
    unlabelled_active, unlabelled_mass = totals.get(UNLABELLED, (0, 0.0))
    labelled_active, labelled_mass = all_active - unlabelled_active, all_mass - unlabelled_mass
    if not labelled_active:
        raise ValueError(f"The adapter moves {len(usage.moved)} latents and none of the labelled ones: no shares.")
    shares = []
    for name, latents in members.items():
        active, mass = totals[name]
        part = None if name == UNLABELLED else len(latents) / len(labels.categories)
        enriched = (None, None) if part is None else (active / labelled_active / part, mass / labelled_mass / part)
        n_used = int((usage.active[latents] > 0).sum())
        shares.append(CategoryShare(name, len(latents), n_used, part, active / all_active, mass / all_mass, *enriched))
    return sorted(shares, key=lambda share: (share.category == UNLABELLED, -share.mass, share.category))
