"""`dspa fsrl train | demo | analyse layers`: train adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dspa.cli.loading import check_model, check_writable, checked_triples, load_model, load_sae
from dspa.cli.options import (
    FILES,
    SAE_HELP,
    ChatTemplateKwargs,
    First,
    OnModel,
    Options,
    Split,
    TrainingOut,
    Triples,
    messages_of_options,
    name_options,
    with_options,
)
from dspa.cli.tables import column_table, console, print_line, print_next, print_warning
from dspa.distributed import device_named, rank
from dspa.errors import require_package
from dspa.fsrl.config import FSRLConfig, TrainingConfig
from dspa.outputs import try_folder
from dspa.training_folder import TrainingFolder

if TYPE_CHECKING:
    from dspa.data.triples import Example
    from dspa.fsrl.adapter import FSRLAdapter
    from dspa.fsrl.results import HeldOut, HeldOutRankings

UNUSUAL = ("initial_threshold", "bandwidth")
FIXED = ("warmup", "max_grad_norm")


@with_options
def train(
    triples: Triples,
    sae: Annotated[str, typer.Option(help=f"SAE at the layer to steer. {SAE_HELP}")],
    out: TrainingOut,
    on: OnModel,
    config: Annotated[TrainingConfig, Options("Training", without=FIXED)],
    adapter: Annotated[FSRLConfig, Options("Adapter", without=UNUSUAL)],
    held_out: Annotated[
        Path | None,
        typer.Option(help=f"Data of the same kind to measure the adapter on, not trained on: {FILES}."),
    ] = None,
    first: First = None,
    split: Split = "train",
    layer: Annotated[int | None, typer.Option(help="Layer of the SAE, if its files do not contain it.")] = None,
    chat_template_kwargs: ChatTemplateKwargs = None,
) -> None:
    """Train an adapter; the model and the SAE stay as they are.

    With --held-out, a table at the end compares it with the base model: loss, reward accuracy, how many latents it
    moves, and how it writes. For K processes, begin the command with `torchrun --nproc-per-node K -m dspa fsrl train`.
    """
    from dspa import fsrl

    require_package("trl", "Training an adapter")
    if rank() == 0:
        TrainingFolder(out).check()
        TrainingFolder(out).check_free()
    was_finished = TrainingFolder(out).finished
    data, evaluated = checked_triples(triples, split, first, config.load), _held_out(held_out, config)
    check_model(on)
    loaded = load_sae(sae, layer, device_named(on.device))
    model, tokenizer = load_model(on)
    trained = fsrl.train(
        *(model, tokenizer, data, fsrl.FSRLAdapter(loaded.to(dtype=model.dtype), adapter), out),
        config=config,
        eval_triples=evaluated,
        layers=on.layers,
        model_name=on.model_name,
        chat_template_kwargs=chat_template_kwargs,
    )
    if rank() > 0:
        return
    print_line(f"This training was finished before, in {out}." if was_finished else f"Written to {out}.")
    if evaluated is None:
        console.print("Not measured: --held-out FILE compares the adapter with the base model.")
    else:
        with trained.attach(model, layers=on.layers, model_name=on.model_name):
            _report(model, tokenizer, trained, evaluated, config, out)
    print_next("fsrl", "analyse", "usage", held_out or "HELD_OUT.jsonl", "--adapter", out, "--out", f"{out}-usage")


@with_options
def layers(
    triples: Triples,
    sae: Annotated[list[str], typer.Option(help=f"SAE of a layer; may be given several times. {SAE_HELP}")],
    held_out: Annotated[Path, typer.Option(help=f"Data of the same kind to compare on, not trained on: {FILES}.")],
    out: TrainingOut,
    on: OnModel,
    config: Annotated[
        TrainingConfig,
        Options("Training", without=[*FIXED, "beta", "gamma_beta_ratio", "eval_every", "log_every", "report_to"]),
    ],
    adapter: Annotated[FSRLConfig, Options("Adapter", without=[*UNUSUAL, "l1"])],
    l1: Annotated[
        list[float] | None,
        typer.Option(help=f"Weight of the sparsity penalty, by default {FSRLConfig.l1:g}; may be given several times."),
    ] = None,
    first: First = None,
    split: Split = "train",
    chat_template_kwargs: ChatTemplateKwargs = None,
) -> None:
    """Train an adapter at each of several layers, and compare them to find the layer to steer."""
    from dspa import fsrl

    with messages_of_options({"l1": "--l1"}):
        settings = [replace(adapter, l1=value) for value in l1 or [adapter.l1]]
    require_package("trl", "Training an adapter")
    if rank() == 0:
        try_folder(out, "--out", ValueError)
    data, evaluated = checked_triples(triples, split, first, config.load), _held_out(held_out, config)
    check_model(on)
    saes = [load_sae(spec, None, device_named(on.device)) for spec in sae]
    model, tokenizer = load_model(on)
    sweep = fsrl.train_sweep(
        *(model, tokenizer, data, [loaded.to(dtype=model.dtype) for loaded in saes], settings, out),
        eval_triples=evaluated or [],
        config=config,
        layers=on.layers,
        model_name=on.model_name,
        chat_template_kwargs=chat_template_kwargs,
    )
    if rank() > 0:
        return
    d_sae = {loaded.layer: loaded.d_sae for loaded in saes}
    rows = [{"": "base model"} | _figures(sweep.base, None)]
    for trained in sweep.adapters:
        name = f"layer {trained.layer}, {trained.activation}, λ {trained.l1:g}"
        rows.append({"": name} | _figures(trained.held_out, d_sae[trained.layer]))
    console.print(column_table(f"On {sweep.base.counted}", rows, tuple(rows[0])))
    print_line(f"CSV and PNG: {out}")


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


def _held_out(path: Path | None, config: TrainingConfig) -> list[Example] | None:
    """Return what to report on, checked before a model is loaded."""
    return None if path is None else list(config.load(path))


def _report(
    model: Any,
    tokenizer: Any,
    adapter: FSRLAdapter,
    examples: Sequence[Example],
    config: TrainingConfig,
    out: Path,
) -> None:
    """Compare an attached adapter with the base model, and warn where it is worse than its figures suggest."""
    from dspa import fsrl
    from dspa.evaluate.responses import responses_of_examples
    from dspa.fsrl.answers import ANSWER_TOKENS, N_ANSWERS, compare_answers, warnings_about
    from dspa.fsrl.training import max_length_of, measure, trained_template
    from dspa.models.layers import base_model

    tokenizer, kwargs = trained_template(tokenizer, out)
    inner = base_model(model)
    figures = fsrl.read_held_out(out)
    assert figures is not None
    with adapter.disabled():
        base = measure(inner, tokenizer, examples, None, config, chat_template_kwargs=kwargs)
    responses = responses_of_examples(inner, tokenizer, examples, max_length_of(inner, config), kwargs)
    answers = compare_answers(model, tokenizer, adapter, list(chain(*responses)))
    without, with_adapter = _figures(base, None), _figures(figures, adapter.sae.d_sae)
    if answers is not None:
        without, with_adapter = without | asdict(answers[0]), with_adapter | asdict(answers[1])
    rows = [{"": name, "base model": without[name], "adapter": value} for name, value in with_adapter.items()]
    console.print(column_table(f"On {figures.counted}", rows, tuple(rows[0])))
    if answers is None:
        console.print("No answers were generated: they need two different prompts that leave room for one.")
    else:
        console.print(
            f"perplexity (under the base model), repetition (4-grams that stood in an answer before): of up to "
            f"{N_ANSWERS} greedy answers of up to {ANSWER_TOKENS} tokens."
        )
    for text in warnings_about(figures.l0, adapter.sae.d_sae, answers):
        print_warning(name_options(text, {"l1": "--l1", "lr": "--lr"}))


def _figures(figures: HeldOut | HeldOutRankings, d_sae: int | None) -> dict[str, object]:
    """Return the figures of a model for a table; `d_sae` is the size of its adapter's SAE, if it has one."""
    return {**figures.named, "L0 share": None if d_sae is None else f"{figures.l0 / d_sae:.1%}"}
