"""The command line: it parses arguments and calls the package, and every heavy import waits for its command."""

from __future__ import annotations

import json
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dspa.cli import fsrl, sae
from dspa.cli import map as maps
from dspa.cli.generate import generate
from dspa.cli.loading import check_writable
from dspa.cli.stopping import StoppableCommands
from dspa.cli.tables import console, print_table

app = typer.Typer(
    cls=StoppableCommands,
    help="Steer language models with sparse autoencoders (SAEs): DSPA, preference alignment at inference time.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.add_typer(maps.app, name="map")
app.add_typer(sae.app, name="sae")
app.add_typer(fsrl.app, name="fsrl")
app.command()(generate)

PACKAGES = ("dspa-kernels", "torch", "triton", "transformers", "sae-lens", "safetensors", "numpy")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version("dspa-kernels"))
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", help="Show the version and stop.", is_eager=True, callback=_show_version)
    ] = False,
    debug: Annotated[bool, typer.Option(help="Show where in the code an error comes from.")] = False,
) -> None:
    # Nothing to do before a command: `main` looks for --debug when one fails.
    del debug, show_version


@app.command()
def demo(
    retrain: Annotated[bool, typer.Option(help="Train the demo's model and SAEs again first.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="File to write all results to.")] = Path(
        "dspa-demo.json"
    ),
) -> None:
    """Steer a small language model, trained for this, and compare DSPA with the base model and a static set.

    Runs on two CPU cores in under two minutes, without a network.
    """
    from dspa.demo import steer
    from dspa.demo.load import ASSETS

    check_writable("--json", json_path)
    if retrain:
        from dspa.demo.train import train

        # A training that is stopped leaves the demo as it was.
        with TemporaryDirectory() as folder:
            train(Path(folder))
            shutil.copytree(folder, ASSETS, dirs_exist_ok=True)
    steer.run(json_path)


@app.command()
def info() -> None:
    """Show versions, devices and backends: which can run here, why others cannot, and which GPUs they have run on."""
    import torch

    from dspa_kernels import available_backends

    versions = {"python": platform.python_version(), "machine": platform.machine()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    print_table("dspa-kernels", versions | {"CUDA devices": ", ".join(gpus) or "none"})
    table = Table(
        "backend",
        "runs here",
        "has run on GPUs",
        "ops or reason",
        title="Backends; auto takes cuda where it was measured to be faster than triton",
    )
    gpu_runs: dict[str, list[str]] = json.loads(files("dspa_kernels").joinpath("gpu_runs.json").read_text())
    for name, status in available_backends().items():
        places = "; ".join(gpu_runs[name]) or "not yet" if name in gpu_runs else ""
        table.add_row(name, "yes" if status.available else "no", places, status.reason or ", ".join(status.ops))
    console.print(table)


def main() -> None:
    """Run the command line: an error is one message and exit code 2."""
    from safetensors import SafetensorError

    try:
        app(prog_name="dspa")
    except (ValueError, RuntimeError, OSError, ImportError, SafetensorError) as error:
        if "--debug" in sys.argv:
            raise
        Console(stderr=True).print(f"[red]Error:[/red] {escape(str(error))}")
        raise SystemExit(2) from error
