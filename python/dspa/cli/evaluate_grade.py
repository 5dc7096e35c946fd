"""`dspa evaluate grade`: answers of methods, graded by a judge."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dspa.cli.loading import make_folder, open_judge
from dspa.cli.options import JudgedBy, messages_of_options, with_options
from dspa.cli.tables import console, print_line
from dspa.errors import JudgeError, refusal

if TYPE_CHECKING:
    from dspa.evaluate.grading.judging import Mode

MODES: dict[str, tuple[Mode, ...]] = {
    "single": ("single",),
    "pairwise": ("pairwise",),
    "both": ("single", "pairwise"),
}


@with_options
def grade(
    answers: Annotated[
        list[Path],
        typer.Argument(
            metavar="ANSWERS",
            help="Files of answers, one per method, in the layout of the questions: FastChat's (`question_id`, "
            "`model_id`, `choices`) or AlpacaEval's (`instruction`, `output`, `generator`).",
        ),
    ],
    questions: Annotated[
        Path,
        typer.Option(help="The questions: a file as FastChat's question.jsonl of MT-Bench or AlpacaEval's eval set."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for grades.json and judgments.jsonl, made if there is none.")],
    judged: JudgedBy,
    mode: Annotated[
        str,
        typer.Option(
            help="With single, each turn of an answer is rated from 1 to 10; with pairwise, it is compared with that "
            "of the baseline, in both orders; with both, it is both.",
            metavar=f"<{'|'.join(MODES)}>",
            autocompletion=lambda: list(MODES),
        ),
    ] = "single",
    baseline: Annotated[
        str, typer.Option(help="Method from which differences are taken, and with which others are compared.")
    ] = "base",
    references: Annotated[
        Path | None,
        typer.Option(
            help="Reference answers to questions of math, reasoning and coding, in the layout of answers. By default "
            "those in the file of questions."
        ),
    ] = None,
    templates: Annotated[
        Path | None,
        typer.Option(help="Folder of single.jinja or pairwise.jinja, prompts of the judge in place of ours."),
    ] = None,
) -> None:
    """Grade the answers of methods by a judge: rate them one by one, or compare them with those of a baseline.

    Answers are those of `dspa evaluate answers`, or any in the two layouts. Every reply of the judge is kept, so that a
    stopped command continues, and can be repeated with --replay. What the judge wrote about each answer is in
    judgments.jsonl.

    For example: `dspa evaluate grade answers/base.jsonl answers/dspa-ablate-0.2.jsonl --questions question.jsonl
    --judge http://localhost:8000/v1 --judge-model NAME --out grades`
    """
    from dspa.evaluate.benchmarks import Benchmark, read_methods
    from dspa.evaluate.grading.grading import FILES, LEGEND, Grading
    from dspa.evaluate.grading.judging import judge_tasks, tasks
    from dspa.evaluate.grading.prompts import Prompts

    if mode not in MODES:
        raise refusal(ValueError, "--mode", repr(mode), ", ".join(MODES))
    if judged.judge is None and not judged.replay:
        raise refusal(ValueError, "--judge", "missing", "the address of an endpoint", "Or pass --replay.")
    judge = open_judge(judged, out)
    assert judge is not None
    benchmark = Benchmark.read(questions)
    if references is not None:
        benchmark = benchmark.with_references(references)
    methods = read_methods(answers, benchmark)
    prompts = Prompts(templates)
    with messages_of_options({"baseline": "--baseline", "mode": "--mode"}):
        asked = tasks(benchmark, methods, MODES[mode], baseline, prompts)
    make_folder(out, FILES, [questions, references, *answers])
    n_calls = judge.n_calls([task.asked for task in asked])
    print_line(
        f"{len(asked)} questions to the judge, by {n_calls} calls. The others have a reply in the cache, or are the "
        "same as another one."
    )
    judgments = judge_tasks(judge, asked, progress=True)
    settings = {"judge": judge.model, "parameters": judge.parameters, "prompts": prompts.digests}
    grading = Grading(benchmark, methods, baseline, judgments, settings)
    grading.write(out)
    for table in grading.tables():
        console.print(table.rich())
    print_line(LEGEND)
    for note in grading.notes:
        print_line(note)
    print_line(f"Grades: {out / FILES[0]}; what the judge wrote: {out / FILES[1]}")
    if not any(one.n_answered for grades in grading.grades.values() for one in grades.values()):
        raise JudgeError(
            f"None of the judge's {len(judgments)} replies could be read, so that there are no grades. They are in "
            f"{judge.folder} and are not asked for again: look at what it wrote, and to ask another judge under the "
            "same name, remove that folder or pass another --judge-cache."
        )
