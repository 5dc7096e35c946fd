"""Tables and lines on the terminal."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

# Without markup: text of users and models, such as [red] or :smile:, is printed as it is.
console = Console(markup=False, emoji=False)
errors = Console(stderr=True, markup=False, emoji=False)


def print_table(title: str, rows: dict[str, Any]) -> None:
    """Print names and values, one per line."""
    _print_rows(title, [(name, str(value)) for name, value in rows.items()])


def print_figures(title: str, figures: Sequence[tuple[str, str, str]]) -> None:
    """Print figures, one per line: the name, the value, and what it means or asks for."""
    _print_rows(title, figures)


def _print_rows(title: str, rows: Sequence[tuple[str, ...]]) -> None:
    """Print rows of text without a header. A long path is broken into lines, and not cut off."""
    table = Table(*(Column(overflow="fold") for _ in rows[0]), title=title, show_header=False)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def print_line(text: str) -> None:
    """Print a line as it is and unbroken, so that a path or a command in it can be copied."""
    console.print(text, highlight=False, soft_wrap=True)


def print_next(*command: object) -> None:
    """Print the command of dspa that comes next, as a shell takes it."""
    print_line(f"Next: {shlex.join(map(str, ('dspa', *command)))}")


def print_warning(text: str) -> None:
    """Print a warning."""
    console.print(Text("Warning:", style="yellow"), text)


def print_error(text: str) -> None:
    """Print an error, unbroken, to standard error."""
    errors.print(Text("Error:", style="red"), text, highlight=False, soft_wrap=True)


def column_table(title: str, rows: Sequence[Mapping[str, object]], names: Sequence[str]) -> Table:
    """Return a table of some columns of rows."""
    table = Table(*(name.replace("_", " ") for name in names), title=title)
    for row in rows:
        table.add_row(*(cell(row[name]) for name in names))
    return table


def cell(value: object) -> str:
    """Format one value for a table."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
