"""`dspa evaluate lm-eval`: tasks of lm-evaluation-harness under methods."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from dspa.cli.generate import BackendOptions
from dspa.cli.loading import check_writable
from dspa.cli.methods import PANEL, MethodOptions, SharedSteering
from dspa.cli.options import (
    AdapterSAE,
    ChatTemplateKwargs,
    OnRecordedModel,
    Options,
    RecordedSAEPair,
    messages_of_options,
    with_options,
)
from dspa.cli.tables import console, print_line
from dspa.errors import require_package


@dataclass(frozen=True)
class TaskMethodOptions(MethodOptions):
    """The methods that take part besides the base model."""

    controls: bool = field(
        default=False,
        metadata={
            "help": "Also run controls of each method: of maps a shuffled map and a wrong layer, of vectors a random "
            "vector, and of tuned models a random change."
        },
    )


@with_options
def lm_eval(
    tasks: Annotated[
        list[str], typer.Option(help="Name of a task, a group or a tag of the harness. May be given several times.")
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="JSON file of all results; the same command continues a stopped one, and further methods are added."
        ),
    ],
    on: OnRecordedModel,
    pair: RecordedSAEPair,
    adapter_sae: AdapterSAE,
    config: SharedSteering,
    ops: Annotated[BackendOptions, Options("Steering")],
    methods: Annotated[TaskMethodOptions, PANEL],
    include_path: Annotated[Path | None, typer.Option(help="Folder with further tasks, as YAML files.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Number of examples in each context; by default as the task has it.", min=0)
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Use the first N documents of each task.", min=1)] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of all draws; by default the harness' own seeds, 0 and 1234.", min=0)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Number of sequences per pass.", min=1)] = 8,
    chat: Annotated[bool, typer.Option(help="Put contexts into the model's chat template.")] = False,
    chat_template_kwargs: ChatTemplateKwargs = None,
) -> None:
    """Run tasks of lm-evaluation-harness with the base model and with methods.

    The context of a task is the prompt, and what is scored or written after it the response: DSPA chooses its latents
    from the context, and edits from its last token on. Data sets of the Hub are downloaded. For example:

    `dspa evaluate lm-eval --tasks arc_easy --tasks hellaswag --map map.dspa.safetensors --controls --out tasks.json`
    """
    require_package("lm-eval", "dspa evaluate lm-eval")
    # On import the harness reads how much it has to say. What it warns of is counted here, or of no use.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from dspa.evaluate.compare.runs import RunStore
    from dspa.evaluate.lm_eval.run import CONTROLS, FORMAT, Tasks, evaluate_tasks

    check_writable("--out", out, methods.read)
    # Refuses a file of something else before anything is loaded.
    RunStore.open(out, FORMAT)
    with messages_of_options({"tasks": "--tasks", "include_path": "--include-path"}):
        given = Tasks.load(tasks, include_path)
    loaded = methods.load(on, pair, adapter_sae, config, ops)
    if chat:
        loaded.warn_of_other_template(chat_template_kwargs)
    outcome = evaluate_tasks(
        *(loaded.model, loaded.tokenizer, given, loaded.methods),
        num_fewshot=num_fewshot,
        limit=limit,
        controls=CONTROLS if methods.controls else (),
        seed=seed,
        batch_size=batch_size,
        chat=chat,
        chat_template_kwargs=chat_template_kwargs,
        results=out,
        layers=on.layers,
        model_name=on.model_name,
        other_weights=on.other_weights,
    )
    console.print(outcome.table().rich())
    for note in outcome.notes():
        print_line(note)
    methods.print_uncontrolled()
    print_line(f"All results, with the values of every document: {out}")
