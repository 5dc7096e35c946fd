"""Text to train on: files of texts, or the texts of triples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from dspa.data.triples import Triple, load_triples
from dspa.errors import TextError

ACCEPTED = (
    "plain text, one document a line; JSON Lines with `text`; or preference triples, JSON Lines with `chosen`, "
    "`rejected` and usually `prompt`"
)


class TextFile:
    """Documents of a UTF-8 file: plain text, JSON Lines with `text`, or preference triples.

    The first line that is not blank tells which; blank lines are skipped. An entry is a line, with one document, or
    a triple, with two: prompt + chosen and prompt + rejected. All entries are read once and checked; none is kept.

    Attributes: `path`; `kind`, "text", "json" or "triples"; `n_entries`; `digest`, of the bytes of the file.

    Raises:
        TextError, PreferenceError: no such file, a bad line, a file without text.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise TextError(f"{path} is not a file; accepted: a file of {ACCEPTED}.")
        self.kind = _kind(self.path)
        self.n_entries = sum(1 for _ in self.entries())
        self.digest = _digest(self.path)

    def entries(self) -> Iterator[str | Triple]:
        """Each entry, from the first on."""
        if self.kind == "triples":
            return load_triples(self.path)
        return (_text(name, line) if self.kind == "json" else line for name, line in _lines(self.path))


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Name and text of every line that is not blank."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            name = f"{path} line {number}"
            try:
                text = line.decode("utf-8").strip()
            except UnicodeDecodeError as error:
                raise TextError(f"{name} is not UTF-8 ({error}); accepted: {ACCEPTED}. Convert the file.") from error
            if text:
                yield name, text


def _kind(path: Path) -> str:
    name, line = next(_lines(path), ("", ""))
    if not name:
        raise TextError(f"{path} holds no text; accepted: {ACCEPTED}.")
    if path.suffix != ".jsonl" and not line.startswith("{"):
        return "text"
    entry = _object(name, line)
    if "chosen" in entry:
        return "triples"
    _text(name, line)
    return "json"


def _object(name: str, line: str) -> dict[str, object]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise TextError(f"{name} is not JSON ({error}); accepted: {ACCEPTED}. Correct or remove the line.") from error
    if not isinstance(entry, dict):
        raise TextError(f"{name} is a JSON {type(entry).__name__}; accepted: {ACCEPTED}. Correct or remove the line.")
    return entry


def _text(name: str, line: str) -> str:
    entry = _object(name, line)
    text = entry.get("text")
    if not isinstance(text, str) or not text.strip():
        held = f"has `text` {text!r}" if "text" in entry else f"has only the keys {sorted(entry)}"
        raise TextError(f"{name} {held}; accepted: {ACCEPTED}. Correct or remove the line.")
    return text


def _digest(path: Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()[:16]
