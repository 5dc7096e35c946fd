"""`dspa evaluate`: answers to benchmarks, and what they are worth."""

from __future__ import annotations

import typer

from dspa.cli import evaluate_answers, evaluate_grade

app = typer.Typer(
    help="Evaluate methods on benchmarks: answer their questions, and grade answers.", no_args_is_help=True
)
app.command()(evaluate_answers.answers)
app.command()(evaluate_grade.grade)
