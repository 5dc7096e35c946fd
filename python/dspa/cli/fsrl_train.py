"""`dspa fsrl train | demo | analyse layers`: train adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from dspa.cli.loading import check_writable, device_named, load_model, load_sae, triple_source
from dspa.cli.options import (
    FILES,
    SAE_HELP,
    ChatTemplateKwargs,
    First,
    OnModel,
    Options,
    Split,
    Triples,
    errors_of_options,
    with_options,
)
from dspa.cli.tables import console
from dspa.distributed import rank
from dspa.fsrl.config import FSRLConfig, TrainingConfig

if TYPE_CHECKING:
    from dspa.data.triples import Triple
    from dspa.fsrl.results import HeldOut

Out = Annotated[Path, typer.Option(help="Folder to write; the same command continues a stopped training in it.")]
FIGURES = {"simpo_loss": "SimPO loss", "accuracy": "reward accuracy", "margin": "margin", "l0": "L0", "l1": "L1"}
UNUSUAL = ("initial_threshold", "bandwidth")
FIXED = ("warmup", "max_grad_norm")


@with_options
def train(
    triples: Triples,
    sae: Annotated[str, typer.Option(help=f"SAE at the layer to steer. {SAE_HELP}")],
    out: Out,
    on: OnModel,
    config: Annotated[TrainingConfig, Options("Training", without=FIXED)],
    adapter: Annotated[FSRLConfig, Options("Adapter", without=UNUSUAL)],
    held_out: Annotated[Path | None, typer.Option(help=f"Triples to report on, never trained on: {FILES}.")] = None,
    first: First = None,
    split: Split = "train",
    layer: Annotated[int | None, typer.Option(help="Layer of the SAE, if its files do not contain it.")] = None,
    chat_template_kwargs: ChatTemplateKwargs = None,
) -> None:
    """Train an adapter; the model and the SAE stay as they are.

    For several processes: `torchrun --nproc-per-node K -m dspa fsrl train ...`.
    """
    from dspa import fsrl
    from dspa.fsrl.training import scoring
    from dspa.models.layers import base_model

    data, held_out_triples = _triples(triples, split, first), _held_out(held_out)
    loaded = load_sae(sae, layer, device_named(on.device))
    model, tokenizer = load_model(on)
    fsrl.train(
        *(model, tokenizer, data, fsrl.FSRLAdapter(loaded.to(dtype=model.dtype), adapter), out),
        config=config,
        eval_triples=held_out_triples,
        layers=on.layers,
        model_name=on.model_name,
        chat_template_kwargs=chat_template_kwargs,
    )
    if rank() > 0:
        return
    figures = fsrl.read_held_out(out)
    if held_out_triples is not None and figures is not None:
        options = {**scoring(base_model(model), config), "chat_template_kwargs": chat_template_kwargs}
        base = fsrl.held_out(model, tokenizer, held_out_triples, **options)
        title = f"On {len(held_out_triples)} held-out triples"
        console.print(_table(title, [("base model", base), ("adapter", figures)]))
    console.print(f"Written to {escape(str(out))}.")


@with_options
def layers(
    triples: Triples,
    sae: Annotated[list[str], typer.Option(help=f"SAE of a layer; may be given several times. {SAE_HELP}")],
    held_out: Annotated[Path, typer.Option(help=f"Triples to compare on, never trained on: {FILES}.")],
    out: Out,
    on: OnModel,
    config: Annotated[
        TrainingConfig,
        Options("Training", without=[*FIXED, "beta", "gamma_beta_ratio", "eval_every", "log_every", "report_to"]),
    ],
    adapter: Annotated[FSRLConfig, Options("Adapter", without=[*UNUSUAL, "l1"])],
    l1: Annotated[
        list[float] | None,
        typer.Option(help=f"As for train; may be given several times, by default {FSRLConfig.l1:g}."),
    ] = None,
    first: First = None,
    split: Split = "train",
    chat_template_kwargs: ChatTemplateKwargs = None,
) -> None:
    """Train an adapter at each of several layers, and compare them to find the layer to steer."""
    from dspa import fsrl

    with errors_of_options({"l1": "--l1"}):
        settings = [replace(adapter, l1=value) for value in l1 or [adapter.l1]]
    data, held_out_triples = _triples(triples, split, first), _held_out(held_out)
    saes = [load_sae(spec, None, device_named(on.device)) for spec in sae]
    model, tokenizer = load_model(on)
    sweep = fsrl.train_sweep(
        *(model, tokenizer, data, [loaded.to(dtype=model.dtype) for loaded in saes], settings, out),
        eval_triples=held_out_triples or [],
        config=config,
        layers=on.layers,
        model_name=on.model_name,
        chat_template_kwargs=chat_template_kwargs,
    )
    if rank() > 0:
        return
    rows = [("base model", sweep.base)]
    rows += [
        (f"layer {trained.layer}, {trained.activation}, λ {trained.l1:g}", trained.held_out)
        for trained in sweep.adapters
    ]
    console.print(_table(f"On {sweep.base.n_triples} held-out triples", rows))
    console.print(f"CSV and PNG: {escape(str(out))}")


def demo(
    json_path: Annotated[Path | None, typer.Option("--json", help="File to write all results to.")] = Path(
        "dspa-fsrl-demo.json"
    ),
) -> None:
    """Train adapters for a small language model, and compare them with the base model on held-out prompts.

    Runs on two CPU cores in under three minutes, without a network.
    """
    from dspa.demo import fsrl

    check_writable("--json", json_path)
    fsrl.run(json_path)


def _triples(triples: str, split: str, first: int | None) -> Any:
    """Return the triples to train on; the first are checked before a model is loaded."""
    from dspa.data.triples import load_triples

    source = triple_source(triples, split, stream=False)
    next(load_triples(source))
    return source if first is None else islice(load_triples(source), first)


def _held_out(path: Path | None) -> list[Triple] | None:
    """Return the triples to report on, checked before a model is loaded."""
    from dspa.data.triples import load_triples

    return None if path is None else list(load_triples(path))


def _table(title: str, named: Sequence[tuple[str, HeldOut]]) -> Table:
    """Return a table of figures on held-out triples, one row per model."""
    table = Table(title=title)
    for number, column in enumerate(("", *FIGURES.values())):
        table.add_column(column, justify="right" if number else "left")
    for name, figures in named:
        values = asdict(figures)
        table.add_row(name, *(f"{values[figure]:.4g}" for figure in FIGURES))
    return table
