"""`dspa map`: count latents on preference triples, and make maps of the counts."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from dspa.cli import map_reports
from dspa.cli.loading import check_writable, load_all, triple_source
from dspa.cli.options import (
    ChatTemplateKwargs,
    First,
    MapOptions,
    ModelOptions,
    OnModel,
    Options,
    SAEPair,
    SAEPairOptions,
    Split,
    Triples,
    messages_of_options,
    with_options,
)
from dspa.cli.tables import print_line, print_next
from dspa.distributed import rank
from dspa.errors import refusal

if TYPE_CHECKING:
    from dspa.maps.cdmap import ConditionalDifferenceMap
    from dspa.maps.collection import Collection

T = TypeVar("T")

HELP = """DSPA: make maps from preference triples (prompt, chosen, rejected), and judge them.

The rows of a map are latents of the input SAE, which a prompt looks up. Its columns are latents of the output SAE,
which are edited while the model answers.

`build` makes a map in one step; `collect` and `reduce` make maps of several settings from one pass of the model.
`show`, `diff` and `stability` help to judge a map, and `dspa generate --map` steers with it.
"""
app = typer.Typer(help=HELP, no_args_is_help=True)


@dataclass(frozen=True)
class CountingOptions:
    """Reading and batching of triples."""

    stream: bool = field(default=False, metadata={"help": "Read a data set while it is downloaded, instead of after."})
    max_length: int | None = field(
        default=None,
        metadata={"help": "Most tokens of a prompt with its response, which is cut; by default the model's context."},
    )
    batch_tokens: int = field(
        default=8192,
        metadata={"help": "Padded tokens per batch, lowered automatically where memory does not suffice.", "min": 1},
    )


Counting = Annotated[CountingOptions, Options("Counting")]
Settings = Annotated[MapOptions, Options("Map")]
Out = Annotated[Path, typer.Option(help="File to write the map to.")]
OUT = Path("map.dspa.safetensors")


@app.command("build")
@with_options
def map_build(
    triples: Triples,
    on: OnModel,
    pair: SAEPair,
    counting: Counting,
    settings: Settings,
    out: Out = OUT,
    split: Split = "train",
    first: First = None,
    work_dir: Annotated[
        Path | None,
        typer.Option(help="Folder to keep the counts in; the same command continues a stopped run in it."),
    ] = None,
    chat_template_kwargs: ChatTemplateKwargs = None,
) -> None:
    """Make a map from preference triples: collect and reduce in one step.

    For example: `dspa map build preferences.jsonl --model google/gemma-2-2b --sae-in
    gemma-scope-2b-pt-res-canonical:layer_7/width_16k/canonical --sae-out
    gemma-scope-2b-pt-res-canonical:layer_24/width_16k/canonical`
    """
    check_writable("--out", out, {"TRIPLES": triples, "--work-dir": work_dir} | _places(on, pair))
    from dspa.maps.build import build_map

    if work_dir is not None:
        _check_free(work_dir)

    options = {"first": first, "work_dir": work_dir, "chat_template_kwargs": chat_template_kwargs, **asdict(settings)}
    cdmap = _call_on_triples(build_map, triples, split, on, pair, counting, **options)
    if cdmap is not None:
        _save(cdmap, out)


@app.command("collect")
@with_options
def map_collect(
    triples: Triples,
    on: OnModel,
    pair: SAEPair,
    counting: Counting,
    out: Annotated[
        Path, typer.Option(help="Folder of the counts; the same command continues a stopped run in it.")
    ] = Path("counts"),
    split: Split = "train",
    first: First = None,
    chat_template_kwargs: ChatTemplateKwargs = None,
) -> None:
    """Run the model on preference triples and count active latents, once for maps of any settings.

    For several processes, `torchrun --nproc-per-node K -m dspa map collect ...`, with the same folder for all.
    """
    from dspa.maps.collect import collect

    _check_free(out)
    options: dict[str, Any] = {"first": first, "work_dir": out, "chat_template_kwargs": chat_template_kwargs}
    counts = _call_on_triples(collect, triples, split, on, pair, counting, **options)
    if rank() == 0:
        print_line(f"{counts.n_triples} triples counted in {out}.")
        print_next("map", "reduce", out)


@app.command("reduce")
@with_options
def map_reduce(
    counts: Annotated[Path, typer.Argument(help="Folder that dspa map collect wrote.")],
    settings: Settings,
    out: Out = OUT,
    first: First = None,
    at_random: Annotated[int | None, typer.Option("--random", help="Use N triples drawn at random.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Seed of --random.")] = 0,
    only: Annotated[
        Path | None, typer.Option(help="Use the triples whose numbers, from 1, are in this file, one per line.")
    ] = None,
) -> None:
    """Make a map from counts, without a model, with any of these settings.

    For example: `dspa map reduce counts --gate-rule active --out active.dspa.safetensors`
    """
    check_writable("--out", out, {"COUNTS": counts, "--only": only})
    from dspa.maps.collection import Collection
    from dspa.maps.reduce import reduce

    collection = Collection.open(counts)
    subset = _subset(collection, first, at_random, seed, only)
    _save(reduce(collection, **asdict(settings), subset=subset, progress=True), out)


@app.command("merge")
def map_merge(
    out: Annotated[Path, typer.Argument(help="New folder to write.")],
    counts: Annotated[list[Path], typer.Argument(help="Folders that dspa map collect wrote, of different data.")],
) -> None:
    """Join several folders of counts into one, as if their data had been one file.

    For example: `dspa map merge all counts more-counts`
    """
    from dspa.maps.merge import merge

    merged = merge(out, counts)
    print_line(f"{merged.n_triples} triples in {out}.")
    print_next("map", "reduce", out)


for command, function in map_reports.COMMANDS.items():
    app.command(command)(function)


def _call_on_triples(
    function: Callable[..., T],
    triples: str,
    split: str,
    on: ModelOptions,
    pair: SAEPairOptions,
    counting: CountingOptions,
    **options: Any,
) -> T:
    """Call `collect` or `build_map` on triples, the first of which is checked before a model is loaded."""
    from dspa.data.triples import load_triples

    source = triple_source(triples, split, counting.stream)
    next(load_triples(source))
    model, tokenizer, sae_in, sae_out = load_all(on, pair)
    with messages_of_options({"first": "--first"}):
        return function(
            *(model, tokenizer, source, sae_in, sae_out),
            max_length=counting.max_length,
            batch_tokens=counting.batch_tokens,
            layers=on.layers,
            model_name=on.model_name,
            **options,
        )


def _places(on: ModelOptions, pair: SAEPairOptions) -> dict[str, str | None]:
    """Return the places of a model and two SAEs, by their options."""
    return {"--model": on.model, "--sae-in": pair.sae_in, "--sae-out": pair.sae_out}


def _check_free(folder: Path) -> None:
    """Check a folder of counts before anything is loaded; the first of several processes does it for all."""
    from dspa.maps.collection import Collection

    if rank() == 0:
        Collection.check_free(folder)


def _subset(
    counts: Collection, first: int | None, at_random: int | None, seed: int, only: Path | None
) -> list[int] | None:
    """Return the numbers, from 0, of the triples that the options mean; None for all."""
    given = [
        name for name, value in (("--first", first), ("--random", at_random), ("--only", only)) if value is not None
    ]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} were given; accepted: one of them.")
    n_triples = counts.n_triples
    if max(first or 0, at_random or 0) > n_triples:
        raise refusal(ValueError, given[0], first or at_random, f"1 to {n_triples}, the triples of {counts.folder}")
    if first is not None:
        return list(range(first))
    if at_random is not None:
        return random.Random(seed).sample(range(n_triples), at_random)
    if only is None:
        return None
    from dspa.data.lines import read_lines

    accepted = f"a file of numbers from 1 to {n_triples}, one per line"
    numbers = []
    for name, line in read_lines(only, ValueError):
        if not re.fullmatch(r"\s*[0-9]+\s*", line):
            raise refusal(ValueError, f"--only: {name}", repr(line[:60]), accepted)
        numbers.append(int(line))
    if not numbers or min(numbers) < 1 or max(numbers) > n_triples:
        held = f"holds numbers from {min(numbers)} to {max(numbers)}" if numbers else "holds none"
        raise refusal(ValueError, "--only", f"{only}, which {held}", accepted)
    return [number - 1 for number in numbers]


def _save(cdmap: ConditionalDifferenceMap, out: Path) -> None:
    """Write a map, and print what it is."""
    from dspa.costs import write_costs

    cdmap.save(out)
    write_costs(out, cdmap.costs)
    print_line(f"{cdmap!r}\nWritten to {out} ({out.stat().st_size / 1e6:.1f} MB).")
    print_next("map", "show", out)
