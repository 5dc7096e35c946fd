"""`dspa evaluate`: answers to benchmarks, and what they are worth."""

from __future__ import annotations

import typer

from dspa.cli import evaluate_grade

app = typer.Typer(help="Evaluate methods on benchmarks: grade their answers.", no_args_is_help=True)
app.command()(evaluate_grade.grade)
