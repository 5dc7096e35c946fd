"""What the reports say of maps, against counts and sums written out here."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dspa import ConditionalDifferenceMap, FrozenSAE, MapError, SteeringConfig, collect, reduce
from dspa.intervals import jaccard
from dspa.maps.plots import plot_difference, plot_map, plot_stability
from dspa.maps.reports import difference, summary, top_columns
from dspa.maps.shards import Collection
from dspa.maps.stability import SIZES, Stability, selected, stability
from dspa.testing import ENGLISH, L_IN, L_OUT, make_map, make_model, make_sae, with_tensors, word_tokenizer

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    """Of 60 triples in which the response repeats the prompt's first word or its last."""
    rows = [
        {
            "prompt": " ".join(ENGLISH[(n + i * i) % 47] for i in range(6)),
            "chosen": " ".join(ENGLISH[(n + i) % 40] for i in range(5)),
            "rejected": " ".join(ENGLISH[(2 * n + 3 * i) % 47] for i in range(7)),
        }
        for n in range(60)
    ]
    saes = make_sae(L_IN, 96, seed=1), make_sae(L_OUT, 128, seed=2)
    folder = tmp_path_factory.mktemp("counts")
    return collect(make_model("qwen3"), word_tokenizer(), rows, *saes, work_dir=folder, progress=False)


# One map


def test_summary(calibrated: ConditionalDifferenceMap) -> None:
    n = calibrated.meta.n_triples
    n_open = calibrated.n_open.clone()
    n_open[0], n_open[1], n_open[2:6] = 0, n, n // 5
    values = calibrated.values.clone() * 0.01
    values[3, 5] = 0.9
    partly = ((n_open > 0) & (n_open < n)).nonzero().flatten().to(torch.int32)
    cdmap = with_tensors(
        calibrated, n_open=n_open, values=values, gate_latents=partly, gates=calibrated.gates[: len(partly)]
    )
    told = summary(cdmap, delta=0.5)
    assert told["gates ever open"] == "95 of 96, 1 of them on every prompt"
    assert told["prompts of a partly open gate"] == "median 25, half of them 25 to 25"
    radius = math.sqrt(2 * math.log(2 * 128 / 0.5) / 25)
    assert told["radius of their rows (delta 0.5)"] == f"median {radius:.4g}, half of them {radius:.4g} to {radius:.4g}"
    # 0.9 of all prompts is 4.5 of those on which the gate of row 3 is open.
    assert told["rows with an entry beyond it"] == "1 of 95"
    assert told["columns kept"] == "40 of 128"
    assert told["entries kept"].startswith(f"{96 * 40} (31.250%")
    assert told["hot latents"].startswith("90; the first 64 held")


def test_summary_of_a_map_without_calibration(cdmap: ConditionalDifferenceMap) -> None:
    assert summary(cdmap)["hot latents"] == "none: the map has no calibration"


def test_top_columns(cdmap: ConditionalDifferenceMap) -> None:
    values = torch.zeros_like(cdmap.values)
    values[0, 7], values[1, 7], values[2, 9], values[:, 3] = 1.0, 0.5, 1.25, -0.1
    up, down = top_columns(with_tensors(cdmap, values=values), 2)
    latents = cdmap.columns.tolist()
    assert [(c.latent, c.total, c.n_rows) for c in up] == [(latents[7], 1.5, 2), (latents[9], 1.25, 1)]
    assert (down[0].latent, down[0].n_rows) == (latents[3], 96) and down[0].total == pytest.approx(-9.6)
    assert top_columns(cdmap, 0) == ([], [])
    assert len(top_columns(cdmap, 1000)[0]) == 40


# Two maps


def test_a_map_differs_from_itself_in_nothing(cdmap: ConditionalDifferenceMap) -> None:
    found = difference(cdmap, cdmap)
    assert found.settings == {} and found.columns == (0, 40, 0)
    assert found.correlation == pytest.approx(1) and found.same_sign == found.rows == 1


