"""Execute the tutorials, docs/tutorials/*.py, and write them with their outputs as notebooks: `make tutorials`.

A tutorial is a Python script with cells: `# %%` begins one of code and `# %% [markdown]` one of text, in comments. It
can be read in a diff, run as it is, and opened as a notebook by editors that know this format.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "tutorials"
# Bold and colours of a terminal.
ESCAPES = re.compile(r"\x1b\[[\d;]*m")
MARKER = re.compile(r"^# %%( \[markdown\])?\n", re.MULTILINE)


def cells(source: str) -> list[tuple[str, str]]:
    """Return the cells of a tutorial as ("markdown" or "code", text)."""
    _, *parts = MARKER.split(source)
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [("markdown", _text(part)) if markdown else ("code", part.strip()) for markdown, part in pairs]


def _text(comments: str) -> str:
    return "\n".join(re.sub(r"^# ?", "", line) for line in comments.strip().splitlines())


def notebook(source: str) -> dict[str, Any]:
    """Return a tutorial as a notebook without outputs."""
    code = {"execution_count": None, "outputs": []}
    return {
        "nbformat": 4,
        "nbformat_minor": 5,
        "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
        "cells": [
            {"cell_type": kind, "id": f"cell-{n}", "metadata": {}, "source": text, **(code if kind == "code" else {})}
            for n, (kind, text) in enumerate(cells(source))
        ],
    }


def execute(path: Path) -> dict[str, Any]:
    """Return a tutorial with its outputs as text and pictures, without what goes to stderr, such as progress bars."""
    import nbformat
    from nbclient import NotebookClient

    executed = nbformat.from_dict(notebook(path.read_text(encoding="utf-8")))
    NotebookClient(executed, timeout=None, resources={"metadata": {"path": FOLDER}}).execute()
    for cell in executed["cells"]:
        cell["metadata"] = {}
        if cell["cell_type"] == "code":
            cell["outputs"] = [output for output in cell["outputs"] if output.get("name") != "stderr"]
            for data in (output["data"] for output in cell["outputs"] if "data" in output):
                data.pop("text/html", None)
                data["text/plain"] = ESCAPES.sub("", data["text/plain"])
    del executed["metadata"]["language_info"]
    return dict(executed)


def main(names: list[str]) -> None:
    """Execute the tutorials of these names, or all."""
    for path in sorted(FOLDER.glob("*.py")):
        if not names or path.stem in names:
            print(f"executing {path.name}", flush=True)
            text = json.dumps(execute(path), indent=1, ensure_ascii=False)
            path.with_suffix(".ipynb").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
