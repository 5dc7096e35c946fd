"""Files of results: JSON Lines, one object per line, each on the disk before the next is measured.

A line with the key "run" describes machine, commit and date, and holds for all lines after it. The others are results
of cases and outcomes of stages.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

Line = dict[str, Any]
Run = dict[str, Any]


def append(path: Path, line: Line) -> None:
    """Append a line in one write, so that several processes may append, and flush it to the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, (json.dumps(line) + "\n").encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def existing(text: str) -> Path:
    """Return the path of a file of results that is named on a command line."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is not a file")
    return Path(text)


def read(path: Path) -> list[Line]:
    """Return all lines but those that were cut off."""
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def runs(path: Path) -> list[Run]:
    """Return the runs of a file: what the line "run" says, and their other lines as "lines".

    Lines without such a line before them, whose machine is unknown, are left out.
    """
    runs: list[Run] = []
    for line in read(path):
        if "run" in line:
            runs.append(line["run"] | {"lines": []})
        elif runs:
            runs[-1]["lines"].append(line)
    return runs
