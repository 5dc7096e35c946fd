"""Stability: maps of samples of the triples, compared with the map of all."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from dspa import ConditionalDifferenceMap, MapError, SteeringConfig
from dspa.intervals import jaccard
from dspa.maps.shards import Collection
from dspa.maps.stability import SIZES, selected_latents, stability

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
    assert len(few.selected) == len(few.columns) == len(few.n_columns) == 6
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
