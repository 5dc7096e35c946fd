"""`dspa evaluate answers`: files of answers to a benchmark's questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table

from dspa.cli.gates import Gates
from dspa.cli.generate import BackendOptions
from dspa.cli.loading import make_folder
from dspa.cli.methods import Methods, SharedSteering
from dspa.cli.options import (
    AdapterSAE,
    ChatTemplateKwargs,
    OnRecordedModel,
    Options,
    RecordedSAEPair,
    with_options,
)
from dspa.cli.tables import console, print_line, print_next

if TYPE_CHECKING:
    from dspa.evaluate.answers.folder import MethodRecord


@dataclass(frozen=True)
class AnswerOptions:
    """Settings of generation."""

    seeds: int = field(
        default=3, metadata={"help": "Number of answers per question, with the seeds 0, 1, ...", "min": 1}
    )
    max_new_tokens: int = field(
        default=1024, metadata={"help": "Largest number of tokens to generate per turn.", "min": 1}
    )
    temperature: float | None = field(
        default=None,
        metadata={
            "help": "Temperature of all questions; 0 is greedy decoding. By default FastChat's for the category of a "
            "question, and 0.7 for AlpacaEval.",
            "min": 0,
        },
    )
    top_p: float | None = field(
        default=None,
        metadata={
            "help": "Sample from the likeliest tokens whose probabilities add up to this. By default as in the model's "
            "generation config."
        },
    )
    batch_size: int = field(default=16, metadata={"help": "Number of answers that are generated together.", "min": 1})

    def __post_init__(self) -> None:
        from dspa.evaluate.generation import sampling_arguments

        sampling_arguments(self.temperature or 0.0, self.top_p)


@with_options
def answers(
    questions: Annotated[
        Path,
        typer.Argument(help="The questions: a file as FastChat's question.jsonl of MT-Bench or AlpacaEval's eval set."),
    ],
    out: Annotated[
        Path,
        typer.Option(help="Folder to write; the same command continues a stopped one, and further methods are added."),
    ],
    on: OnRecordedModel,
    pair: RecordedSAEPair,
    adapter_sae: AdapterSAE,
    config: SharedSteering,
    ops: Annotated[BackendOptions, Options("Steering")],
    methods: Methods,
    gates: Gates,
    sampling: Annotated[AnswerOptions, Options("Sampling")],
    chat_template_kwargs: ChatTemplateKwargs = None,
) -> None:
    """Answer the questions of MT-Bench or AlpacaEval by the base model and by methods, for a judge.

    Files are those that FastChat and AlpacaEval write, one per method, so that `dspa evaluate grade` reads them, and
    their own tools do. Both turns of a question of MT-Bench are one conversation. For example:

    `dspa evaluate answers question.jsonl --map map.dspa.safetensors --controls --prefix "Be kind." --out answers`
    """
    from dspa.evaluate.answers.folder import RECORD, TURNS, AnswerFolder
    from dspa.evaluate.answers.run import answer_questions
    from dspa.evaluate.benchmarks import Benchmark
    from dspa.evaluate.compare.methods import CONTROLS

    benchmark = Benchmark.read(questions)
    # Refuses a folder of something else before anything is loaded.
    AnswerFolder(out)
    make_folder(out, [RECORD], [questions, gates.gate_prompts, *methods.read.values()])
    gates.prompts()
    gate = partial(
        gates.made, chat=True, chat_template_kwargs=chat_template_kwargs, max_new_tokens=sampling.max_new_tokens
    )
    loaded = methods.load(on, pair, adapter_sae, config, ops, gate)
    loaded.warn_of_other_template(chat_template_kwargs)
    records = answer_questions(
        *(loaded.model, loaded.tokenizer, benchmark, loaded.methods, out),
        controls=CONTROLS if methods.controls else (),
        seeds=range(sampling.seeds),
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        batch_size=sampling.batch_size,
        chat_template_kwargs=chat_template_kwargs,
        layers=on.layers,
        model_name=on.model_name,
        other_weights=on.other_weights,
    )
    _print_records(records, sampling.max_new_tokens)
    methods.print_uncontrolled()
    print_line(f"Settings, versions and digests: {out / RECORD}. Every turn with its tokens: {out / TURNS}")
    files = [out / file for record in records for file in record.files]
    judge = ("--judge", "URL", "--judge-model", "NAME")
    print_next("evaluate", "grade", *files, "--questions", questions, *judge, "--out", f"{out}-grades")


def _print_records(records: Sequence[MethodRecord], max_new_tokens: int) -> None:
    """Print the figures of all methods, and how many answers are not as they look."""
    figures = ("turns", "tokens", "cut", "unsteered", "tokens/s")
    table = Table("method", *(Column(name, justify="right") for name in figures), title="Answers")
    for record in records:
        unsteered = "" if record.unsteered is None else str(record.unsteered)
        speed = f"{record.tokens_per_second:.0f}"
        table.add_row(record.name, *map(str, (record.generated, record.tokens, record.cut, unsteered, speed)))
    console.print(table)
    print_line(
        f"turns: generated ones, which all seeds share where decoding is greedy; cut: turns that {max_new_tokens} "
        "tokens ended; unsteered: turns whose prompt selects nothing to edit, and which are the base model's."
    )
