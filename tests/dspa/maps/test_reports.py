"""Reports on maps, against counts and sums written out here."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dspa import ConditionalDifferenceMap, FrozenSAE, MapError, reduce
from dspa.maps.plots import plot_difference, plot_map, plot_stability
from dspa.maps.reports import difference, summary, top_columns
from dspa.maps.shards import Collection
from dspa.maps.stability import Stability
from dspa.testing import L_OUT, make_map, make_sae, with_tensors

PNG = b"\x89PNG"


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
    described = summary(cdmap, delta=0.5)
    assert described["gates ever open"] == "95 of 96, 1 of them on every prompt"
    assert described["prompts of a partly open gate"] == "median 25, half of them 25 to 25"
    radius = math.sqrt(2 * math.log(2 * 128 / 0.5) / 25)
    assert (
        described["radius of their rows (delta 0.5)"]
        == f"median {radius:.4g}, half of them {radius:.4g} to {radius:.4g}"
    )
    # 0.9 of all prompts is 4.5 of those on which the gate of row 3 is open.
    assert described["rows with an entry beyond it"] == "1 of 95"
    assert described["columns kept"] == "40 of 128"
    assert described["entries kept"].startswith(f"{96 * 40} (31.250%")
    assert described["hot latents"].startswith("90; the first 64 held")


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
    same = difference(cdmap, cdmap)
    assert same.settings == {} and same.columns == (0, 40, 0)
    assert same.correlation == pytest.approx(1) and same.same_sign == same.rows == 1


def test_differences(cdmap: ConditionalDifferenceMap) -> None:
    other = with_tensors(
        cdmap,
        columns=cdmap.columns[5:],
        values=-cdmap.values[:, 5:].contiguous(),
        variance=cdmap.variance[5:],
    )
    other.meta = replace(cdmap.meta, percentile=50.0)
    changed = difference(cdmap, other)
    assert changed.settings == {"percentile": (90.0, 50.0)}
    assert changed.columns == (5, 35, 0)
    assert -1 < changed.correlation < -0.8 and changed.same_sign == 0 and changed.rows < 0.2


def test_maps_of_other_saes(cdmap: ConditionalDifferenceMap, sae_in: FrozenSAE) -> None:
    other = make_map(sae_in, make_sae(L_OUT, 128, seed=9))
    with pytest.raises(MapError, match="different SAEs: sae_out is"):
        difference(cdmap, other)


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
