"""`dspa fsrl`: train an adapter on SAE features, and look at what it does."""

from __future__ import annotations

import typer

from dspa.cli import fsrl_analyse, fsrl_train

app = typer.Typer(help="FSRL: train adapters that move SAE latents, and analyse them.", no_args_is_help=True)
analyse = typer.Typer(help="Show what an adapter does, with data as CSV and plots as PNG.", no_args_is_help=True)
app.add_typer(analyse, name="analyse")
app.command()(fsrl_train.train)
app.command()(fsrl_train.demo)
for command, function in fsrl_analyse.COMMANDS.items():
    analyse.command(command)(function)
analyse.command("layers")(fsrl_train.layers)
