"""`dspa fsrl`: train an adapter on SAE features, and look at what it does."""

from __future__ import annotations

import typer

from dspa.cli import fsrl_analyse, fsrl_report, fsrl_train

HELP = """FSRL: train adapters that move SAE latents, and analyse them.

An adapter (arXiv 2509.12934) is not a LoRA: it sits on the output of one decoder layer of a frozen model, and adds a
sparse vector v to the latents of an SAE of that layer. It is trained on preferences. Train one, then look at its use of
latents and at its texts, and generate with it.
"""
app = typer.Typer(help=HELP, no_args_is_help=True)
analyse = typer.Typer(help="Show what a trained adapter does, as tables, CSV and plots.", no_args_is_help=True)
app.add_typer(analyse, name="analyse")
app.command()(fsrl_train.train)
app.command()(fsrl_train.demo)
for command, function in fsrl_analyse.COMMANDS.items():
    analyse.command(command)(function)
analyse.command()(fsrl_report.report)
analyse.command("layers")(fsrl_train.layers)
