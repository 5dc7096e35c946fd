"""Stability: maps of samples of the triples, compared with the map of all."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from dspa import ConditionalDifferenceMap, MapError, SteeringConfig
from dspa.intervals import jaccard
from dspa.maps.collection import Collection
from dspa.maps.stability import SIZES, selected_latents, stability

from ..support.counts import as_collection, draw, naive, rows_of

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
def test_figures_are_those_of_plain_maps(rule: str) -> None:
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
    held_out, rest = order[:12], order[12:]
    maps = [naive(rows_of(data, index), rule=rule, k=2) for index in (rng.choice(rest, size=48), rest)]
    looked_up = [
        sorted((i for i in range(14) if data[0][n, i]), key=lambda i: (-data[0][n, i], i))[:2] for n in held_out
    ]
    ablated = [[set(lowest(A[some].sum(axis=0))) for some in looked_up] for _, A in maps]
    assert result.selected == [pytest.approx(np.mean([len(a & b) / len(a | b) for a, b in zip(*ablated, strict=True)]))]
    drawn, whole = (set(np.flatnonzero((A != 0).any(axis=0))) for _, A in maps)
    assert result.n_columns == [len(drawn)] and result.columns == [len(drawn & whole) / len(drawn | whole)]
    always = maps[0][0].all(axis=0)
    expected = np.mean([always[some].sum() for some in looked_up])
    assert result.always_open == [pytest.approx(expected)] and (expected > 1) == (rule == "published")


def lowest(score: np.ndarray) -> list[int]:
    """The two lowest of negative scores."""
    return sorted((j for j in range(len(score)) if score[j] < 0), key=lambda j: (score[j], j))[:2]


def test_prompts_that_are_not_steered_agree_with_nothing() -> None:
    """Three of four prompts activate nothing. On the others, the maps of all draws steer alike."""
    data = draw(60, seed=4)
    data[0][:] = 0
    data[0][::4, 3] = 1
    data[1][:, :], data[2][:, :] = 0, 0
    data[2][:, 5] = 1
    config = SteeringConfig(k_prompt=1, k_diff=1)
    (result,) = stability(as_collection(data), sizes=[20], draws=2, config=config)
    assert result.selected == [1, 1] and result.n_columns == [1, 1]
    data[0][:] = 0
    with pytest.raises(MapError, match="steers none of 12 held-out prompts"):
        stability(as_collection(data), sizes=[20], config=config)


def test_a_draw_without_a_map() -> None:
    data = draw(60, seed=4)
    for part in (1, 2):
        data[part][:50] = 0
    with pytest.raises(MapError, match="A draw of 1 triples makes no map; use more per draw"):
        stability(as_collection(data), sizes=[1], draws=20, config=SteeringConfig(k_prompt=2, k_diff=2))


def test_default_sizes(counts: Collection) -> None:
    results = stability(counts, draws=1)
    assert [result.n_triples for result in results] == [n for n in SIZES if n < 48] + [48]


@pytest.mark.parametrize("options", [{"sizes": [0]}, {"sizes": [49]}, {"sizes": []}, {"sizes": [2.5]}, {"draws": 0}])
def test_bad_sizes(counts: Collection, options: dict[str, object]) -> None:
    with pytest.raises(MapError, match="accepted: sizes from 1 to 48"):
        stability(counts, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config": SteeringConfig(k_prompt=97)}, "`k_prompt` is 97; accepted: 1 to the input SAE's width, 96"),
        ({"n_prompts": 0}, "`n_prompts` is 0; accepted: 1 or more"),
    ],
    ids=str,
)
def test_bad_settings(counts: Collection, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
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
