"""Stability: maps of samples of the triples, compared with the map of all."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from dspa import ConditionalDifferenceMap, MapError, SteeringConfig
from dspa.intervals import jaccard
from dspa.maps.shards import Collection
from dspa.maps.stability import SIZES, selected_latents, stability

from ..support.counts import as_collection, draw, naive

PNG = b"\x89PNG"


def test_jaccard() -> None:
    assert jaccard({1, 2, 3}, {2, 3, 4}) == 0.5
    assert jaccard(set(), set()) == 1 and jaccard(set(), {1}) == 0


def test_selected_tells_augmented_from_ablated(cdmap: ConditionalDifferenceMap) -> None:
    counts = torch.randint(0, 4, (5, 96), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    both = selected_latents(cdmap, counts, SteeringConfig(k_prompt=4, k_diff=3, mode="both"))
    ablated = selected_latents(cdmap, counts, SteeringConfig(k_prompt=4, k_diff=3))
    for row, some, less in zip(counts, both, ablated, strict=True):
        chosen = sorted(range(96), key=lambda i: (-int(row[i]), i))[:4]
        score = cdmap.values[[i for i in chosen if row[i] > 0]].sum(dim=0)
        order = score.argsort().tolist()
        columns = cdmap.columns.tolist()
        assert less == {-1 - columns[j] for j in order[:3]}
        assert some == less | {columns[j] for j in order[-3:]}


def test_stability_grows_with_the_number_of_triples(counts: Collection) -> None:
    results = stability(counts, sizes=[4, 48], draws=6, n_prompts=12, seed=1)
    assert [result.n_triples for result in results] == [4, 48]
    few, all_of_them = results
    assert len(few.selected) == len(few.columns) == len(few.n_columns) == len(few.always_open) == 6
    mean = {id(result): sum(result.selected) / 6 for result in results}
    assert 0 < mean[id(few)] < mean[id(all_of_them)] < 1
    again = stability(counts, sizes=[4, 48], draws=6, n_prompts=12, seed=1)
    assert again == results and stability(counts, sizes=[4], draws=6, n_prompts=12, seed=2) != results[:1]


def test_held_out_prompts_take_part_in_no_map(counts: Collection, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    from dspa.maps import stability as module

    class Watched(module.DensityTable):
        def __init__(self, collection: Collection, count_tokens: str, subset: list[int] | None) -> None:
            seen.append(subset or [])
            super().__init__(collection, count_tokens, subset)

    monkeypatch.setattr(module, "DensityTable", Watched)
    module.stability(counts, sizes=[10], draws=3, n_prompts=12)
    held_out, whole, *drawn = seen
    assert len(held_out) == 12 and len(whole) == 48 and set(held_out).isdisjoint(whole)
    assert len(drawn) == 3 and all(len(subset) == 10 and set(subset) <= set(whole) for subset in drawn)


@pytest.mark.parametrize("rule", ["published", "active"])
def test_latents_of_a_prompt_that_are_always_open(rule: str) -> None:
    """Latents 2 to 9 are active on one prompt in twelve, so that their percentile is 0, and densest there."""
    data = draw(60, seed=4, active=0.9)
    data[0][:, 2:10] = 0
    for n in range(60):
        if n % 12 < 8:
            data[0][n, 2 + n % 12] = data[3][0, n]
    config = SteeringConfig(k_prompt=2, k_diff=2)
    (result,) = stability(as_collection(data), sizes=[48], draws=1, n_prompts=12, config=config, gate_rule=rule)
    # The draw and the held-out prompts, as the seed makes them.
    rng = np.random.default_rng(0)
    order = rng.permutation(60)
    held_out, drawn = order[:12], rng.choice(order[12:], size=48)
    gates = naive([*(table[drawn] for table in data[:3]), data[3][:, drawn]], rule=rule, sparsify=False)[0]
    looked_up = [sorted(range(14), key=lambda i: (-data[0][n, i], i))[:2] for n in held_out]
    expected = np.mean(
        [
            sum(gates[:, i].all() and data[0][n, i] > 0 for i in some)
            for n, some in zip(held_out, looked_up, strict=True)
        ]
    )
    assert result.always_open == [pytest.approx(expected)]
    assert (expected > 1) == (rule == "published")


def test_default_sizes(counts: Collection) -> None:
    results = stability(counts, draws=1)
    assert [result.n_triples for result in results] == [n for n in SIZES if n < 48] + [48]


@pytest.mark.parametrize("options", [{"sizes": [0]}, {"sizes": [49]}, {"draws": 0}])
def test_bad_sizes(counts: Collection, options: dict[str, object]) -> None:
    with pytest.raises(MapError, match="accepted: sizes from 1 to 48"):
        stability(counts, **options)


def test_csv_is_one_draw_a_line(counts: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dspa.cli import main

    path = tmp_path / "s.csv"
    arguments = ["map", "stability", counts.folder, "--size", 8, "--size", 20, "--draws", 3, "--csv", path]
    monkeypatch.setattr("sys.argv", ["dspa", *map(str, [*arguments, "--plot", tmp_path / "s.png"])])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    rows = list(csv.DictReader(path.open()))
    assert [row["triples"] for row in rows] == ["8"] * 3 + ["20"] * 3
    assert all(0 <= float(row["selected"]) <= 1 for row in rows)
    assert (tmp_path / "s.png").read_bytes().startswith(PNG)