def test_differences(cdmap: ConditionalDifferenceMap) -> None:
    other = with_tensors(
        cdmap,
        columns=cdmap.columns[5:],
        values=-cdmap.values[:, 5:].contiguous(),
        variance=cdmap.variance[5:],
    )
    other.meta = replace(cdmap.meta, percentile=50.0)
    found = difference(cdmap, other)
    assert found.settings == {"percentile": (90.0, 50.0)}
    assert found.columns == (5, 35, 0)
    assert -1 < found.correlation < -0.8 and found.same_sign == 0 and found.rows < 0.2


def test_maps_of_other_saes(cdmap: ConditionalDifferenceMap, sae_in: FrozenSAE) -> None:
    other = make_map(sae_in, make_sae(L_OUT, 128, seed=9))
    with pytest.raises(MapError, match="different SAEs: sae_out is"):
        difference(cdmap, other)


# Fewer triples


def test_jaccard() -> None:
    assert jaccard({1, 2, 3}, {2, 3, 4}) == 0.5
    assert jaccard(set(), set()) == 1 and jaccard(set(), {1}) == 0


def test_selected_tells_augmented_from_ablated(cdmap: ConditionalDifferenceMap) -> None:
    counts = torch.randint(0, 4, (5, 96), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    both = selected(cdmap, counts, SteeringConfig(k_prompt=4, k_diff=3, mode="both"))
    ablated = selected(cdmap, counts, SteeringConfig(k_prompt=4, k_diff=3))
    for row, some, less in zip(counts, both, ablated, strict=True):
        chosen = sorted(range(96), key=lambda i: (-int(row[i]), i))[:4]
        score = cdmap.values[[i for i in chosen if row[i] > 0]].sum(dim=0)
        order = score.argsort().tolist()
        columns = cdmap.columns.tolist()
        assert less == {-1 - columns[j] for j in order[:3]}
        assert some == less | {columns[j] for j in order[-3:]}


def test_stability_grows_with_the_number_of_triples(counts: Collection) -> None:
    found = stability(counts, sizes=[4, 48], draws=6, n_prompts=12, seed=1)
    assert [each.n_triples for each in found] == [4, 48]
    few, all_of_them = found
    assert len(few.selected) == len(few.columns) == len(few.n_columns) == 6
    mean = {id(each): sum(each.selected) / 6 for each in found}
    assert 0 < mean[id(few)] < mean[id(all_of_them)] < 1
    again = stability(counts, sizes=[4, 48], draws=6, n_prompts=12, seed=1)
    assert again == found and stability(counts, sizes=[4], draws=6, n_prompts=12, seed=2) != found[:1]


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
    assert len(drawn) == 3 and all(len(each) == 10 and set(each) <= set(whole) for each in drawn)


def test_default_sizes(counts: Collection) -> None:
    found = stability(counts, draws=1)
    assert [each.n_triples for each in found] == [n for n in SIZES if n < 48] + [48]


@pytest.mark.parametrize("options", [{"sizes": [0]}, {"sizes": [49]}, {"draws": 0}])
def test_bad_sizes(counts: Collection, options: dict[str, object]) -> None:
    with pytest.raises(MapError, match="accepted: sizes from 1 to 48"):
        stability(counts, **options)


# Plots


def test_plots(counts: Collection, tmp_path: Path, cdmap: ConditionalDifferenceMap) -> None:
    made = reduce(counts)
    plot_map(made, tmp_path / "map.png")
    plot_map(cdmap, tmp_path / "one.png")
    plot_difference(made, reduce(counts, subset=range(20)), tmp_path / "diff.png")
    plot_stability([Stability(5, [0.1, 0.2], [0.3, 0.4], [7, 8])], tmp_path / "stability.png")
    for path in tmp_path.iterdir():
        assert path.read_bytes().startswith(PNG) and path.stat().st_size > 5000
    assert len(list(tmp_path.iterdir())) == 4


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
