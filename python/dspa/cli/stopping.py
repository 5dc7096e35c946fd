"""The end of a command that is stopped: it says whether the same command continues, or what is lost."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from dspa.cli.tables import errors
from dspa.distributed import rank

COUNTS = "The counts so far are kept"
CHECKPOINT = "The last checkpoint is kept, if there is one yet"
REPLIES = "Replies of a judge are kept, if there is one"
RUNS = "Finished runs are kept"
# What commands leave for the same command to continue from.
KEPT = {
    "audit": REPLIES,
    "map collect": COUNTS,
    "map build": COUNTS,
    "sae train": CHECKPOINT,
    "sae finetune": CHECKPOINT,
    "fsrl train": CHECKPOINT,
    "baseline dpo": CHECKPOINT,
    "baseline rahf tune": CHECKPOINT,
    "baseline rahf align": CHECKPOINT,
    "compare": RUNS,
    "personal effects": "The effects of finished latents are kept",
    "vector effects": "The effects of finished directions are kept",
    "evaluate answers": "Finished batches are kept",
    "evaluate grade": "Replies of the judge are kept",
    "evaluate lm-eval": "Finished methods are kept",
    "demo smollm2": RUNS,
    "fsrl analyse report": REPLIES,
    "fsrl analyse layers": "Finished adapters and the last checkpoint are kept",
}


class Terminated(KeyboardInterrupt):
    """A request to stop by SIGTERM, as from a scheduler, which ends a command as Ctrl-C does."""


class StoppableCommands(TyperGroup):
    """Commands that end with a message and the exit code of the signal when they are stopped."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that the arguments name."""
        # Of several processes, one may wait in a collective operation, where only the default action ends it.
        before = signal.signal(signal.SIGTERM, _terminate) if _is_alone() else None
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            if rank() == 0:
                text = farewell(sys.argv[1:], alone=_is_alone())
                errors.print(f"\n{text}", highlight=False, soft_wrap=True)
            number = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
            raise typer.Exit(128 + number) from stop
        finally:
            if before is not None:
                signal.signal(signal.SIGTERM, before)


def farewell(arguments: list[str], *, alone: bool) -> str:
    """Return what to say when a command is stopped.

    Args:
        arguments: the command and its arguments, as typed.
        alone: True without other processes. Those were started by a launcher, whose command is not known.
    """
    words = [argument for argument in arguments if not argument.startswith("-")]
    if words[:1] == ["demo"] and "smollm2" in words:
        words = ["demo", "smollm2"]  # The model may come after options.
    command = " ".join(words)
    kept = next((kept for name, kept in KEPT.items() if f"{command} ".startswith(f"{name} ")), None)
    if words[:1] == ["generate"] and any(argument.startswith("--out") for argument in arguments):
        return "Stopped. The answers so far are kept. The same command would begin from the start, and replace them."
    if kept is None:
        return "Stopped. The same command would begin from the start."
    if words[:2] == ["map", "build"] and not any(argument.startswith("--work-dir") for argument in arguments):
        return "Stopped. No counts are kept: the same command would begin from the start. --work-dir FOLDER keeps them."
    line = f":\n  {shlex.join(['dspa', *arguments])}" if alone else "."
    return f"Stopped. {kept}, and the same command continues from there{line}"


def _terminate(*_: object) -> NoReturn:
    raise Terminated


def _is_alone() -> bool:
    return os.environ.get("WORLD_SIZE", "1") == "1"
