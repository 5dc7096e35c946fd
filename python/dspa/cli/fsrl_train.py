"""`dspa fsrl train | demo | analyse layers`: train adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from dspa.cli.loading import check_writable, device_named, load_model, load_sae, triple_source
from dspa.cli.options import SAE_HELP, Device, DType, Layers, Model, Name, Numbers
from dspa.cli.tables import console
from dspa.distributed import rank

if TYPE_CHECKING:
    from dspa.fsrl.results import HeldOut

Triples = Annotated[str, typer.Argument(help="Preference triples in a format of TRL's: JSON Lines, or a data set.")]
Split = Annotated[str, typer.Option(help="Of a data set: which split.")]
First = Annotated[int | None, typer.Option(help="Train on the first N triples only.", min=1)]
Out = Annotated[Path, typer.Option(help="Folder to write; the same command goes on from where it was stopped.")]
Activation = Annotated[str, typer.Option(help="soft_threshold, relu or jumprelu.")]
L1 = Annotated[float, typer.Option(help="Lambda, the weight of the mean L1 norm of what is moved on a response token.")]
Loss = Annotated[str, typer.Option(help="simpo or dpo.")]
Beta = Annotated[float | None, typer.Option(help="Of the loss; 10 for simpo and 0.1 for dpo if not given.")]
Gamma = Annotated[float, typer.Option(help="SimPO's gamma / beta.")]
Rate = Annotated[float, typer.Option(help="The highest learning rate; a cosine schedule after 1 % of warm-up.")]
Batch = Annotated[int, typer.Option(help="Triples a step of the optimizer, over all processes.")]
MicroBatch = Annotated[int, typer.Option(help="Triples a forward pass of a process.")]
Epochs = Annotated[float, typer.Option(help="Passes over the triples.")]
MaxSteps = Annotated[int | None, typer.Option(help="Stop after so many steps, whatever --epochs says.")]
MaxLength = Annotated[int, typer.Option(help="Tokens of prompt and response, from which on responses are cut.")]
Checkpointing = Annotated[bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")]
Seed = Annotated[int, typer.Option(help="Of the order of the triples and the start of the adapter.", min=0)]
CheckpointEvery = Annotated[int, typer.Option(help="Steps between two checkpoints.")]
EvalEvery = Annotated[int, typer.Option(help="Steps between two looks at the held-out triples.")]
LogEvery = Annotated[int, typer.Option(help="Steps between two lines of the log.")]
ReportTo = Annotated[str, typer.Option(help="none, or a tracker that transformers knows: wandb, tensorboard, ...")]
FIGURES = {"simpo_loss": "SimPO loss", "accuracy": "reward accuracy", "margin": "margin", "l0": "L0", "l1": "L1"}


def train(
    triples: Triples,
    model: Model,
    sae: Annotated[str, typer.Option(help=f"At the layer to steer. {SAE_HELP}")],
    out: Out,
    held_out: Annotated[Path | None, typer.Option(help="Triples to report on, not to train on: JSON Lines.")] = None,
    activation: Activation = "soft_threshold",
    l1: L1 = 2e-2,
    loss: Loss = "simpo",
    beta: Beta = None,
    gamma_beta_ratio: Gamma = 0.5,
    lr: Rate = 5e-5,
    batch_size: Batch = 32,
    micro_batch_size: MicroBatch = 2,
    epochs: Epochs = 1.0,
    max_steps: MaxSteps = None,
    max_length: MaxLength = 1024,
    gradient_checkpointing: Checkpointing = False,
    seed: Seed = 0,
    checkpoint_every: CheckpointEvery = 100,
    eval_every: EvalEvery = 100,
    log_every: LogEvery = 10,
    report_to: ReportTo = "none",
    first: First = None,
    split: Split = "train",
    layer: Annotated[int | None, typer.Option(help="Layer of the SAE, if its files do not say it.")] = None,
    device: Device = "auto",
    dtype: Numbers = DType.auto,
    model_name: Name = None,
    layers: Layers = None,
) -> None:
    """Train an adapter; the model and the SAE stay as they are.

    For several processes: `torchrun --nproc-per-node K -m dspa fsrl train ...`.
    """
    from dspa import fsrl
    from dspa.fsrl.training import scoring
    from dspa.models.layers import base_model

    adapter = fsrl.FSRLConfig(activation=activation, l1=l1, seed=seed)
    config = fsrl.TrainingConfig(
        loss=loss,
        beta=beta,
        gamma_beta_ratio=gamma_beta_ratio,
        lr=lr,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        epochs=epochs,
        max_steps=max_steps,
        max_length=max_length,
        gradient_checkpointing=gradient_checkpointing,
        seed=seed,
        checkpoint_every=checkpoint_every,
        eval_every=eval_every,
        log_every=log_every,
        report_to=report_to,
    )
    data, held = _triples(triples, split, first), _held_out(held_out)
    loaded = load_sae(sae, layer, device_named(device))
    lm, tokenizer = load_model(model, device, dtype)
    fsrl.train(
        *(lm, tokenizer, data, fsrl.FSRLAdapter(loaded.to(dtype=lm.dtype), adapter), out),
        config=config,
        eval_triples=held,
        layers=layers,
        model_name=model_name,
    )
    if rank() > 0:
        return
    figures = fsrl.read_held_out(out)
    if held is not None and figures is not None:
        base = fsrl.held_out(lm, tokenizer, held, **scoring(base_model(lm), config))
        console.print(_table(f"On {len(held)} held-out triples", [("base model", base), ("adapter", figures)]))
    console.print(f"Written to {escape(str(out))}.")


def layers(
    triples: Triples,
    model: Model,
    sae: Annotated[list[str], typer.Option(help=f"Of one layer each; may be given several times. {SAE_HELP}")],
    held_out: Annotated[Path, typer.Option(help="Triples to compare on, not to train on: JSON Lines.")],
    out: Out,
    l1: Annotated[list[float] | None, typer.Option(help="Lambda; may be given several times, 0.02 if not.")] = None,
    activation: Activation = "soft_threshold",
    loss: Loss = "simpo",
    lr: Rate = 5e-5,
    batch_size: Batch = 32,
    micro_batch_size: MicroBatch = 2,
    epochs: Epochs = 1.0,
    max_steps: MaxSteps = None,
    max_length: MaxLength = 1024,
    gradient_checkpointing: Checkpointing = False,
    seed: Seed = 0,
    checkpoint_every: CheckpointEvery = 100,
    first: First = None,
    split: Split = "train",
    device: Device = "auto",
    dtype: Numbers = DType.auto,
    model_name: Name = None,
    layer_path: Annotated[
        str | None, typer.Option("--layers", help="Dotted path of the decoder layers, for an unknown architecture.")
    ] = None,
) -> None:
    """Train an adapter at each of several layers, and compare them: which layer is the one to steer."""
    from dspa import fsrl

    settings = [fsrl.FSRLConfig(activation=activation, l1=each, seed=seed) for each in l1 or [2e-2]]
    config = fsrl.TrainingConfig(
        loss=loss,
        lr=lr,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        epochs=epochs,
        max_steps=max_steps,
        max_length=max_length,
        gradient_checkpointing=gradient_checkpointing,
        seed=seed,
        checkpoint_every=checkpoint_every,
    )
    data, held = _triples(triples, split, first), _held_out(held_out)
    saes = [load_sae(each, None, device_named(device)) for each in sae]
    lm, tokenizer = load_model(model, device, dtype)
    found = fsrl.train_sweep(
        *(lm, tokenizer, data, [each.to(dtype=lm.dtype) for each in saes], settings, out),
        eval_triples=held or [],
        config=config,
        layers=layer_path,
        model_name=model_name,
    )
    if rank() > 0:
        return
    named = [(f"layer {each.layer}, {each.activation}, λ {each.l1:g}", each.held_out) for each in found.adapters]
    console.print(_table(f"On {found.base.n_triples} held-out triples", [("base model", found.base), *named]))
    console.print(f"CSV and PNG: {escape(str(out))}")


def demo(
    json_path: Annotated[Path | None, typer.Option("--json", help="Where to write all results.")] = Path(
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
    """The triples to train on, of which the first are checked before a model is loaded."""
    from dspa.data.triples import load_triples

    source = triple_source(triples, split, stream=False)
    next(load_triples(source))
    return source if first is None else islice(load_triples(source), first)


def _held_out(path: Path | None) -> Any:
    from dspa.data.triples import load_triples

    return None if path is None else list(load_triples(path))


def _table(title: str, named: Sequence[tuple[str, HeldOut]]) -> Table:
    table = Table(title=title)
    for number, column in enumerate(("", *FIGURES.values())):
        table.add_column(column, justify="right" if number else "left")
    for name, figures in named:
        values = asdict(figures)
        table.add_row(name, *(f"{values[each]:.4g}" for each in FIGURES))
    return table
