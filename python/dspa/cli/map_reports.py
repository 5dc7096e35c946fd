"""`dspa map show | diff | stability | cost`: reports on maps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer
from rich.table import Table

from dspa.cli.loading import check_writable
from dspa.cli.options import MapOptions, Options, with_options
from dspa.cli.tables import console, print_table
from dspa.config import SteeringConfig
from dspa.errors import refusal

Plot = Annotated[Path | None, typer.Option(help="Write a plot here, as PNG.")]


def map_show(
    path: Annotated[Path, typer.Argument(help="Map to show.")],
    top: Annotated[int, typer.Option(help="Number of latents to list at each end.", min=0)] = 10,
    delta: Annotated[float, typer.Option(help="Level of the confidence radius of rows.")] = 0.05,
    plot: Plot = None,
) -> None:
    """Show what a map was made from, how sure its rows are, and which output latents it moves most."""
    from dspa.maps.cdmap import ConditionalDifferenceMap
    from dspa.maps.reports import summary, top_columns

    check_writable("--plot", plot)
    if not 0 < delta < 1:
        raise refusal(ValueError, "--delta", delta, "a number between 0 and 1")
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
    first: Annotated[Path, typer.Argument(help="One map.")],
    second: Annotated[Path, typer.Argument(help="Another map, of the same SAEs.")],
    plot: Plot = None,
) -> None:
    """Compare two maps: settings, columns, entries, and what their rows ablate."""
    from dspa.maps.cdmap import ConditionalDifferenceMap
    from dspa.maps.reports import difference

    check_writable("--plot", plot)
    a, b = (ConditionalDifferenceMap.load(path) for path in (first, second))
    compared = difference(a, b)
    settings: dict[str, Any] = {name: f"{one!r} and {other!r}" for name, (one, other) in compared.settings.items()}
    only_first, shared, only_second = compared.columns
    print_table(
        f"{first} and {second}",
        settings
        | {
            "columns": f"{only_first} in the first only, {shared} in both, {only_second} in the second only",
            "correlation of entries": f"{compared.correlation:.4f}",
            "entries of the same sign": f"{compared.same_sign:.2%} of those that both have",
            f"{compared.k} lowest latents per row": f"Jaccard index {compared.rows:.3f}, mean over rows",
        },
    )
    if plot is not None:
        from dspa.maps.plots import plot_difference

        plot_difference(a, b, plot)
        console.print(f"Plot: {plot}")


@with_options
def map_stability(
    counts: Annotated[Path, typer.Argument(help="Folder that dspa map collect wrote.")],
    config: Annotated[
        SteeringConfig, Options("Steering", without=["alpha", "mode", "positions", "scoring", "ridge", "delta"])
    ],
    settings: Annotated[MapOptions, Options("Map", without=["count_tokens", "k_diff", "sparsify"])],
    size: Annotated[list[int] | None, typer.Option(help="Triples per map; may be given several times.")] = None,
    draws: Annotated[int, typer.Option(help="Number of maps per size.", min=1)] = 5,
    prompts: Annotated[int, typer.Option(help="Number of held-out prompts to select for.", min=1)] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the draws.", min=0)] = 0,
    plot: Plot = None,
    csv_path: Annotated[Path | None, typer.Option("--csv", help="Write every draw here.")] = None,
) -> None:
    """Show how few triples are enough: what maps of fewer triples steer, compared with the map of all.

    `--k-diff` is also the number of entries that set the cut of the maps.
    """
    from dspa.maps.stability import stability

    check_writable("--plot", plot)
    check_writable("--csv", csv_path)
    reports = stability(
        counts,
        sizes=size,
        draws=draws,
        n_prompts=prompts,
        seed=seed,
        config=config,
        percentile=settings.percentile,
        gate_rule=settings.gate_rule,
        progress=True,
    )
    table = Table(title=f"Agreement with the map of all triples (Jaccard index), {draws} draws")
    for name in ("triples", "latents steered per prompt", "lowest, highest", "columns", "columns kept"):
        table.add_column(name, justify="right")
    for report in reports:
        span = f"{min(report.selected):.3f}, {max(report.selected):.3f}"
        means = (
            f"{fmean(report.selected):.3f}",
            span,
            f"{fmean(report.columns):.3f}",
            f"{fmean(report.n_columns):.0f}",
        )
        table.add_row(str(report.n_triples), *means)
    console.print(table)
    if csv_path is not None:
        from dspa.files import write_csv

        names = ("triples", "selected", "columns", "n_columns")
        rows = [
            dict(zip(names, (report.n_triples, *draw), strict=True))
            for report in reports
            for draw in zip(report.selected, report.columns, report.n_columns, strict=True)
        ]
        write_csv(csv_path, rows, names)
    if plot is not None:
        from dspa.maps.plots import plot_stability

        plot_stability(reports, plot)
        console.print(f"Plot: {plot}")


def map_cost(
    prompt: Annotated[int, typer.Option(help="Tokens per prompt.", min=1)] = 1000,
    chosen: Annotated[int, typer.Option(help="Tokens per chosen response.", min=1)] = 1000,
    rejected: Annotated[int, typer.Option(help="Tokens per rejected response.", min=1)] = 1000,
) -> None:
    """Show what collecting costs, in closed form, compared with the published three passes and RAHF-SCIT."""
    from dspa.maps.cost import PUBLISHED, Tokens, rahf_scit, shared_prompt, three_passes

    tokens = Tokens(prompt, chosen, rejected)
    table = Table(title=f"TFLOP per triple of {prompt} + {chosen} and {rejected} tokens, in products with weights")
    for name in ("model", "RAHF-SCIT", "DSPA, three passes", "collect", "fewer than these", "than RAHF-SCIT"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for g in PUBLISHED:
        rahf, three, ours = rahf_scit(g).weights, three_passes(g, tokens).weights, shared_prompt(g, tokens).weights
        cells = (
            *(f"{1e-12 * flop:.2f}" for flop in (rahf, three, ours)),
            f"{three / ours:.2f}x",
            f"{rahf / ours:.1f}x",
        )
        table.add_row(g.name, *cells)
    console.print(table)
    with_attention = (
        f"{g.name} {three_passes(g, tokens).total / shared_prompt(g, tokens).total:.2f}x" for g in PUBLISHED
    )
    console.print(f"Fewer than three passes with the products of attention too: {', '.join(with_attention)}.")
    console.print(
        "A token takes 2 P, where P weights multiply it. RAHF-SCIT takes 44728 P per triple, whatever its length."
    )


COMMANDS: dict[str, Callable[..., None]] = {
    "show": map_show,
    "diff": map_diff,
    "stability": map_stability,
    "cost": map_cost,
}
