"""What a person wants to know of a map before trusting it, and of two maps beside each other."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dspa.errors import MapError
from dspa.intervals import jaccard
from dspa.maps.cdmap import N_LARGE, ConditionalDifferenceMap


def summary(cdmap: ConditionalDifferenceMap, delta: float = 0.05) -> dict[str, str]:
    """Gates, rows and columns in words; `delta` is the level of the confidence radius."""
    n, n_open = cdmap.meta.n_triples, cdmap.n_open
    partly = n_open[cdmap.gate_latents.long()]
    counts = {"ever": int((n_open > 0).sum()), "always": int((n_open == n).sum())}
    beyond = (largest_means(cdmap) > cdmap.radius(delta)) & (n_open > 0)
    entries = int((cdmap.values != 0).sum())
    return {
        "gates ever open": f"{counts['ever']} of {len(n_open)}, {counts['always']} of them on every prompt",
        "prompts of a partly open gate": _quartiles(partly),
        f"radius of their rows (delta {delta:g})": _quartiles(cdmap.radius(delta)[cdmap.gate_latents.long()]),
        "rows with an entry beyond it": f"{int(beyond.sum())} of {counts['ever']}",
        "columns kept": f"{len(cdmap.columns)} of {cdmap.meta.d_sae_out}",
        "entries kept": f"{entries} ({entries / (cdmap.meta.d_sae_in * cdmap.meta.d_sae_out):.3%} of all)",
        "hot latents": _calibration(cdmap),
    }


def largest_means(cdmap: ConditionalDifferenceMap) -> Tensor:
    """The largest size in each row [d_sae_in], as a mean over the prompts on which its gate is open."""
    return cdmap.values.abs().amax(dim=1) * cdmap.meta.n_triples / cdmap.n_open.clamp(min=1)


def _quartiles(values: Tensor) -> str:
    if not len(values):
        return "none is partly open"
    low, middle, high = values.double().quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    return f"median {middle:.4g}, half of them {low:.4g} to {high:.4g}"


def _calibration(cdmap: ConditionalDifferenceMap) -> str:
    if not len(cdmap.hot):
        return "none: the map has no calibration"
    return f"{len(cdmap.hot)}; the first {N_LARGE} held {cdmap.hot_share():.1%} of the tokens' maxima"


@dataclass(frozen=True)
class Column:
    """An output latent, and the sum and size of its column of A over all rows."""

    latent: int
    total: float
    n_rows: int


def top_columns(cdmap: ConditionalDifferenceMap, n: int) -> tuple[list[Column], list[Column]]:
    """Latents that are augmented and ablated most, by column sum."""
    sums = cdmap.values.double().sum(dim=0)
    order = sums.argsort(descending=True, stable=True)

    def of(places: Tensor) -> list[Column]:
        return [
            Column(int(cdmap.columns[j]), float(sums[j]), int((cdmap.values[:, j] != 0).sum())) for j in places.tolist()
        ]

    return of(order[:n]), of(order.flip(0)[:n])


@dataclass(frozen=True)
class MapDifference:
    """Two maps of the same SAEs. settings: what their metadata say differently. columns: in the first alone, in both,
    in the second alone. correlation: Pearson's, of entries at which either is not 0. same_sign: of entries that neither
    has 0, the fraction that agrees. rows: mean Jaccard index of the `k` lowest latents of the rows that either has."""

    settings: dict[str, tuple[Any, Any]]
    columns: tuple[int, int, int]
    correlation: float
    same_sign: float
    rows: float
    k: int


def difference(a: ConditionalDifferenceMap, b: ConditionalDifferenceMap) -> MapDifference:
    """Compare two maps. Raises `MapError` for maps of other SAEs, whose latents have nothing to do with each other."""
    for name in ("sae_in", "sae_out"):
        if getattr(a.meta, name) != getattr(b.meta, name):
            raise MapError(
                f"The maps are of different SAEs: {name} is {getattr(a.meta, name)} and {getattr(b.meta, name)}; "
                "accepted: two maps of the same SAEs."
            )
    one, other = asdict(a.meta), asdict(b.meta)
    mine, theirs = set(a.columns.tolist()), set(b.columns.tolist())
    union = torch.tensor(sorted(mine | theirs))
    x, y = _on(a, union), _on(b, union)
    either, both = (x != 0) | (y != 0), (x != 0) & (y != 0)
    k = min(a.meta.k_diff, b.meta.k_diff)
    rows = either.any(dim=1)
    return MapDifference(
        settings={name: (one[name], other[name]) for name in one if one[name] != other[name]},
        columns=(len(mine - theirs), len(mine & theirs), len(theirs - mine)),
        correlation=float(torch.corrcoef(torch.stack((x[either], y[either])))[0, 1]),
        same_sign=float((x[both].sign() == y[both].sign()).double().mean()),
        rows=sum(jaccard(p, q) for p, q in zip(_lowest(x[rows], k), _lowest(y[rows], k), strict=True))
        / max(1, int(rows.sum())),
        k=k,
    )


def _on(cdmap: ConditionalDifferenceMap, latents: Tensor) -> Tensor:
    """`A[:, latents]` [d_sae_in, len(latents)] fp64; every column of the map is among them."""
    found = torch.zeros(cdmap.meta.d_sae_in, len(latents), dtype=torch.float64)
    found[:, torch.searchsorted(latents, cdmap.columns.long())] = cdmap.values.double()
    return found


def _lowest(rows: Tensor, k: int) -> list[set[int]]:
    """Places of the k lowest entries of each row, of negative ones."""
    values, places = rows.topk(min(k, rows.shape[1]), dim=1, largest=False)
    return [set(place[value < 0].tolist()) for value, place in zip(values, places, strict=True)]
