"""Generated texts on the terminal and in files."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from dspa.cli.tables import console

if TYPE_CHECKING:
    from dspa.evaluate.generation import Answer

MARKED = "bold: tokens that were predicted from an edited residual"


def as_record(answer: Answer) -> str:
    """Return an answer as one line of JSON."""
    record: dict[str, Any] = {"prompt": answer.prompt, "response": answer.text}
    if answer.base is not None:
        record |= {"base": answer.base, "edited": answer.edited}
    return json.dumps(record)


def print_comparison(answer: Answer) -> None:
    """Print the base model's text and the steered one, side by side on a terminal and one after the other elsewhere.

    Tokens that were predicted from an edited residual are bold, outside of a terminal within `**`.
    """
    if not console.is_terminal:
        print(f"base: {answer.base}\nsteered: {_starred(answer)}", flush=True)
        return
    steered = Text(answer.text)
    for start, end in answer.edited:
        steered.stylize("bold", start, end)
    table = Table("base", "steered", title=answer.prompt, caption=MARKED if answer.edited else None)
    table.add_row(Text(answer.base or ""), steered)
    console.print(table)


def _starred(answer: Answer) -> str:
    """Return the steered text with its edited tokens within `**`, spaces around them outside."""
    pieces, done = list[str](), 0
    for start, end in answer.edited:
        marked = re.sub(r"\S(?:.*\S)?", r"**\g<0>**", answer.text[start:end], count=1, flags=re.DOTALL)
        pieces += [answer.text[done:start], marked]
        done = end
    return "".join((*pieces, answer.text[done:]))
