"""Files of text to train on: plain text, records with `text`, or preference triples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dspa.data.lines import read_lines
from dspa.data.records import ACCEPTED as RECORDS
from dspa.data.records import is_plain_text, read_records
from dspa.data.tokens import tokenize_triple
from dspa.data.triples import Triple, load_triples
from dspa.errors import TextError, refusal

ACCEPTED = (
    f"plain text, one document per line; or {RECORDS}, with `text`, or with `chosen`, `rejected` and usually `prompt`"
)
RECORD = "an object with `text`, or a file of triples: `chosen`, `rejected` and usually `prompt`"
ADVICE = "Correct or remove it."


class TextFile:
    """Documents of a file: plain text in UTF-8, records with `text`, or preference triples.

    The name and the first line that is not blank show which; blank lines are skipped. An entry is a line or a record,
    with one document, or a triple, with two: prompt + chosen and prompt + rejected. All entries are read once and
    checked, and none is kept.

    Attributes:
        path: the file.
        kind: "text", "records" or "triples".
        n_entries: number of entries.
        digest: of the bytes of the file.

    Raises:
        TextError: a path that is not a file, a file without text, or an invalid line of text.
        PreferenceError: an invalid triple.
        RuntimeError: Parquet without the package datasets.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.kind = _kind_of(self.path)
        self.n_entries = sum(1 for _ in self.entries())
        if not self.n_entries:
            raise refusal(TextError, str(path), "a file without text", ACCEPTED)
        self.digest = _digest(self.path)

    def entries(self) -> Iterator[str | Triple]:
        """Yield the entries, from the first on."""
        if self.kind == "triples":
            return load_triples(self.path)
        if self.kind == "records":
            return (_text_of(name, record) for name, record in read_records(self.path, TextError))
        return (line.strip() for _, line in read_lines(self.path, TextError))


def tokenize_entry(entry: str | Triple, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[list[int]]:
    """Return the token ids of each document of an entry as the model reads them, cut to `max_length` at its end.

    Raises:
        PreferenceError: a triple that cannot be tokenized.
    """
    if isinstance(entry, Triple):
        ids = tokenize_triple(entry, tokenizer)
        documents = [ids.prompt + ids.chosen, ids.prompt + ids.rejected]
    else:
        documents = [list(tokenizer(entry)["input_ids"])]
    return [document[:max_length] for document in documents]


def _kind_of(path: Path) -> str:
    if is_plain_text(path, TextError):
        return "text"
    _, first = next(read_records(path, TextError), ("", None))
    return "triples" if isinstance(first, Mapping) and first.get("chosen") is not None else "records"


def _text_of(name: str, record: object) -> str:
    if not isinstance(record, Mapping):
        raise refusal(TextError, name, f"a JSON {type(record).__name__}", RECORD, ADVICE)
    text = record.get("text")
    if not isinstance(text, str) or not text.strip():
        got = (
            f"an object with `text` {text!r}" if "text" in record else f"an object with only the keys {sorted(record)}"
        )
        raise refusal(TextError, name, got, RECORD, ADVICE)
    return text


def _digest(path: Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()[:16]
