"""Plots of an audit as SVG, which differ in shape and not by colour alone."""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dspa.audit.edits import ABLATE, AUGMENT, CONTROL, EDITED
from dspa.audit.record import Audit

# Colour, marker and hatch of each group.
STYLES = {
    AUGMENT: ("#0072b2", "^", ""),
    ABLATE: ("#d55e00", "v", "////"),
    CONTROL: ("#666666", "o", "...."),
    EDITED: ("#009e73", "s", "xxxx"),
}


@dataclass(frozen=True)
class Plot:
    """A plot, and a sentence that says what it shows."""

    caption: str
    svg: str


def plots(audit: Audit) -> list[Plot]:
    """Return the plots of an audit, those that its record has data for."""
    made = []
    if any(record.column_sum is not None for record in audit.latents):
        made.append(_column_sums(audit))
    if audit.density:
        made.append(_densities(audit))
    if audit.edits is not None and any(record.edits for record in audit.latents):
        made.append(_edits(audit))
    return made


def _column_sums(audit: Audit) -> Plot:
    figure, axes = _figure()
    for name in (AUGMENT, ABLATE):
        sums = [record.column_sum or 0.0 for record in audit.group(name)]
        colour, _, hatch = STYLES[name]
        axes.bar(range(1, len(sums) + 1), sums, color=colour, hatch=hatch, edgecolor="white", label=name)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel="rank", ylabel="column sum of A")
    axes.legend()
    return Plot("Sums of the map's columns, the largest and the smallest ones, by rank.", _svg(figure, "sums"))


def _densities(audit: Audit) -> Plot:
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    histogram, marks = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    histogram.hist([math.log10(density) for density in audit.density if density], bins=40, color="#bbbbbb")
    histogram.set(ylabel="latents of the SAE")
    for height, (name, (colour, marker, _)) in enumerate(STYLES.items()):
        shown = [math.log10(record.density) for record in audit.group(name) if record.density]
        marks.plot(shown, [-height] * len(shown), marker, color=colour, markersize=4)
    marks.set_yticks([-height for height in range(len(STYLES))], list(STYLES))
    marks.set(ylim=(0.6 - len(STYLES), 0.6), xlabel="log10 of the density")
    n_silent = sum(not density for density in audit.density)
    caption = (
        f"How often latents are active: shares of tokens, without the {n_silent} latents that are active on none. "
        "Below are the audited latents."
    )
    return Plot(caption, _svg(figure, "densities"))


def _edits(audit: Audit) -> Plot:
    figure, axes = _figure()
    for name, (colour, marker, _) in STYLES.items():
        moved = [record.edits for record in audit.group(name) if record.edits]
        if moved:
            changes = [edits.change / edits.n_tokens for edits in moved]
            axes.plot([e.n_tokens for e in moved], changes, marker, color=colour, alpha=0.8, label=name)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="tokens on which it was edited", ylabel="mean change")
    axes.legend()
    return Plot("How often and how far each audited latent was edited in the steered texts.", _svg(figure, "edits"))


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Figure, name: str) -> str:
    """Return a figure as an element of HTML: the same for the same data, its text as text."""
    text = io.StringIO()
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": name}
    with matplotlib.rc_context(settings):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    # Several figures share a page, where the names of their parts must differ.
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg[svg.index("<svg") :])
