"""`dspa evaluate`: answers to benchmarks, and what they are worth."""

from __future__ import annotations

import typer

from dspa.cli import evaluate_answers, evaluate_grade, evaluate_lm_eval

HELP = "Evaluate methods on benchmarks: answer their questions, grade the answers, or run lm-evaluation-harness."
app = typer.Typer(help=HELP, no_args_is_help=True)
app.command()(evaluate_answers.answers)
app.command()(evaluate_grade.grade)
app.command("lm-eval")(evaluate_lm_eval.lm_eval)
