"""Files of text to train on: plain text, JSON Lines, or preference triples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from dspa.data.triples import Triple, load_triples
from dspa.errors import TextError, refusal

ACCEPTED = (
    "plain text, one document per line; JSON Lines with `text`; or preference triples, JSON Lines with `chosen`, "
    "`rejected` and usually `prompt`"
)
ADVICE = "Correct or remove the line."


class TextFile:
    """Documents of a UTF-8 file: plain text, JSON Lines with `text`, or preference triples.

    The first line that is not blank shows which; blank lines are skipped. An entry is a line, with one document, or a
    triple, with two: prompt + chosen and prompt + rejected. All entries are read once and checked, and none is kept.

    Attributes:
        path: the file.
        kind: "text", "json" or "triples".
        n_entries: number of entries.
        digest: of the bytes of the file.

    Raises:
        TextError: a path that is not a file, a file without text, or an invalid line of text.
        PreferenceError: an invalid triple.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise refusal(TextError, str(path), "not a file", f"a file of {ACCEPTED}")
        self.kind = _kind_of(self.path)
        self.n_entries = sum(1 for _ in self.entries())
        self.digest = _digest(self.path)

    def entries(self) -> Iterator[str | Triple]:
        """Yield the entries, from the first on."""
        if self.kind == "triples":
            return load_triples(self.path)
        return (_parse_text(name, line) if self.kind == "json" else line for name, line in _lines(self.path))


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the name and the text of every line that is not blank."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            name = f"{path} line {number}"
            try:
                text = line.decode("utf-8").strip()
            except UnicodeDecodeError as error:
                raise refusal(TextError, name, f"not UTF-8 ({error})", ACCEPTED, "Convert the file.") from error
            if text:
                yield name, text


def _kind_of(path: Path) -> str:
    name, line = next(_lines(path), ("", ""))
    if not name:
        raise refusal(TextError, str(path), "a file without text", ACCEPTED)
    if path.suffix != ".jsonl" and not line.startswith("{"):
        return "text"
    entry = _parse_object(name, line)
    if "chosen" in entry:
        return "triples"
    _parse_text(name, line)
    return "json"


def _parse_object(name: str, line: str) -> dict[str, object]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise refusal(TextError, name, f"not JSON ({error})", ACCEPTED, ADVICE) from error
    if not isinstance(entry, dict):
        raise refusal(TextError, name, f"a JSON {type(entry).__name__}", ACCEPTED, ADVICE)
    return entry


def _parse_text(name: str, line: str) -> str:
    entry = _parse_object(name, line)
    text = entry.get("text")
    if not isinstance(text, str) or not text.strip():
        got = f"an object with `text` {text!r}" if "text" in entry else f"an object with only the keys {sorted(entry)}"
        raise refusal(TextError, name, got, ACCEPTED, ADVICE)
    return text


def _digest(path: Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()[:16]
