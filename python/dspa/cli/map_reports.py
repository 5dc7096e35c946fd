"""`dspa map show | diff | stability | cost`: reports on maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from dspa.cli.loading import check_writable, load_pair
from dspa.cli.map_show import Plot, map_show
from dspa.cli.options import (
    MapOptions,
    Options,
    RecordedModelOptions,
    RecordedSAEPair,
    RecordedSAEPairOptions,
    with_options,
)
from dspa.cli.tables import console, print_figures, print_line
from dspa.config import SteeringConfig
from dspa.errors import refusal

if TYPE_CHECKING:
    from dspa.maps.cost import Setup
    from dspa.maps.stability import Stability


def map_diff(
    first: Annotated[Path, typer.Argument(help="One map.")],
    second: Annotated[Path, typer.Argument(help="Another map, of the same SAEs.")],
    plot: Plot = None,
) -> None:
    """Compare two maps of the same SAEs: settings, columns, entries, and what their rows ablate.

    For example: `dspa map diff map.dspa.safetensors active.dspa.safetensors`
    """
    from dspa.maps.cdmap import ConditionalDifferenceMap
    from dspa.maps.difference import difference

    check_writable("--plot", plot, {"one map": first, "the other map": second})
    a, b = (ConditionalDifferenceMap.load(path) for path in (first, second))
    compared = difference(a, b)
    only_first, shared, only_second = compared.columns
    print_figures(
        f"{first} and {second}",
        [
            *((name, f"{one!r} and {other!r}", "") for name, (one, other) in compared.settings.items()),
            ("columns", f"{only_first} in the first only, {shared} in both, {only_second} in the second only", ""),
            ("correlation of entries", _number(compared.correlation, ".4f"), "of those that are not 0 in both or one"),
            ("entries of the same sign", _number(compared.same_sign, ".2%"), "of those that are not 0 in both"),
            (
                f"{compared.k} lowest latents per row",
                f"Jaccard index {_number(compared.rows, '.3f')}",
                "mean over rows that ablate in both or one; 1: the same latents, 0: none in common",
            ),
        ],
    )
    if plot is not None:
        from dspa.maps.plots import plot_difference

        plot_difference(a, b, plot)
        print_line(f"Plot: {plot}")


def _number(value: float | None, form: str) -> str:
    return "not defined" if value is None else format(value, form)


@with_options
def map_stability(
    counts: Annotated[Path, typer.Argument(help="Folder that dspa map collect wrote.")],
    config: Annotated[
        SteeringConfig, Options("Steering", without=["alpha", "mode", "positions", "scoring", "ridge", "delta"])
    ],
    settings: Annotated[MapOptions, Options("Map", without=["count_tokens", "k_diff", "sparsify"])],
    size: Annotated[
        list[int] | None,
        typer.Option(help="Triples per map; may be given several times. By default 25, 50, 100, ... and all."),
    ] = None,
    draws: Annotated[int, typer.Option(help="Number of maps per size.", min=1)] = 5,
    prompts: Annotated[
        int,
        typer.Option(help="Number of prompts to hold out of the maps and to steer by them, at most a fifth.", min=1),
    ] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the draws.", min=0)] = 0,
    plot: Plot = None,
    csv_path: Annotated[Path | None, typer.Option("--csv", help="Write every draw here, as CSV.")] = None,
) -> None:
    """Show how few triples are enough: what maps of fewer triples steer, compared with the map of all.

    `--k-diff` is also the number of entries that set the cut of the maps.

    For example: `dspa map stability counts --plot stability.png`
    """
    from dspa.maps.stability import stability

    check_writable("--plot", plot, {"COUNTS": counts})
    check_writable("--csv", csv_path, {"COUNTS": counts, "--plot": plot})
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
    _print_stability(reports, draws)
    prevented = "; --gate-rule active prevents that" if settings.gate_rule == "published" else ""
    console.print(
        "Jaccard index: 1 for the same latents, 0 for none in common. A draw repeats triples, so that even one of "
        "all triples stays below 1. If smaller ones come near it, more triples of this kind would change little.\n"
        f"always open: number of the {config.k_prompt} latents that a held-out prompt looks up whose gate is open on "
        f"every triple. Each adds the mean difference, the same for all prompts{prevented}."
    )
    if csv_path is not None:
        _write_draws(reports, csv_path)
    if plot is not None:
        from dspa.maps.plots import plot_stability

        plot_stability(reports, plot)
        print_line(f"Plot: {plot}")


def _print_stability(reports: Sequence[Stability], draws: int) -> None:
    """Print the means over the draws of each size."""
    table = Table(title=f"Agreement with the map of all triples (Jaccard index), {draws} draws")
    for name in ("triples", "latents steered per prompt", "lowest, highest", "columns", "columns kept", "always open"):
        table.add_column(name, justify="right")
    for report in reports:
        table.add_row(
            str(report.n_triples),
            f"{fmean(report.selected):.3f}",
            f"{min(report.selected):.3f}, {max(report.selected):.3f}",
            f"{fmean(report.columns):.3f}",
            f"{fmean(report.n_columns):.0f}",
            f"{fmean(report.always_open):.1f}",
        )
    console.print(table)


def _write_draws(reports: Sequence[Stability], path: Path) -> None:
    """Write every draw as CSV."""
    from dspa.files import write_csv

    names = ("selected", "columns", "n_columns", "always_open")
    rows = [
        {"triples": report.n_triples} | dict(zip(names, draw, strict=True))
        for report in reports
        for draw in zip(*(getattr(report, name) for name in names), strict=True)
    ]
    write_csv(path, rows, ("triples", *names))


@with_options
def map_cost(
    on: Annotated[RecordedModelOptions, Options("Model", without=["device", "model_name", "other_weights"])],
    pair: RecordedSAEPair,
    config: Annotated[SteeringConfig, Options("Steering", without=["alpha", "positions", "scoring", "ridge", "delta"])],
    map_path: Annotated[
        Path | None, typer.Option("--map", help="Map, whose SAEs, columns and recorded model are used.")
    ] = None,
    prompt: Annotated[int, typer.Option(help="Tokens per prompt.", min=1)] = 1000,
    chosen: Annotated[int, typer.Option(help="Tokens per chosen response.", min=1)] = 1000,
    rejected: Annotated[int, typer.Option(help="Tokens per rejected response.", min=1)] = 1000,
) -> None:
    """Predict what a map and steering cost: for a --map, for a --model with two SAEs, or for the published models.

    Operations and bytes are counted from sizes. Nothing is run or timed, and no weights of the model are read.

    For example: `dspa map cost --map map.dspa.safetensors`
    """
    from dspa.maps.cost import PUBLISHED, Tokens, figures

    given = (map_path, on.model, pair.sae_in, pair.sae_out)
    setups = PUBLISHED if not any(given) else [_setup(map_path, on, pair)]
    columns = [figures(setup, Tokens(prompt, chosen, rejected), config) for setup in setups]
    title = f"Predicted for triples of {prompt} + {chosen} and {rejected} tokens; nothing was measured"
    table = Table("", *(setup.model.name for setup in setups), "what it is", title=title)
    for line in zip(*columns, strict=True):
        table.add_row(line[0].name, *(figure.value for figure in line), line[0].meaning)
    console.print(table)


def _setup(map_path: Path | None, on: RecordedModelOptions, pair: RecordedSAEPairOptions) -> Setup:
    """Read the sizes of a model and its SAEs: those of a map, or of two SAEs."""
    from dspa.maps.cdmap import ConditionalDifferenceMap
    from dspa.maps.cost import Setup
    from dspa.maps.passes import shares_prompts
    from dspa.models.sizes import empty_model, sizes_of
    from dspa.saes.placement import required_layer

    if map_path is not None and (pair.sae_in or pair.sae_out):
        raise ValueError("--map and SAEs were given; accepted: one of both. A map knows the sizes of its SAEs.")
    cdmap = None if map_path is None else ConditionalDifferenceMap.load(map_path)
    recorded = None if cdmap is None else cdmap.sources.get("model")
    name = on.model or (recorded and recorded.path)
    if not name:
        raise refusal(ValueError, "--model", "not given, nor recorded in a map", "a folder, or a name on the Hub")
    model = empty_model(name, trust_remote_code=on.trust_remote_code)
    sizes, shares = sizes_of(model, on.dtype, on.layers), shares_prompts(model)
    if cdmap is not None:
        meta = cdmap.meta
        places = {name: getattr(meta, name) for name in ("layer_in", "layer_out", "d_sae_in", "d_sae_out")}
        return Setup(sizes, **places, n_columns=len(cdmap.columns), shares_prompts=shares)
    if not (pair.sae_in and pair.sae_out):
        raise refusal(ValueError, "--sae-in or --sae-out", "not given", "both of them, or --map")
    sae_in, sae_out = load_pair(pair, "cpu")
    for option, sae in (("--sae-in", sae_in), ("--sae-out", sae_out)):
        if sae.d_in != sizes.d_model:
            raise refusal(ValueError, option, f"an SAE of width {sae.d_in}", f"{sizes.d_model}, that of {name}")
    return Setup(
        model=sizes,
        layer_in=required_layer(sae_in),
        layer_out=required_layer(sae_out),
        d_sae_in=sae_in.d_sae,
        d_sae_out=sae_out.d_sae,
        shares_prompts=shares,
    )


COMMANDS: dict[str, Callable[..., None]] = {
    "show": map_show,
    "diff": map_diff,
    "stability": map_stability,
    "cost": map_cost,
}
