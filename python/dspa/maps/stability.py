"""How few triples are enough: what maps of smaller samples would steer, compared with the map of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dspa.config import SteeringConfig
from dspa.errors import MapError
from dspa.intervals import jaccard
from dspa.maps.cdmap import ConditionalDifferenceMap
from dspa.maps.reduce import check_settings, reduce_table
from dspa.maps.shards import Collection
from dspa.maps.table import DensityTable

SIZES = (25, 50, 100, 250, 500, 1000, 2500, 5000)


@dataclass(frozen=True)
class Stability:
    """Of maps of `n_triples` triples drawn with replacement, one entry a draw.

    selected: the mean over held-out prompts of the Jaccard index of the latents that a prompt steers by this map and by
    the map of all triples (shared ones over those of either; two empty sets agree). columns: the same index of the
    columns that the two maps keep. n_columns: how many this map keeps.
    """

    n_triples: int
    selected: list[float]
    columns: list[float]
    n_columns: list[int]


def stability(
    counts: Collection | str | Path,
    *,
    sizes: Sequence[int] | None = None,
    draws: int = 5,
    n_prompts: int = 100,
    seed: int = 0,
    config: SteeringConfig | None = None,
    percentile: float = 90.0,
    gate_rule: str = "published",
    count_tokens: str = "all",
    progress: bool = False,
) -> list[Stability]:
    """Bootstrap the sets of selected latents over the number of triples.

    Args:
        counts: what `collect` returned, or its work_dir.
        sizes: numbers of triples; by default those of SIZES below what there is, and all of it.
        draws: maps a size, each of triples drawn with replacement.
        n_prompts: prompts to select for. Their triples, at most a fifth of all, take part in no map.
        seed: of the draws.
        config: what to select by; `k_diff` cuts the maps too. Default: the published settings.
        percentile, gate_rule, count_tokens: as for `reduce`.
        progress: show a bar.

    Raises:
        MapError: counts that are not complete, or too few for the sizes.
    """
    collection = counts if isinstance(counts, Collection) else Collection.open(counts)
    config = config or SteeringConfig()
    check_settings(percentile, gate_rule, config.k_diff, collection.settings.d_sae_out, count_tokens)
    collection.verify()
    rng = np.random.default_rng(seed)
    everything = rng.permutation(collection.n_triples)
    n_prompts = min(n_prompts, len(everything) // 5)
    held_out, rest = everything[:n_prompts], everything[n_prompts:]
    sizes = sorted({*(n for n in SIZES if n < len(rest)), len(rest)}) if sizes is None else sizes
    if not n_prompts or draws < 1 or not all(1 <= n <= len(rest) for n in sizes):
        raise MapError(
            f"Sizes {list(sizes)} and {draws} draws of {len(everything)} triples, {n_prompts} of which are held out; "
            f"accepted: sizes from 1 to {len(rest)}, one draw or more, five triples or more."
        )
    prompts = DensityTable(collection, count_tokens, held_out.tolist()).prompt_counts()

    def of(subset: Sequence[int]) -> tuple[list[set[int]], set[int]]:
        cdmap = reduce_table(DensityTable(collection, count_tokens, subset), percentile, gate_rule, config.k_diff, True)
        return selected(cdmap, prompts, config), set(cdmap.columns.tolist())

    whole, kept = of(rest.tolist())
    found = []
    with tqdm(total=len(sizes) * draws, unit="map", desc="stability", disable=not progress) as bar:
        for n in sizes:
            each = Stability(n, [], [], [])
            for _ in range(draws):
                sets, columns = of(rng.choice(rest, size=n).tolist())
                each.selected.append(float(np.mean([jaccard(a, b) for a, b in zip(sets, whole, strict=True)])))
                each.columns.append(jaccard(columns, kept))
                each.n_columns.append(len(columns))
                bar.update()
            found.append(each)
    return found


def selected(cdmap: ConditionalDifferenceMap, counts: Tensor, config: SteeringConfig) -> list[set[int]]:
    """Output latents that prompts with these counts [B, d_sae_in] steer, each with its sign: augmented ones as they
    are, ablated ones as -1 - latent."""
    plan = cdmap.select(counts, config)
    latents = cdmap.columns[plan.slots.clamp(min=0).long()].long()
    signed = torch.where(plan.signs > 0, latents, -1 - latents)
    return [set(row[used].tolist()) for row, used in zip(signed, plan.signs != 0, strict=True)]
