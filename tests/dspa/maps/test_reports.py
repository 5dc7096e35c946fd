"""Reports on maps, against counts and sums written out here."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from dspa import ConditionalDifferenceMap, reduce
from dspa.maps.collection import Collection
from dspa.maps.plots import plot_difference, plot_map, plot_stability
from dspa.maps.reports import origin, summary, top_columns, top_rows, warnings
from dspa.maps.stability import Stability
from dspa.testing import first_prompts, gate_tensors, with_tensors

from ..support.counts import Table, as_collection, draw, fractions, naive

PNG = b"\x89PNG"


def values_of(cdmap: ConditionalDifferenceMap, delta: float = 0.05) -> dict[str, str]:
    return {figure.name: figure.value for figure in summary(cdmap, delta)}


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"[0-9.]+(?:e-?[0-9]+)?", text)]


def rare(n: int) -> Table:
    """Counts with dead, rarely and often active input latents."""
    data = draw(n, seed=3, active=0.5)
    data[0][:, 2:5] = 0
    data[0][3:, 5:8] = 0
    return data


@pytest.mark.parametrize("rule", ["published", "active"])
def test_figures_are_those_of_numpy(rule: str) -> None:
    n, data = 60, rare(60)
    figures = values_of(reduce(as_collection(data), gate_rule=rule, k_diff=3), delta=0.5)
    gates, A = naive(data, rule=rule, k=3)
    n_open, A = gates.sum(axis=0), A.astype(float)
    rho = fractions(data[0], data[3][0]).astype(float)
    d_in, d_out = A.shape
    assert numbers(figures["gates ever open"])[:2] == [(n_open > 0).sum(), d_in]
    always = [(n_open == n).sum(), d_in]
    assert numbers(figures["gates open on every prompt"])[:2] == always
    if rule == "published":
        zero = (np.percentile(rho, 90, axis=0) == 0).sum()
        assert zero >= 6 and f", {zero} because their percentile is 0" in figures["gates open on every prompt"]
    # Latent 0 is never active either.
    assert figures["input latents active on no prompt"] == f"4 of {d_in} ({4 / d_in:.1%})"
    partly = (n_open > 0) & (n_open < n)
    quartiles = pytest.approx(np.percentile(n_open[partly], [50, 25, 75]), rel=1e-3)
    assert numbers(figures["prompts per partly open gate"]) == quartiles
    radius = np.sqrt(2 * math.log(2 * d_out / 0.5) / n_open[partly])
    assert numbers(figures["confidence radius of those rows"]) == pytest.approx(
        np.percentile(radius, [50, 25, 75]), rel=1e-3
    )
    beyond = (np.abs(A[partly]).max(axis=1) * n / n_open[partly] > radius).sum()
    assert figures["those rows with an entry beyond it"] == f"{beyond} of {partly.sum()}"
    assert numbers(figures["columns kept"])[:2] == [A.any(axis=0).sum(), d_out]
    assert figures["entries kept"] == f"{(A != 0).sum()} ({(A != 0).mean():.3%} of all)"


def test_rows_beyond_their_radius(calibrated: ConditionalDifferenceMap) -> None:
    n = calibrated.meta.n_triples
    n_open = torch.full_like(calibrated.n_open, n // 2)
    n_open[0], n_open[1], n_open[2:6] = 0, n, n // 5
    values = calibrated.values.clone() * 0.01
    values[3, 5] = values[1, 5] = 0.9
    cdmap = with_tensors(calibrated, values=values, **gate_tensors(first_prompts(n_open, n)))
    figures = values_of(cdmap, delta=0.5)
    # 0.9 of all prompts is 4.5 of those on which the gate of row 3 is open. Row 1 is open on all.
    assert figures["those rows with an entry beyond it"] == "1 of 94"
    share = float(calibrated.hot_counts[:64].sum() / calibrated.hot_counts.sum())
    assert figures["hot latents"] == f"90; the first 64 are the largest on {share:.1%} of sampled tokens"


def test_what_a_map_does_not_record(cdmap: ConditionalDifferenceMap) -> None:
    """Maps of earlier versions have no count of latents without a prompt, and may have no calibration."""
    figures = values_of(cdmap)
    assert figures["hot latents"] == "none: the map has no calibration"
    assert figures["input latents active on no prompt"] == "not recorded"
    assert "percentile" not in figures["gates open on every prompt"]


def test_origin(cdmap: ConditionalDifferenceMap) -> None:
    figures = {figure.name: (figure.value, figure.meaning) for figure in origin(cdmap.meta)}
    assert figures["input SAE"][0] == f"layer 1, 96 latents, {cdmap.meta.sae_in}"
    assert figures["triples"] == ("50", "0 of their responses were cut to 128 tokens with their prompt")
    assert figures["gates"] == ("published, percentile 90", "of densities over all tokens")
    text = origin(replace(cdmap.meta, sparsify=False, count_tokens="text", max_length=None, n_cut=3))
    assert {"none: every entry is kept", "not named"} <= {figure.value for figure in text}
    assert "3 of their responses were cut" in {figure.meaning for figure in text}


def test_tokens_of_a_map(cdmap: ConditionalDifferenceMap) -> None:
    def tokens(**meta: object) -> str:
        return next(figure.value for figure in origin(replace(cdmap.meta, **meta)) if figure.name == "tokens")

    assert tokens() == "prompt and response of a text as one"
    template = {"chat_template_kwargs": {"enable_thinking": False}, "template_date": "2026-03-01"}
    assert tokens(**template).endswith(', chat template with {"enable_thinking": false}, chat template of 2026-03-01')
    assert tokens(boundary="apart") == "prompt and response apart"


def test_a_map_of_earlier_tokens() -> None:
    counts = as_collection(draw(40, seed=1))
    earlier = replace(counts, settings=replace(counts.settings, boundary="apart"))
    assert "implicit" in warnings(reduce(earlier))[0]


# Warnings


def test_an_ordinary_map_has_no_warning(cdmap: ConditionalDifferenceMap) -> None:
    assert warnings(cdmap) == [] and warnings(reduce(as_collection(draw(40, seed=1)))) == []


def test_one_triple_tells_no_prompts_apart() -> None:
    """Every gate is open on the only prompt."""
    few = warnings(reduce(as_collection(draw(1, seed=1)), k_diff=2))
    assert "every prompt is steered alike" in few[0]


def test_equal_prompts_tell_no_prompts_apart() -> None:
    data = draw(20, seed=1)
    data[0][:], data[3][0] = data[0][0], data[3][0][0]
    assert "every prompt is steered alike" in warnings(reduce(as_collection(data), k_diff=2))[0]


@pytest.mark.parametrize("rule", ["published", "active"])
def test_many_dead_latents(rule: str) -> None:
    data = draw(40, seed=1)
    data[0][:, 4:] = 0
    texts = warnings(reduce(as_collection(data), gate_rule=rule))
    assert texts[0].startswith("11 of 14 input latents are active on no prompt.")
    assert [("--gate-rule active" in text) for text in texts[1:]] == [True] * (rule == "published")


def test_rarely_active_latents_are_not_dead() -> None:
    data = draw(40, seed=1)
    data[0][2:, 4:] = 0
    data[0][:2, 4:] = data[3][0][:2, None]
    # Latent 0 is never active and latent 1 on all tokens.
    (text,) = warnings(reduce(as_collection(data)))
    assert text.startswith("12 of 14 rows are one and the same") and "--gate-rule active" in text


# Columns


def test_top_columns(cdmap: ConditionalDifferenceMap) -> None:
    values = torch.zeros_like(cdmap.values)
    values[0, 7], values[1, 7], values[2, 9], values[:, 3] = 1.0, 0.5, 1.25, -0.1
    up, down = top_columns(with_tensors(cdmap, values=values), 2)
    latents = cdmap.columns.tolist()
    assert [(c.latent, c.total, c.n_rows) for c in up] == [(latents[7], 1.5, 2), (latents[9], 1.25, 1)]
    # The sums of all other columns are 0 or positive.
    assert [(c.latent, c.n_rows) for c in down] == [(latents[3], 96)] and down[0].total == pytest.approx(-9.6)
    assert top_columns(cdmap, 0) == ([], [])


def test_each_column_is_at_one_end(cdmap: ConditionalDifferenceMap) -> None:
    up, down = top_columns(cdmap, 1000)
    sums = dict(zip(cdmap.columns.tolist(), cdmap.values.double().sum(dim=0).tolist(), strict=True))
    assert {c.latent for c in up} == {j for j, total in sums.items() if total > 0}
    assert {c.latent for c in down} == {j for j, total in sums.items() if total < 0}
    assert [c.total for c in (*up, *down[::-1])] == sorted(sums.values(), reverse=True)


# Rows


def test_top_rows(cdmap: ConditionalDifferenceMap) -> None:
    """The largest entries of partly open gates; a row that is open on all prompts or empty is none."""
    values, n_open = torch.zeros_like(cdmap.values), torch.full_like(cdmap.n_open, 25)
    values[5, 7], values[5, 3], values[9, 2], values[0, 1] = 0.5, -0.75, 0.5, 2.0
    n_open[0], n_open[9] = cdmap.meta.n_triples, 7
    gates = gate_tensors(first_prompts(n_open, cdmap.meta.n_triples))
    made = with_tensors(cdmap, values=values, **gates)
    rows, latents = top_rows(made, 10), cdmap.columns.tolist()
    assert [(row.latent, row.n_open, row.column, row.value) for row in rows] == [
        (5, 25, latents[3], -0.75),
        (9, 7, latents[2], 0.5),
    ]
    assert top_rows(made, 1) == rows[:1] and top_rows(made, 0) == []


# Plots


def test_plots(counts: Collection, tmp_path: Path, cdmap: ConditionalDifferenceMap) -> None:
    made = reduce(counts)
    plot_map(made, tmp_path / "map.png")
    plot_map(cdmap, tmp_path / "one.png")
    # No gate is partly open, and every column is at the same end.
    plot_map(reduce(counts, subset=[0]), tmp_path / "single.png")
    plot_difference(made, reduce(counts, subset=range(20)), tmp_path / "diff.png")
    plot_stability([Stability(5, [0.1, 0.2], [0.3, 0.4], [7, 8], [0, 1])], tmp_path / "stability.png")
    for path in tmp_path.iterdir():
        assert path.read_bytes().startswith(PNG) and path.stat().st_size > 5000
    assert len(list(tmp_path.iterdir())) == 5


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved."""
    saved: list[Figure] = []
    savefig = Figure.savefig

    def save(figure: Figure, *args: Any, **kwargs: Any) -> None:
        saved.append(figure)
        savefig(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", save)
    return saved


def test_a_plot_shows_what_numpy_computes(figures: list[Figure], tmp_path: Path) -> None:
    n, data = 60, rare(60)
    plot_map(reduce(as_collection(data), k_diff=3), tmp_path / "plot.png", top=2, delta=0.5)
    gates, A = naive(data, k=3)
    n_open, A = gates.sum(axis=0), A.astype(float)
    openness, sizes, columns = figures[0].axes
    assert sum(bar.get_height() for bar in openness.patches) == ((n_open > 0) & (n_open < n)).sum()
    # As points: prompts and the largest conditional mean of every row, here all rows.
    points = np.asarray(sizes.collections[0].get_offsets())
    means = np.abs(A).max(axis=1) * n / n_open
    assert points[:, 0].tolist() == n_open.tolist() and points[:, 1] == pytest.approx(means, rel=1e-6)
    places, radius = sizes.lines[0].get_data()
    assert radius == pytest.approx(np.sqrt(2 * math.log(2 * A.shape[1] / 0.5) / places), rel=1e-6)
    sums = np.sort(A.sum(axis=0))
    assert [bar.get_width() for bar in columns.patches] == pytest.approx([*sums[:2], *sums[-2:]], rel=1e-6)


def test_a_plot_names_latents_by_their_tokens(
    cdmap: ConditionalDifferenceMap, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """Also where the font has no such letter, and where a token would be TeX."""
    made = with_tensors(cdmap)
    made.promoted["sae_out"] = {j: [" 你好", "$x^{", "\n", "unused"] for j in cdmap.columns.tolist()}
    figure: list[Figure] = []
    with pytest.MonkeyPatch.context() as patch:
        save = Figure.savefig
        patch.setattr(Figure, "savefig", lambda self, *args, **kw: (figure.append(self), save(self, *args, **kw)))
        plot_map(made, tmp_path / "map.png", top=1)
    labels = [label.get_text() for label in figure[0].axes[2].get_yticklabels()]
    up, down = top_columns(cdmap, 1)
    assert labels == [rf'" \u4f60\u597d" "$x^{{" "\n" {c.latent}' for c in (*down, *up)]
    assert (tmp_path / "map.png").read_bytes().startswith(PNG) and not recwarn.list


def test_a_plot_of_stability_is_in_the_order_of_sizes(figures: list[Figure], tmp_path: Path) -> None:
    few, many = Stability(5, [0.1, 0.3], [0.3, 0.5], [7, 8], [0, 1]), Stability(9, [0.6, 0.8], [1, 1], [8, 8], [0, 0])
    plot_stability([many, few], tmp_path / "plot.png")
    (axes,) = figures[0].axes
    selected, columns = (line.get_xydata().tolist() for line in axes.lines)
    assert selected == [[5, pytest.approx(0.2)], [9, pytest.approx(0.7)]] and columns == [[5, 0.4], [9, 1]]
