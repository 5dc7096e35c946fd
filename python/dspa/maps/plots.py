"""Plots of maps, as PNG files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure

from dspa.files import write_figure
from dspa.maps.cdmap import ConditionalDifferenceMap, confidence_radius
from dspa.maps.reports import largest_means, top_columns
from dspa.maps.stability import Stability

# Tokens that an output latent promotes, shown next to its number.
N_TOKENS = 3


def plot_map(cdmap: ConditionalDifferenceMap, path: Path, top: int = 20, delta: float = 0.05) -> None:
    """Plot the openness of gates, the sizes of entries with their confidence radius, and the largest column sums.

    Args:
        cdmap: the map.
        path: PNG file to write.
        top: latents to show at each end of the column sums.
        delta: level of the confidence radius.
    """
    figure = Figure(figsize=(15, 4.2), layout="constrained")
    gates, sizes, columns = figure.subplots(1, 3)
    n_open = cdmap.n_open[cdmap.gate_latents.long()]
    gates.hist(n_open.numpy(), bins=min(40, max(1, len(n_open.unique()))))
    gates.set(title="gates that are open on some prompts", xlabel="prompts N_i on which it is open", ylabel="gates")
    rows = (cdmap.n_open > 0).nonzero().flatten()
    n_open = cdmap.n_open[rows]
    sizes.scatter(n_open.numpy(), largest_means(cdmap)[rows].numpy(), s=6, alpha=0.5, label="largest entry of the row")
    places = torch.linspace(float(n_open.min()), float(n_open.max()), 200)
    radius = confidence_radius(places, cdmap.meta.d_sae_out, delta)
    sizes.plot(places.numpy(), radius.numpy(), color="black", label=f"confidence radius, delta {delta:g}")
    sizes.set(title="rows, as conditional means", xlabel="prompts N_i", ylabel="change of density", yscale="log")
    sizes.legend()
    augmented, ablated = top_columns(cdmap, top)
    shown = sorted({c.latent: c.total for c in (*augmented, *ablated)}.items(), key=lambda item: item[1])
    columns.barh(range(len(shown)), [total for _, total in shown], color=["C3" if t < 0 else "C0" for _, t in shown])
    promoted = cdmap.promoted.get("sae_out", {})
    # In ASCII, which every font has, and without TeX.
    names = [f"{' '.join(map(json.dumps, promoted.get(latent, [])[:N_TOKENS]))} {latent}" for latent, _ in shown]
    columns.set_yticks(range(len(shown)), names, fontsize=5, parse_math=False)
    columns.set(title="latents by column sum of A", xlabel="column sum", ylabel="output latent")
    write_figure(path, figure)


def plot_difference(a: ConditionalDifferenceMap, b: ConditionalDifferenceMap, path: Path) -> None:
    """Plot the column sums of two maps against each other.

    Args:
        a: the map of the horizontal axis.
        b: the map of the vertical axis.
        path: PNG file to write.
    """
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    x, y = (dict(zip(m.columns.tolist(), m.values.double().sum(dim=0).tolist(), strict=True)) for m in (a, b))
    latents = sorted(x.keys() | y.keys())
    axes.axline((0, 0), slope=1, color="grey", linewidth=0.8)
    axes.scatter([x.get(j, 0.0) for j in latents], [y.get(j, 0.0) for j in latents], s=10, alpha=0.6)
    axes.set(title="column sums of A", xlabel="first map", ylabel="second map", aspect="equal", adjustable="datalim")
    write_figure(path, figure)


def plot_stability(results: Sequence[Stability], path: Path) -> None:
    """Plot the agreement with the map of all triples over the number of triples.

    Args:
        results: one entry per number of triples.
        path: PNG file to write.
    """
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.subplots()
    results = sorted(results, key=lambda result: result.n_triples)
    sizes = [result.n_triples for result in results]
    for name, title in (("selected", "latents that a prompt steers"), ("columns", "columns of the map")):
        values = [getattr(result, name) for result in results]
        axes.plot(sizes, [sum(v) / len(v) for v in values], marker="o", label=title)
        axes.fill_between(sizes, [min(v) for v in values], [max(v) for v in values], alpha=0.2)
    axes.set(xlabel="triples", ylabel="Jaccard index with all triples", xscale="log", ylim=(0, 1.02))
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_title("how few triples are enough (mean, lowest and highest draw)", fontsize=10)
    axes.legend()
    write_figure(path, figure)
