"""Comparison of two maps of the same SAEs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dspa.errors import MapError
from dspa.intervals import jaccard
from dspa.maps.cdmap import ConditionalDifferenceMap


@dataclass(frozen=True)
class MapDifference:
    """Difference of two maps of the same SAEs.

    Attributes:
        settings: metadata that differ, each with the values of both maps.
        columns: number of columns in the first map alone, in both, and in the second alone.
        correlation: Pearson's, over entries that are not 0 in at least one map; None where it is not defined, as of a
            single entry.
        same_sign: fraction of equal signs, over entries that are not 0 in both maps; None if there are none.
        rows: mean Jaccard index of the `k` lowest latents with negative entries, over rows that have such entries in at
            least one map; None if there are none.
        k: number of latents that `rows` compares.
    """

    settings: dict[str, tuple[Any, Any]]
    columns: tuple[int, int, int]
    correlation: float | None
    same_sign: float | None
    rows: float | None
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
    ablating = ((x < 0) | (y < 0)).any(dim=1)
    lowest = zip(_lowest_places(x[ablating], k), _lowest_places(y[ablating], k), strict=True)
    return MapDifference(
        settings={name: (one[name], other[name]) for name in one if one[name] != other[name]},
        columns=(len(mine - theirs), len(mine & theirs), len(theirs - mine)),
        correlation=_correlation(x[either], y[either]),
        same_sign=_defined((x[both].sign() == y[both].sign()).double().mean()),
        rows=_defined(torch.tensor([jaccard(p, q) for p, q in lowest], dtype=torch.float64).mean()),
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


def _correlation(x: Tensor, y: Tensor) -> float | None:
    """Return Pearson's correlation, None of a single pair or of equal values."""
    return _defined(torch.corrcoef(torch.stack((x, y)))[0, 1]) if len(x) > 1 else None


def _defined(value: Tensor) -> float | None:
    """Return a number, None in place of NaN: the mean of nothing, a correlation with what does not vary."""
    return None if bool(value.isnan()) else float(value)
