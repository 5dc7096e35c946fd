"""The command line: it parses arguments and calls the package, and every heavy import waits for its command."""

from __future__ import annotations

import os
import platform
import shlex
import sys
import traceback
import warnings
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from io import TextIOWrapper
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from dspa.cli import baseline, evaluate, fsrl, personal, sae, vector
from dspa.cli import map as maps
from dspa.cli.audit import audit
from dspa.cli.compare import compare
from dspa.cli.contents import contents
from dspa.cli.demo import demo
from dspa.cli.generate import generate
from dspa.cli.serve import PASSED_ON, serve
from dspa.cli.stopping import StoppableCommands
from dspa.cli.tables import console, print_error, print_line, print_table
from dspa.errors import install_command
from dspa.schemas import parse_json

HELP = """Steer language models with sparse autoencoders (SAEs). No weight of the model changes.

**DSPA**: preference data become a map, once (`dspa map`). With it, each prompt selects SAE latents, which are edited
while the model generates (`dspa generate`). `dspa compare` shows what that changes, next to other methods and controls,
and `dspa audit` which latents it edits and what they stand for.

**FSRL**: a small adapter learns to move SAE latents (`dspa fsrl`).

To begin, `dspa demo` and `dspa fsrl demo` show the two on a small model that comes with the package, and
`dspa demo smollm2` shows DSPA on a chat model.
"""
# As a new user needs them.
ORDER = (
    "demo",
    "map",
    "generate",
    "serve",
    "compare",
    "evaluate",
    "audit",
    "personal",
    "baseline",
    "vector",
    "fsrl",
    "sae",
    "info",
)


class Commands(StoppableCommands):
    """The commands in their order."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the commands."""
        return sorted(super().list_commands(ctx), key=ORDER.index)


app = typer.Typer(
    cls=Commands,
    help=HELP,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.add_typer(maps.app, name="map")
app.add_typer(baseline.app, name="baseline")
app.add_typer(evaluate.app, name="evaluate")
app.add_typer(personal.app, name="personal")
app.add_typer(sae.app, name="sae")
app.add_typer(vector.app, name="vector")
app.add_typer(fsrl.app, name="fsrl")
app.command()(demo)
app.command()(generate)
app.command()(compare)
app.command()(audit)
app.command(context_settings=PASSED_ON)(serve)

EMULATED = "DSPA_TESTS_EMULATED_CUDA"
PACKAGES = ("dspa-kernels", "torch", "triton", "transformers", "safetensors", "numpy")
# Optional packages, and what they are for.
EXTRAS = {
    "sae-lens": "SAEs of its catalogue, and training SAEs",
    "trl": "training FSRL adapters",
    "datasets": "data sets of the Hub, and Parquet files",
    "vllm": "serving, where there is a GPU",
    "openai": "asking a judge, a model behind a chat endpoint",
    "lm-eval": "tasks of lm-evaluation-harness",
}
BACKENDS = {
    "reference": "plain PyTorch, on any device",
    "triton": "Triton kernels, for GPUs",
    "cuda": "CUDA C++ kernels of the decoding step",
}


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version("dspa-kernels"))
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", help="Show the version and stop.", is_eager=True, callback=_show_version)
    ] = False,
    debug: Annotated[bool, typer.Option(help="Show the traceback of an error, and where a warning is from.")] = False,
) -> None:
    # Nothing to do before a command: `main` looks for --debug when one fails.
    del debug, show_version


@app.command()
def info(
    path: Annotated[
        Path | None,
        typer.Argument(
            help="A file or folder of this package, such as a map: show what it holds, and not what is installed."
        ),
    ] = None,
) -> None:
    """Show what is installed, which GPUs there are, and which backends run here or why not."""
    if path is not None:
        print_table(str(path), contents(path))
        return
    import torch

    from dspa_kernels import available_backends

    versions = {"python": platform.python_version(), "machine": platform.machine()}
    versions |= {name: _version(name) or "not installed" for name in (*PACKAGES, *EXTRAS)}
    gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    none = "none" if torch.version.cuda else "none, and this build of torch is for CPUs"
    print_table("dspa-kernels", versions | {"CUDA devices": ", ".join(gpus) or none})
    for name, use in EXTRAS.items():
        if not _version(name):
            print_line(f"For {use}: {install_command(name)}")
    backends = available_backends()
    table = Table(
        "backend",
        "what it is",
        # A path may be longer than any width.
        Column("runs here", overflow="fold"),
        "has run on GPUs",
        title="Backends",
        caption="On a CUDA device, auto takes triton, or cuda where it was measured to be faster; elsewhere reference.",
    )
    gpu_runs: dict[str, list[str]] = parse_json(
        files("dspa_kernels").joinpath("gpu_runs.json").read_text(), ValueError, "gpu_runs.json"
    )
    for name, status in backends.items():
        places = "; ".join(gpu_runs[name]) or "not yet" if name in gpu_runs else ""
        table.add_row(name, BACKENDS[name], "yes" if status.available else f"no: {status.reason}", places)
    console.print(table)
    for name, status in backends.items():
        if status.available:
            print_line(f"Ops of {name}: {', '.join(status.ops)}")


def _version(package: str) -> str:
    """Return the version of an installed package, or nothing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def main() -> None:
    """Run the command line: an error is one message and exit code 2, a bug is one and 1, a warning is its text alone.

    With `--debug`, errors and bugs show their traceback.
    """
    debug = "--debug" in takewhile(lambda word: word.startswith("-"), sys.argv[1:])
    _open_closed_streams()
    # Text that the terminal cannot show, such as half of a surrogate pair, is escaped.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # A library that the tests of kernels load in place of the package's own.
    emulated = os.environ.pop(EMULATED, None)
    formatted = warnings.formatwarning
    if not debug:
        warnings.formatwarning = _format_warning
    try:
        app(prog_name="dspa")
    except Exception as error:
        if debug:
            raise
        text = _expected(error)
        print_error(_bug(error) if text is None else text)
        raise SystemExit(1 if text is None else 2) from error
    finally:
        warnings.formatwarning = formatted
        if emulated is not None:
            os.environ[EMULATED] = emulated


def _open_closed_streams() -> None:
    """Connect standard streams that are closed, as by `<&-`, to nothing, so that no file is opened in their place."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115


def _expected(error: Exception) -> str | None:
    """Return the message of an error that input or the machine can cause, and None for any other."""
    from safetensors import SafetensorError

    if isinstance(error, RecursionError):
        return f"A file or an option is nested too deeply to be read ({error})."
    if isinstance(error, MemoryError):
        return "There is not enough memory. Use smaller batches or inputs, or a machine with more."
    if isinstance(error, (ValueError, RuntimeError, OSError, ImportError, OverflowError, SafetensorError)):
        return str(error) or type(error).__name__
    return None


def _bug(error: Exception) -> str:
    """Return the message of an error that no input should cause."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"This is a bug in dspa: {type(error).__name__} in {place.filename}, line {place.lineno}: {error}\n"
        "Please report it on the project's issue tracker, with what this shows: "
        f"{shlex.join(('dspa', '--debug', *sys.argv[1:]))}"
    )


def _format_warning(message: Warning | str, *_: Any, **__: Any) -> str:
    return f"Warning: {message}\n"
