"""Reports on a map, for judging it before it is used, and comparisons of two maps."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dspa.errors import MapError
from dspa.intervals import jaccard
from dspa.maps.cdmap import N_LARGE, ConditionalDifferenceMap


def summary(cdmap: ConditionalDifferenceMap, delta: float = 0.05) -> dict[str, str]:
    """Describe the gates, rows and columns of a map in words.

    Args:
        cdmap: the map.
        delta: level of the confidence radius.
    """
    n, n_open = cdmap.meta.n_triples, cdmap.n_open
    partly = n_open[cdmap.gate_latents.long()]
    counts = {"ever": int((n_open > 0).sum()), "always": int((n_open == n).sum())}
    beyond = (largest_means(cdmap) > cdmap.radius(delta)) & (n_open > 0)
    entries = int((cdmap.values != 0).sum())
    return {
        "gates ever open": f"{counts['ever']} of {len(n_open)}, {counts['always']} of them on every prompt",
        "prompts of a partly open gate": _describe_quartiles(partly),
        f"radius of their rows (delta {delta:g})": _describe_quartiles(cdmap.radius(delta)[cdmap.gate_latents.long()]),
        "rows with an entry beyond it": f"{int(beyond.sum())} of {counts['ever']}",
        "columns kept": f"{len(cdmap.columns)} of {cdmap.meta.d_sae_out}",
        "entries kept": f"{entries} ({entries / (cdmap.meta.d_sae_in * cdmap.meta.d_sae_out):.3%} of all)",
        "hot latents": _describe_calibration(cdmap),
    }


def largest_means(cdmap: ConditionalDifferenceMap) -> Tensor:
    """Return the largest absolute value per row [d_sae_in], as a mean over the prompts on which its gate is open."""
    return cdmap.values.abs().amax(dim=1) * cdmap.meta.n_triples / cdmap.n_open.clamp(min=1)


def _describe_quartiles(values: Tensor) -> str:
    if not len(values):
        return "none is partly open"
    low, middle, high = values.double().quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    return f"median {middle:.4g}, half of them {low:.4g} to {high:.4g}"


def _describe_calibration(cdmap: ConditionalDifferenceMap) -> str:
    if not len(cdmap.hot):
        return "none: the map has no calibration"
    return f"{len(cdmap.hot)}; the first {N_LARGE} held {cdmap.hot_share():.1%} of the tokens' maxima"


@dataclass(frozen=True)
class Column:
    """An output latent, the sum of its column of A, and the number of rows in which it is not 0."""

    latent: int
    total: float
    n_rows: int


def top_columns(cdmap: ConditionalDifferenceMap, n: int) -> tuple[list[Column], list[Column]]:
    """Return the latents that are augmented and those that are ablated most, by column sum.

    Args:
        cdmap: the map.
        n: number of latents at each end.
    """
    sums = cdmap.values.double().sum(dim=0)
    order = sums.argsort(descending=True, stable=True)

    def columns_at(places: Tensor) -> list[Column]:
        return [
            Column(int(cdmap.columns[j]), float(sums[j]), int((cdmap.values[:, j] != 0).sum())) for j in places.tolist()
        ]

    return columns_at(order[:n]), columns_at(order.flip(0)[:n])


@dataclass(frozen=True)
class MapDifference:
    """Difference of two maps of the same SAEs.

    Attributes:
        settings: metadata that differ, each with the values of both maps.
        columns: number of columns in the first map alone, in both, and in the second alone.
        correlation: Pearson's, over entries that are not 0 in at least one map.
        same_sign: fraction of equal signs, over entries that are not 0 in both maps.
        rows: mean Jaccard index of the `k` lowest latents, over rows that are not empty in at least one map.
        k: number of latents that `rows` compares.
    """

    settings: dict[str, tuple[Any, Any]]
    columns: tuple[int, int, int]
    correlation: float
    same_sign: float
    rows: float
    k: int


def difference(a: ConditionalDifferenceMap, b: ConditionalDifferenceMap) -> MapDifference:
    """Compare two maps.

    Args:
        a: the first map.
        b: the second map.

    Raises:
        MapError: the maps are of different SAEs, so that their latents have nothing in common.
    """
    for name in ("sae_in", "sae_out"):
        if getattr(a.meta, name) != getattr(b.meta, name):
            raise MapError(
                f"The maps are of different SAEs: {name} is {getattr(a.meta, name)} and {getattr(b.meta, name)}; "
                "accepted: two maps of the same SAEs."
            )
    one, other = asdict(a.meta), asdict(b.meta)
    mine, theirs = set(a.columns.tolist()), set(b.columns.tolist())
    union = torch.tensor(sorted(mine | theirs))
    x, y = _values_on(a, union), _values_on(b, union)
    either, both = (x != 0) | (y != 0), (x != 0) & (y != 0)
    k = min(a.meta.k_diff, b.meta.k_diff)
    rows = either.any(dim=1)
    return MapDifference(
        settings={name: (one[name], other[name]) for name in one if one[name] != other[name]},
        columns=(len(mine - theirs), len(mine & theirs), len(theirs - mine)),
        correlation=float(torch.corrcoef(torch.stack((x[either], y[either])))[0, 1]),
        same_sign=float((x[both].sign() == y[both].sign()).double().mean()),
        rows=sum(jaccard(p, q) for p, q in zip(_lowest_places(x[rows], k), _lowest_places(y[rows], k), strict=True))
        / max(1, int(rows.sum())),
        k=k,
    )


def _values_on(cdmap: ConditionalDifferenceMap, latents: Tensor) -> Tensor:
    """Return `A[:, latents]` [d_sae_in, len(latents)] fp64, of latents that include all columns of the map."""
    values = torch.zeros(cdmap.meta.d_sae_in, len(latents), dtype=torch.float64)
    values[:, torch.searchsorted(latents, cdmap.columns.long())] = cdmap.values.double()
    return values


def _lowest_places(rows: Tensor, k: int) -> list[set[int]]:
    """Return the places of the k lowest entries of each row, negative ones only."""
    values, places = rows.topk(min(k, rows.shape[1]), dim=1, largest=False)
    return [set(place[value < 0].tolist()) for value, place in zip(values, places, strict=True)]
