"""`dspa map`: count latents on preference triples, and make maps of the counts."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from dspa.cli import map_reports
from dspa.cli.loading import check_writable, load_all, triple_source
from dspa.cli.options import Device, DType, LayerIn, LayerOut, Layers, Model, Name, Numbers, SAEIn, SAEOut
from dspa.cli.tables import console
from dspa.distributed import rank

if TYPE_CHECKING:
    from dspa.maps.cdmap import ConditionalDifferenceMap
    from dspa.maps.shards import Collection

app = typer.Typer(help="Make and look at conditional-difference maps.", no_args_is_help=True)
for command, function in map_reports.COMMANDS.items():
    app.command(command)(function)

Triples = Annotated[str, typer.Argument(help="Preference triples in a format of TRL's: JSON Lines, or a data set.")]
Split = Annotated[str, typer.Option(help="Of a data set: which split.")]
Stream = Annotated[bool, typer.Option("--stream", help="Of a data set: read it while it is downloaded.")]
First = Annotated[int | None, typer.Option(help="Use only the first N triples.", min=1)]
MaxLength = Annotated[int | None, typer.Option(help="Tokens of prompt and response together.")]
BatchTokens = Annotated[int, typer.Option(help="Padded tokens of a batch; less where memory does not suffice.", min=1)]
Percentile = Annotated[float, typer.Option(help="Of a prompt latent's density, from which its gate opens.")]
GateRule = Annotated[str, typer.Option(help="published, or active: only where the latent is active.")]
CountTokens = Annotated[str, typer.Option(help="all, or text: without special tokens.")]
KDiff = Annotated[int, typer.Option(help="Entries at each end of a row that set the cut.")]
Sparsify = Annotated[bool, typer.Option(help="Set entries below the cut to 0, as published.")]
Out = Annotated[Path, typer.Option(help="Where to write the map.")]
OUT = Path("map.dspa.safetensors")


@app.command("collect")
def map_collect(
    triples: Triples,
    model: Model,
    sae_in: SAEIn,
    sae_out: SAEOut,
    out: Annotated[Path, typer.Option(help="Folder of the counts, from which a stopped run goes on.")] = Path("counts"),
    split: Split = "train",
    stream: Stream = False,
    first: First = None,
    max_length: MaxLength = None,
    batch_tokens: BatchTokens = 8192,
    layer_in: LayerIn = None,
    layer_out: LayerOut = None,
    device: Device = "auto",
    dtype: Numbers = DType.auto,
    model_name: Name = None,
    layers: Layers = None,
) -> None:
    """Count active latents on preference triples, once for maps of any settings.

    For several processes: `torchrun --nproc-per-node K -m dspa map collect ...`, with the same folder for all.
    """
    counts = _collect(
        *(triples, split, stream, model, (sae_in, layer_in), (sae_out, layer_out), device, dtype),
        first=first,
        max_length=max_length,
        batch_tokens=batch_tokens,
        work_dir=out,
        layers=layers,
        model_name=model_name,
    )
    if rank() == 0:
        console.print(f"{counts.n_triples} triples counted in {escape(str(out))}. Next: dspa map reduce {out}")


@app.command("reduce")
def map_reduce(
    counts: Annotated[Path, typer.Argument(help="What collect wrote.")],
    out: Out = OUT,
    first: First = None,
    at_random: Annotated[int | None, typer.Option("--random", help="Use N triples drawn at random.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Of --random.")] = 0,
    only: Annotated[
        Path | None, typer.Option(help="Use the triples whose numbers, from 1, are in this file, one a line.")
    ] = None,
    percentile: Percentile = 90.0,
    gate_rule: GateRule = "published",
    count_tokens: CountTokens = "all",
    k_diff: KDiff = 16,
    sparsify: Sparsify = True,
) -> None:
    """Make a map of counts. Needs no model."""
    check_writable("--out", out)
    from dspa.maps.reduce import reduce
    from dspa.maps.shards import Collection

    collection = Collection.open(counts)
    cdmap = reduce(
        collection,
        percentile=percentile,
        gate_rule=gate_rule,
        count_tokens=count_tokens,
        k_diff=k_diff,
        sparsify=sparsify,
        subset=_subset(collection, first, at_random, seed, only),
        progress=True,
    )
    _save(cdmap, out)


@app.command("build")
def map_build(
    triples: Triples,
    model: Model,
    sae_in: SAEIn,
    sae_out: SAEOut,
    out: Out = OUT,
    split: Split = "train",
    stream: Stream = False,
    first: First = None,
    percentile: Percentile = 90.0,
    gate_rule: GateRule = "published",
    count_tokens: CountTokens = "all",
    k_diff: KDiff = 16,
    sparsify: Sparsify = True,
    max_length: MaxLength = None,
    batch_tokens: BatchTokens = 8192,
    work_dir: Annotated[Path | None, typer.Option(help="Folder from which a stopped run goes on.")] = None,
    layer_in: LayerIn = None,
    layer_out: LayerOut = None,
    device: Device = "auto",
    dtype: Numbers = DType.auto,
    model_name: Name = None,
    layers: Layers = None,
) -> None:
    """Make a map from preference triples: collect and reduce in one go."""
    check_writable("--out", out)
    from dspa.maps.reduce import check_settings, reduce

    check_settings(percentile, gate_rule, k_diff, None, count_tokens)
    counts = _collect(
        *(triples, split, stream, model, (sae_in, layer_in), (sae_out, layer_out), device, dtype),
        first=first,
        max_length=max_length,
        batch_tokens=batch_tokens,
        work_dir=work_dir,
        layers=layers,
        model_name=model_name,
    )
    if rank() > 0:
        return
    cdmap = reduce(
        counts,
        percentile=percentile,
        gate_rule=gate_rule,
        count_tokens=count_tokens,
        k_diff=k_diff,
        sparsify=sparsify,
        progress=True,
    )
    _save(cdmap, out)


@app.command("merge")
def map_merge(
    out: Annotated[Path, typer.Argument(help="A new folder.")],
    counts: Annotated[list[Path], typer.Argument(help="What collect wrote, of different data.")],
) -> None:
    """Make one folder of counts of several, as if their data had been one file."""
    from dspa.maps.merge import merge

    merged = merge(out, counts)
    console.print(f"{merged.n_triples} triples in {escape(str(out))}. Next: dspa map reduce {out}")


def _collect(
    triples: str,
    split: str,
    stream: bool,
    model: str,
    sae_in: tuple[str, int | None],
    sae_out: tuple[str, int | None],
    device: str,
    dtype: DType,
    **options: Any,
) -> Collection:
    from dspa.data.triples import load_triples
    from dspa.maps.collect import collect

    source = triple_source(triples, split, stream)
    # What is wrong at the beginning of a file shows before a model is loaded.
    next(load_triples(source))
    lm, tokenizer, read, edit = load_all(model, sae_in, sae_out, device, dtype)
    try:
        return collect(lm, tokenizer, source, read, edit, **options)
    except KeyboardInterrupt:
        if folder := options["work_dir"]:
            console.print(f"\nStopped. What was counted is kept in {folder}: the same command goes on from there.")
        raise


def _subset(
    counts: Collection, first: int | None, at_random: int | None, seed: int, only: Path | None
) -> list[int] | None:
    """Numbers of the triples that the options mean, from 0."""
    given = [
        name for name, value in (("--first", first), ("--random", at_random), ("--only", only)) if value is not None
    ]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} were given; accepted: one of them.")
    n_triples = counts.n_triples
    if max(first or 0, at_random or 0) > n_triples:
        raise ValueError(
            f"{given[0]} is {first or at_random}; accepted: 1 to {n_triples}, the triples of {counts.folder}."
        )
    if first is not None:
        return list(range(first))
    if at_random is not None:
        return random.Random(seed).sample(range(n_triples), at_random)
    if only is None:
        return None
    accepted = f"accepted: a file of numbers from 1 to {n_triples}, one a line"
    try:
        numbers = [int(line) for line in only.read_text(encoding="utf-8").split()]
    except (OSError, ValueError) as error:
        raise ValueError(f"--only is {only} ({error}); {accepted}.") from error
    if not numbers or min(numbers) < 1 or max(numbers) > n_triples:
        held = f"holds numbers from {min(numbers)} to {max(numbers)}" if numbers else "holds none"
        raise ValueError(f"--only is {only}, which {held}; {accepted}.")
    return [number - 1 for number in numbers]


def _save(cdmap: ConditionalDifferenceMap, out: Path) -> None:
    cdmap.save(out)
    size = out.stat().st_size / 1e6
    console.print(f"{escape(repr(cdmap))}\nWritten to {escape(str(out))} ({size:.1f} MB). Next: dspa map show {out}")
