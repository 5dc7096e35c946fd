"""`dspa map show | diff | stability | cost`: what to know of maps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer
from rich.table import Table

from dspa.cli.loading import check_writable
from dspa.cli.tables import console, print_table

Plot = Annotated[Path | None, typer.Option(help="Write a plot here, as PNG.")]


def map_show(
    path: Annotated[Path, typer.Argument(help="A map.")],
    top: Annotated[int, typer.Option(help="Latents to list at each end.", min=0)] = 10,
    delta: Annotated[float, typer.Option(help="Level of the confidence radius of rows.")] = 0.05,
    plot: Plot = None,
) -> None:
    """Tell what a map was made from, how sure its rows are, and which output latents it moves most."""
    from dspa.maps.cdmap import ConditionalDifferenceMap
    from dspa.maps.reports import summary, top_columns

    check_writable("--plot", plot)
    if not 0 < delta < 1:
        raise ValueError(f"--delta is {delta}; accepted: a number between 0 and 1.")
    cdmap = ConditionalDifferenceMap.load(path)
    print_table(f"{path}", vars(cdmap.meta) | summary(cdmap, delta))
    table = Table(title="Output latents by column sum of A, and in how many rows they are")
    for name in ("augmented", "sum", "rows", "ablated", "sum", "rows"):
        table.add_column(name, justify="right")
    for pair in zip(*top_columns(cdmap, top), strict=True):
        table.add_row(*(cell for c in pair for cell in (str(c.latent), f"{c.total:+.4g}", str(c.n_rows))))
    console.print(table)
    if plot is not None:
        from dspa.maps.plots import plot_map

        plot_map(cdmap, plot)
        console.print(f"Plot: {plot}")


def map_diff(
    first: Annotated[Path, typer.Argument(help="A map.")],
    second: Annotated[Path, typer.Argument(help="Another one, of the same SAEs.")],
    plot: Plot = None,
) -> None:
    """Compare two maps: settings, columns, entries, and what their rows ablate."""
    from dspa.maps.cdmap import ConditionalDifferenceMap
    from dspa.maps.reports import difference

    check_writable("--plot", plot)
    a, b = (ConditionalDifferenceMap.load(path) for path in (first, second))
    found = difference(a, b)
    settings: dict[str, Any] = {name: f"{one!r} and {other!r}" for name, (one, other) in found.settings.items()}
    alone, shared, other = found.columns
    print_table(
        f"{first} and {second}",
        settings
        | {
            "columns": f"{alone} in the first alone, {shared} in both, {other} in the second alone",
            "correlation of entries": f"{found.correlation:.4f}",
            "entries of the same sign": f"{found.same_sign:.2%} of those that both have",
            f"{found.k} lowest latents of a row": f"Jaccard index {found.rows:.3f}, mean over rows",
        },
    )
    if plot is not None:
        from dspa.maps.plots import plot_difference

        plot_difference(a, b, plot)
        console.print(f"Plot: {plot}")


def map_stability(
    counts: Annotated[Path, typer.Argument(help="What collect wrote.")],
    size: Annotated[list[int] | None, typer.Option(help="Triples of a map; may be given several times.")] = None,
    draws: Annotated[int, typer.Option(help="Maps a size.", min=1)] = 5,
    prompts: Annotated[int, typer.Option(help="Held-out prompts to select for.", min=1)] = 100,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    k_prompt: Annotated[int, typer.Option(help="Prompt latents that choose.")] = 32,
    k_diff: Annotated[int, typer.Option(help="Output latents to edit at each end, and of the cut.")] = 16,
    percentile: Annotated[float, typer.Option(help="Of a prompt latent's density, from which its gate opens.")] = 90.0,
    gate_rule: Annotated[str, typer.Option(help="published, or active.")] = "published",
    plot: Plot = None,
    csv_path: Annotated[Path | None, typer.Option("--csv", help="Write every draw here.")] = None,
) -> None:
    """How few triples are enough: what prompts would steer by maps of fewer triples, compared with the map of all."""
    from dspa.config import SteeringConfig
    from dspa.maps.stability import stability

    check_writable("--plot", plot)
    check_writable("--csv", csv_path)
    found = stability(
        counts,
        sizes=size,
        draws=draws,
        n_prompts=prompts,
        seed=seed,
        config=SteeringConfig(k_prompt=k_prompt, k_diff=k_diff),
        percentile=percentile,
        gate_rule=gate_rule,
        progress=True,
    )
    table = Table(title=f"Agreement with the map of all triples (Jaccard index), {draws} draws")
    for name in ("triples", "latents a prompt steers", "lowest, highest", "columns", "columns kept"):
        table.add_column(name, justify="right")
    for each in found:
        span = f"{min(each.selected):.3f}, {max(each.selected):.3f}"
        means = (f"{fmean(each.selected):.3f}", span, f"{fmean(each.columns):.3f}", f"{fmean(each.n_columns):.0f}")
        table.add_row(str(each.n_triples), *means)
    console.print(table)
    if csv_path is not None:
        from dspa.files import write_csv

        names = ("triples", "selected", "columns", "n_columns")
        rows = [
            dict(zip(names, (each.n_triples, *draw), strict=True))
            for each in found
            for draw in zip(each.selected, each.columns, each.n_columns, strict=True)
        ]
        write_csv(csv_path, rows, names)
    if plot is not None:
        from dspa.maps.plots import plot_stability

        plot_stability(found, plot)
        console.print(f"Plot: {plot}")


def map_cost(
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt.", min=1)] = 1000,
    chosen: Annotated[int, typer.Option(help="Tokens of a chosen response.", min=1)] = 1000,
    rejected: Annotated[int, typer.Option(help="Tokens of a rejected response.", min=1)] = 1000,
) -> None:
    """What collecting costs, in closed form, beside the published three passes and RAHF-SCIT."""
    from dspa.maps.cost import PUBLISHED, Tokens, rahf_scit, shared_prompt, three_passes

    tokens = Tokens(prompt, chosen, rejected)
    table = Table(title=f"TFLOP a triple of {prompt} + {chosen} and {rejected} tokens, in products with weights")
    for name in ("model", "RAHF-SCIT", "DSPA, three passes", "collect", "fewer than these", "than RAHF-SCIT"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for g in PUBLISHED:
        rahf, three, ours = rahf_scit(g).weights, three_passes(g, tokens).weights, shared_prompt(g, tokens).weights
        cells = (
            *(f"{1e-12 * each:.2f}" for each in (rahf, three, ours)),
            f"{three / ours:.2f}x",
            f"{rahf / ours:.1f}x",
        )
        table.add_row(g.name, *cells)
    console.print(table)
    with_attention = (
        f"{g.name} {three_passes(g, tokens).total / shared_prompt(g, tokens).total:.2f}x" for g in PUBLISHED
    )
    console.print(f"With attention's own products, fewer than three passes: {', '.join(with_attention)}.")
    console.print("2 P a token, P the weights that multiply it; 44728 P a triple for RAHF-SCIT, whatever its length.")


COMMANDS: dict[str, Callable[..., None]] = {
    "show": map_show,
    "diff": map_diff,
    "stability": map_stability,
    "cost": map_cost,
}
