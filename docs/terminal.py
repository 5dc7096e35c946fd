"""Run a command and write its output as a picture of a terminal: `python docs/terminal.py PICTURE.svg COMMAND ...`.

Progress bars, which go to stderr, are left out.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

WIDTH = 110


def draw(command: list[str], output: str) -> str:
    """Return a command and what it printed, with its colours, as SVG.

    Args:
        command: the command and its arguments.
        output: what it printed, with ANSI escapes.
    """
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    console.print(Text(f"$ {shlex.join(command)}", style="bold"))
    console.print(Text.from_ansi(output.rstrip()))
    # A page that shows a picture fetches nothing else: a reader's own font takes the place of the named one.
    return re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title="dspa"), flags=re.DOTALL)


def main(picture: Path, command: list[str]) -> None:
    """Run a command and write the picture of its output, if it succeeds."""
    environment = {**os.environ, "COLUMNS": str(WIDTH), "FORCE_COLOR": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, text=True, check=True)
    picture.write_text(draw(command, done.stdout), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
