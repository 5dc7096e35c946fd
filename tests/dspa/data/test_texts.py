"""`dspa.data.texts`: kinds of files, and every refusal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dspa.data.texts import TextFile
from dspa.errors import PreferenceError, TextError


def test_kinds_of_text(tmp_path: Path) -> None:
    sentences = ["the cat is", "a dog of my own", "and we see it"]
    for name, rows, kind in (
        ("a.txt", [sentences[0], "", *sentences[1:]], "text"),
        ("a.jsonl", [{"text": text, "other": 1} for text in sentences], "records"),
        ("b.txt", [{"text": text} for text in sentences], "records"),
    ):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
        file = TextFile(tmp_path / name)
        assert (file.kind, file.n_entries, list(file.entries())) == (kind, 3, sentences)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"txt": "a"}\n', r"a\.jsonl line 2 is an object with only the keys \['txt'\]"),
        ("a.jsonl", b'\n{"text": "a"}\n\n{"text": 3}\n', r"a\.jsonl line 4 is an object with `text` 3"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', r"a\.jsonl line 2 is a JSON list"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl line 2 is not JSON"),
        ("a.jsonl", b"plain\n", r"a\.jsonl line 1 is not JSON"),
        ("a.txt", b"good\n\xff\xfe\n", r"a\.txt line 2 is not UTF-8"),
        ("a.txt", b"\n \n", r"a\.txt is a file without text"),
        (
            "a.jsonl",
            b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"chosen": "b"}\n',
            r"line 2 is without 'rejected'",
        ),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises((TextError, PreferenceError), match=message):
        TextFile(tmp_path / name)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="is not a file"):
        TextFile(tmp_path / "none.txt")
