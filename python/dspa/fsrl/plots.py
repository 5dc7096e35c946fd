"""Plots of analyses and sweeps, as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from dspa.evaluate.coherence import MetricChange
from dspa.files import write_figure
from dspa.fsrl.ablations import METRICS, FractionCurve, MaskEffect, measures
from dspa.fsrl.categories import CategoryShare
from dspa.fsrl.results import Sweep, Trained
from dspa.fsrl.usage import Decay, Usage

NAMES = {"loss": "SimPO loss", "accuracy": "reward accuracy", "win_rate": "win rate over the base model"}


def plot_usage(usage: Usage, decay: Decay | None, path: Path) -> None:
    """Plot share of tokens and mean size, each by its own rank, with the fitted decay of the share."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    shares, sizes = figure.subplots(1, 2)
    ranks = np.arange(1, len(usage.moved) + 1)
    shares.plot(ranks, usage.falling_shares.numpy(), ".", markersize=4, label="latents")
    if decay is not None:
        fitted = decay.a * np.exp(-ranks / decay.tau)
        name = f"{decay.a:.3g} exp(-rank / {decay.tau:.3g}), R² {decay.r2:.3f}"
        shares.plot(ranks, fitted, color="black", linewidth=1, label=name)
    # Far below the least use, the curve would take most of a logarithmic axis.
    shares.set(yscale="log", ylim=(0.5 / usage.n_tokens, 1.5), xlabel="rank by share", ylabel="share of tokens, v ≠ 0")
    shares.set_title("use of latents", fontsize=10)
    shares.legend()
    sizes.plot(ranks, usage.mean[usage.ranked].numpy(), ".", markersize=4)
    sizes.set(yscale="log", xlabel="rank by mean |v|", ylabel="mean |v|")
    sizes.set_title(f"mean size over {usage.n_tokens} tokens", fontsize=10)
    write_figure(path, figure)


def plot_fractions(curve: FractionCurve, path: Path) -> None:
    """Plot each measure over the fraction that is kept, with the base model's."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    points = [measures(scores, curve.base) for scores in curve.scores]
    # Equal steps on the axis, since many fractions are small.
    steps = range(len(points))
    for axes, metric in zip(figure.subplots(1, len(METRICS)), METRICS, strict=True):
        axes.plot(steps, [point[metric] for point in points], marker="o", label="adapter")
        if f"{metric}_low" in points[0]:
            low, high = ([point[f"{metric}_{end}"] for point in points] for end in ("low", "high"))
            axes.fill_between(steps, low, high, alpha=0.2, label="95 % Wilson interval")
        axes.axhline(measures(curve.base, curve.base)[metric], color="black", linewidth=1, label="base model")
        axes.set_xticks(steps, [f"{fraction:g}" for fraction in curve.fractions], fontsize=8)
        axes.set(xlabel="fraction of a token's v that is kept", ylabel=NAMES[metric])
        axes.legend(fontsize=7)
    write_figure(path, figure)


def plot_masks(effect: MaskEffect, path: Path) -> None:
    """Plot each measure with the given latents masked, among random sets of the same size."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(METRICS)), METRICS, strict=True):
        comparison = effect.compare(metric)
        axes.hist(effect.values(metric), bins=min(20, len(effect.random)), color="C7", label="random sets")
        axes.axvspan(comparison.low, comparison.high, alpha=0.2, color="C0", label="their mean, 95 % t interval")
        axes.axvline(comparison.given, color="C3", label=f"given, percentile {comparison.percentile:.0f}")
        axes.axvline(comparison.whole, color="C2", linestyle="--", label="whole adapter")
        axes.axvline(comparison.base, color="black", linewidth=1, label="base model")
        axes.set(xlabel=NAMES[metric], ylabel="sets")
        axes.legend(fontsize=7)
    figure.suptitle(f"{len(effect.latents)} latents masked", fontsize=10)
    write_figure(path, figure)


def plot_categories(shares: Sequence[CategoryShare], quality: str, path: Path) -> None:
    """Plot each category's shares of use and of labelled latents, titled with the quality of the labels."""
    figure = Figure(figsize=(8, 1.6 + 0.6 * len(shares)), layout="constrained")
    axes = figure.subplots()
    place = np.arange(len(shares))
    bars = {
        "sum of |v|": [share.mass for share in shares],
        "number of v ≠ 0": [share.active for share in shares],
        "labelled latents": [share.latents or 0.0 for share in shares],
    }
    for n, (name, values) in enumerate(bars.items()):
        axes.barh(place + 0.27 * (n - 1), values, height=0.25, label=name)
    axes.set_yticks(place, [share.category for share in shares])
    axes.invert_yaxis()
    axes.set(xlabel="share")
    axes.set_title(f"quality of labels: {quality}", fontsize=9)
    axes.legend(fontsize=8)
    write_figure(path, figure)


def plot_coherence(changes: Sequence[MetricChange], path: Path) -> None:
    """Plot the mean paired difference of each measure, with its interval."""
    figure = Figure(figsize=(2 * len(changes), 3.4), layout="constrained")
    for axes, change in zip(figure.subplots(1, len(changes)), changes, strict=True):
        error = [[change.difference - change.low], [change.high - change.difference]]
        axes.errorbar([0], [change.difference], yerr=error, marker="o", capsize=4)
        axes.axhline(0, color="black", linewidth=1)
        axes.set_xticks([])
        axes.set_title(f"{change.metric}\nbase {change.base:.3g}, steered {change.steered:.3g}", fontsize=8)
        axes.tick_params(labelsize=7)
    figure.supylabel("steered minus base, 95 % bootstrap interval", fontsize=8)
    write_figure(path, figure)


def plot_sweep(sweep: Sweep, path: Path) -> None:
    """Plot held-out loss, accuracy and L0 over layers, or over lambda if there is one layer."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    by_layer = len({adapter.layer for adapter in sweep.adapters}) > 1
    values = sorted({adapter.layer if by_layer else adapter.l1 for adapter in sweep.adapters})
    lines: dict[str, list[Trained]] = {}
    for adapter in sweep.adapters:
        label = f"{adapter.activation}, λ {adapter.l1:g}" if by_layer else adapter.activation
        lines.setdefault(label, []).append(adapter)
    loss, accuracy, *_ = sweep.base.named
    titles = {loss: loss, accuracy: accuracy, "L0": "L0, mean over response tokens"}
    for axes, (name, title) in zip(figure.subplots(1, len(titles)), titles.items(), strict=True):
        for label, adapters in lines.items():
            places = [values.index(adapter.layer if by_layer else adapter.l1) for adapter in adapters]
            points = sorted(zip(places, (adapter.held_out.named[name] for adapter in adapters), strict=True))
            axes.plot(*zip(*points, strict=True), marker="o", label=label)
        axes.axhline(sweep.base.named[name], color="black", linewidth=1, label="base model")
        axes.set_xticks(range(len(values)), [f"{value:g}" for value in values])
        axes.set(xlabel="layer" if by_layer else "λ", ylabel=title)
        axes.legend(fontsize=7)
    write_figure(path, figure)
