"""Stability of maps: agreement of the maps of fewer triples with the map of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dspa.config import SteeringConfig
from dspa.errors import MapError, refusal
from dspa.intervals import jaccard
from dspa.maps.cdmap import ConditionalDifferenceMap, prompt_latents
from dspa.maps.collection import Collection
from dspa.maps.reduce import check_settings, reduce_table
from dspa.maps.table import DensityTable

SIZES = (25, 50, 100, 250, 500, 1000, 2500, 5000)


@dataclass(frozen=True)
class Stability:
    """Agreement of maps of triples drawn with replacement with the map of all triples, one entry per draw.

    Attributes:
        n_triples: triples per draw.
        selected: Jaccard index of the latents that a prompt steers by either map, mean over the held-out prompts that
            are steered by one or both.
        columns: Jaccard index of the columns of the two maps.
        n_columns: number of columns of the drawn map.
        always_open: number of latents that a prompt looks up and whose gate is open on every triple of the draw, mean
            over held-out prompts. Each adds the mean difference to the prompt's score.
    """

    n_triples: int
    selected: list[float]
    columns: list[float]
    n_columns: list[int]
    always_open: list[float]


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
        counts: what `collect` returned, or its `work_dir`.
        sizes: numbers of triples. Default: those of SIZES below the number of triples for maps, and that number.
        draws: maps per size, each of triples drawn with replacement.
        n_prompts: prompts to select for. Their triples, at most a fifth of all, take part in no map.
        seed: of the draws.
        config: settings of the selection, whose `k_diff` also cuts the maps. Default: the published settings.
        percentile: as for `reduce`.
        gate_rule: as for `reduce`.
        count_tokens: as for `reduce`.
        progress: show a bar.

    Returns:
        One entry per size, in the order of `sizes`.

    Raises:
        MapError: counts that are incomplete, or too few for the sizes; a draw that makes no map, or a map that steers
            no held-out prompt.
        ValueError: an invalid setting.
    """
    collection = counts if isinstance(counts, Collection) else Collection.open(counts)
    config = config or SteeringConfig()
    widths = collection.settings
    check_settings(percentile, gate_rule, config.k_diff, widths.d_sae_out, count_tokens)
    if config.k_prompt > widths.d_sae_in:
        accepted = f"1 to the input SAE's width, {widths.d_sae_in}"
        raise refusal(ValueError, "`k_prompt`", config.k_prompt, accepted)
    if n_prompts < 1:
        raise refusal(ValueError, "`n_prompts`", n_prompts, "1 or more")
    collection.verify()
    rng = np.random.default_rng(seed)
    order = rng.permutation(collection.n_triples)
    n_prompts = min(n_prompts, len(order) // 5)
    held_out, rest = order[:n_prompts], order[n_prompts:]
    sizes = sorted({*(n for n in SIZES if n < len(rest)), len(rest)}) if sizes is None else sizes
    if not n_prompts or draws < 1 or not sizes or not all(n in range(1, len(rest) + 1) for n in sizes):
        raise MapError(
            f"Sizes {list(sizes)} and {draws} draws of {len(order)} triples, {n_prompts} of which are held out; "
            f"accepted: sizes from 1 to {len(rest)}, one draw or more, five triples or more."
        )
    prompts = DensityTable(collection, count_tokens, held_out.tolist()).prompt_counts()

    def steer(subset: Sequence[int]) -> _Steered:
        """Return what the map of some triples steers."""
        table = DensityTable(collection, count_tokens, subset)
        return _Steered.by(reduce_table(table, percentile, gate_rule, config.k_diff, True), prompts, config)

    whole = steer(rest.tolist())
    if not any(whole.latents):
        raise MapError(
            f"The map of {len(rest)} triples steers none of {n_prompts} held-out prompts. Check that the input SAE is "
            "of this model and layer, and active on these prompts."
        )
    results = []
    with tqdm(total=len(sizes) * draws, unit="map", desc="stability", disable=not progress) as bar:
        for n in sizes:
            result = Stability(n, [], [], [], [])
            for _ in range(draws):
                try:
                    drawn = steer(rng.choice(rest, size=n).tolist())
                except MapError as error:
                    raise MapError(f"A draw of {n} triples makes no map; use more per draw. {error}") from error
                result.selected.append(_agreement(drawn.latents, whole.latents))
                result.columns.append(jaccard(drawn.columns, whole.columns))
                result.n_columns.append(len(drawn.columns))
                result.always_open.append(drawn.always_open)
                bar.update()
            results.append(result)
    return results


@dataclass(frozen=True)
class _Steered:
    """The latents that a map steers, and its columns.

    Attributes:
        latents: as of `selected_latents`.
        columns: columns of the map.
        always_open: as in `Stability`, of this map.
    """

    latents: list[set[int]]
    columns: set[int]
    always_open: float

    @classmethod
    def by(cls, cdmap: ConditionalDifferenceMap, prompts: Tensor, config: SteeringConfig) -> _Steered:
        """Return what a map steers on prompts, given as counts [B, d_sae_in]."""
        always = cdmap.n_open == cdmap.meta.n_triples
        n_always = [int(always[looked_up].sum()) for looked_up in prompt_latents(prompts, config.k_prompt)]
        latents = selected_latents(cdmap, prompts, config)
        return cls(latents, set(cdmap.columns.tolist()), float(np.mean(n_always)))


def _agreement(one: list[set[int]], other: list[set[int]]) -> float:
    """Return the mean Jaccard index of the sets of each prompt that is steered in one or both."""
    return float(np.mean([jaccard(a, b) for a, b in zip(one, other, strict=True) if a or b]))


def selected_latents(cdmap: ConditionalDifferenceMap, counts: Tensor, config: SteeringConfig) -> list[set[int]]:
    """Return the output latents that each prompt steers, with their signs.

    Args:
        cdmap: the map.
        counts: activation counts of the prompts, [B, d_sae_in].
        config: settings of the selection.

    Returns:
        Augmented latents as they are, and ablated ones as -1 - latent.
    """
    plan = cdmap.select(counts, config)
    latents = cdmap.columns[plan.slots.clamp(min=0).long()].long()
    signed = torch.where(plan.signs > 0, latents, -1 - latents)
    return [set(row[used].tolist()) for row, used in zip(signed, plan.signs != 0, strict=True)]
