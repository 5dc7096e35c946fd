"""`dspa baseline`: make the methods that DSPA is compared with."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from dspa.baselines.dpo.config import DPOSettings
from dspa.baselines.rahf.config import AlignmentConfig, TuningConfig
from dspa.cli.loading import check_model, check_writable, checked_triples, load_model
from dspa.cli.options import (
    ChatTemplateKwargs,
    First,
    ModelOptions,
    OnModel,
    Options,
    Split,
    TrainingOut,
    Triples,
    messages_of_options,
    with_options,
)
from dspa.cli.tables import console, print_line, print_next, print_warning
from dspa.config import POSITIONS
from dspa.distributed import rank
from dspa.errors import refusal, require_package

app = typer.Typer(
    help="Make methods from the literature that DSPA is compared with, from the same preference triples.",
    no_args_is_help=True,
)
# The LoRA goes by the names of an architecture that is known.
OnKnownModel = Annotated[ModelOptions, Options("Model and device", without=["other_weights", "layers"])]
rahf = typer.Typer(
    help="RAHF-SCIT: tune a model to tell good from bad answers, then align a LoRA with the difference.",
    no_args_is_help=True,
)
app.add_typer(rahf, name="rahf")


@app.command()
@with_options
def repe(
    triples: Triples,
    layer: Annotated[
        int, typer.Option(help="Decoder layer that is read and steered, from 0; published: DSPA's output layer.", min=0)
    ],
    out: Annotated[Path, typer.Option(help="File of the vector to write.")],
    on: OnModel,
    directions: Annotated[int, typer.Option(help="Number of principal directions.", min=1)] = 16,
    scale: Annotated[float, typer.Option(help="How many times the sum of the directions is added.", min=0)] = 0.5,
    positions: Annotated[
        str, typer.Option(help=f"Tokens to which the vector is added: {', '.join(POSITIONS)}.")
    ] = "all",
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of prompt and response to which responses are cut.", min=2)
    ] = None,
    batch_tokens: Annotated[int, typer.Option(help="Tokens per batch, padding included.", min=1)] = 8192,
    first: First = None,
    split: Split = "train",
    chat_template_kwargs: ChatTemplateKwargs = None,
) -> None:
    """Make RepE's vector: principal directions from rejected to chosen responses.

    `dspa compare --vector`, `dspa serve --vector` and `dspa.SteeringVector` take it.
    """
    from dspa.baselines.repe import repe_vector
    from dspa.costs import write_costs

    if positions not in POSITIONS:
        raise refusal(ValueError, "--positions", repr(positions), ", ".join(POSITIONS))
    check_writable("--out", out, {"TRIPLES": triples})
    check_model(on)
    source = checked_triples(triples, split, first)
    model, tokenizer = load_model(on)
    with messages_of_options({"n_directions": "--directions"}):
        vector = repe_vector(
            *(model, tokenizer, source, layer),
            n_directions=directions,
            scale=scale,
            positions=positions,
            max_length=max_length,
            chat_template_kwargs=chat_template_kwargs,
            batch_tokens=batch_tokens,
            layers=on.layers,
            model_name=on.model_name,
        )
    vector.save(out)
    write_costs(out, vector.costs)
    print_line(f"Written to {out}: {directions} directions at layer {layer}, scale {scale:g}.")
    print_next("compare", "PROMPTS", "--vector", out, "--model", on.model)


@app.command()
@with_options
def junction(
    triples: Triples,
    out: Annotated[Path, typer.Option(help="File of the value head to write.")],
    on: Annotated[ModelOptions, Options("Model and device", without=["other_weights", "layers"])],
    ridge: Annotated[
        float, typer.Option(help="Penalty of the weights, in units of the hidden states' variance.")
    ] = 1e-3,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of prompt and response to which responses are cut.", min=2)
    ] = None,
    batch_tokens: Annotated[int, typer.Option(help="Tokens per batch, padding included.", min=1)] = 8192,
    first: First = None,
    split: Split = "train",
    chat_template_kwargs: ChatTemplateKwargs = None,
) -> None:
    """Fit the value head of Sparse Junction Steering: chosen responses are worth 1, and rejected ones 0.

    It is linear in the last hidden state of the model, which stays as it is. `dspa compare --junction` takes it.
    """
    from dspa.baselines.junction.value import value_head_of_triples

    check_writable("--out", out, {"TRIPLES": triples})
    check_model(on)
    source = checked_triples(triples, split, first)
    model, tokenizer = load_model(on)
    with messages_of_options({"ridge": "--ridge"}):
        head = value_head_of_triples(
            *(model, tokenizer, source),
            ridge=ridge,
            max_length=max_length,
            chat_template_kwargs=chat_template_kwargs,
            batch_tokens=batch_tokens,
            model_name=on.model_name,
        )
    head.save(out)
    record = head.record
    print_line(f"Written to {out}: it explains {record.r2:.1%} of the rewards on {record.n_tokens} tokens.")
    print_next("compare", "PROMPTS", "--junction", out, "--model", on.model)


@app.command()
@with_options
def dpo(
    triples: Triples,
    out: TrainingOut,
    on: OnKnownModel,
    config: Annotated[DPOSettings, Options("Training")],
    first: First = None,
    split: Split = "train",
    chat_template_kwargs: ChatTemplateKwargs = None,
) -> None:
    """Train a model with DPO, all its weights or a LoRA, by TRL's trainer.

    For K processes, begin the command with `torchrun --nproc-per-node K -m dspa baseline dpo`.
    """
    from dspa.baselines.dpo.training import train_dpo

    _train(train_dpo, triples, out, on, config, first, split, chat_template_kwargs)
    if rank() == 0:
        print_next("compare", "PROMPTS", "--tuned", out, "--model", on.model)


@app.command()
def costs(
    reference: Annotated[
        Path, typer.Argument(help="Map that `dspa map build` wrote, with which the others are compared.")
    ],
    others: Annotated[
        list[Path],
        typer.Argument(help="Vectors, and folders of trainings: of RAHF-SCIT both stages, of DPO, of FSRL."),
    ],
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here, as JSON.")] = None,
) -> None:
    """Show side by side what methods cost: operations, wall time and peak memory.

    All have to be made from the same triples with the same model. For example: `dspa baseline costs
    map.dspa.safetensors tuned aligned preferred`
    """
    check_writable("--json", json_path, {str(path): path for path in (reference, *others)})
    from dspa.baselines.cost_table import PUBLISHED_RATIO, cost_table
    from dspa.outputs import write_atomically

    made = cost_table([reference, *others])
    first = made.rows[0]
    table = Table(title=f"Costs of methods from {made.n_triples} triples, with {made.model_name or 'one model'}")
    for name in ("method", "TFLOP", "of the first", "seconds", "of the first", "resident GB", "GPU GB"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for row in made.rows:
        taken, gpu = row.measured, row.measured.peak_gpu_bytes
        table.add_row(
            row.method,
            f"{1e-12 * row.flops:.4g}",
            f"{row.flops / max(first.flops, 1):.3g}x",
            f"{taken.seconds:.4g}",
            f"{taken.seconds / max(first.measured.seconds, 1e-9):.3g}x",
            f"{1e-9 * taken.peak_rss_bytes:.3g}",
            "" if gpu is None else f"{1e-9 * gpu:.3g}",
        )
    console.print(table)
    print_line(
        "Operations are counted in closed form, without those on padding. Memory is the peak of the process, with what "
        f"it loads included. Published for both stages of RAHF-SCIT, by a formula: {PUBLISHED_RATIO}x."
    )
    for doubt in made.doubts:
        print_warning(doubt)
    if json_path is not None:
        write_atomically(json_path, (json.dumps(asdict(made), indent=2) + "\n").encode())


@rahf.command()
@with_options
def tune(
    triples: Triples,
    out: TrainingOut,
    on: OnKnownModel,
    config: Annotated[TuningConfig, Options("Training")],
    first: First = None,
    split: Split = "train",
    chat_template_kwargs: ChatTemplateKwargs = None,
) -> None:
    """Stage 1: train all weights of a model to tell good from bad answers by instructions.

    For K processes, begin the command with `torchrun --nproc-per-node K -m dspa baseline rahf tune`.
    """
    from dspa.baselines.rahf.training import tune as run

    _train(run, triples, out, on, config, first, split, chat_template_kwargs)
    if rank() == 0:
        print_next("baseline", "rahf", "align", triples, "--model", out, "--out", f"{out}-aligned")


@rahf.command()
@with_options
def align(
    triples: Triples,
    out: TrainingOut,
    on: OnKnownModel,
    config: Annotated[AlignmentConfig, Options("Training", without=["targets"])],
    target: Annotated[
        list[int] | None,
        typer.Option(
            help="Layer before which residuals are moved; may be given several times. By default every second one from "
            "5/16 to 9/16 of the layers."
        ),
    ] = None,
    first: First = None,
    split: Split = "train",
    chat_template_kwargs: ChatTemplateKwargs = None,
) -> None:
    """Stage 2: train a LoRA on the tuned model that shifts its residuals from bad towards good answers."""
    from dspa.baselines.rahf.training import align as run

    with messages_of_options({"targets": "--target"}):
        config = replace(config, targets=None if target is None else tuple(target))
        _train(run, triples, out, on, config, first, split, chat_template_kwargs)
    if rank() == 0:
        print_next("compare", "PROMPTS", "--tuned", out, "--model", "MODEL")


def _train(
    run: Callable[..., Any],
    triples: str,
    out: Path,
    on: ModelOptions,
    config: Any,
    first: int | None,
    split: str,
    chat_template_kwargs: dict[str, Any] | None,
) -> None:
    """Run a training, after checking what is quick to check, and print where its result is."""
    from dspa.training_folder import TrainingFolder

    require_package("peft", "Training")
    folder = TrainingFolder(out)
    if rank() == 0:
        folder.check()
        folder.check_free()
    was_finished = folder.finished
    source = checked_triples(triples, split, first)
    check_model(on)
    model, tokenizer = load_model(on)
    run(
        *(model, tokenizer, source, out),
        config=config,
        model_name=on.model_name,
        chat_template_kwargs=chat_template_kwargs,
    )
    if rank() == 0:
        print_line(f"This training was finished before, in {out}." if was_finished else f"Written to {out}.")
