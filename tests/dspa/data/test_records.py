"""`dspa.data.records`: every kind of file gives the same records, and every refusal."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
from datasets import Dataset, Features, Json, Value

from dspa.data.records import ENDINGS, ending_of, is_plain_text, read_records
from dspa.data.texts import TextFile
from dspa.data.triples import Triple, load_triples
from dspa.errors import TextError

from ..support.triples import assistant, user

Rows = list[dict[str, Any]]
# Texts that readers of tables take for something else.
ROWS: Rows = [
    {"prompt": "the cat\u2028is", "chosen": 'a "dog", of', "rejected": "NA"},
    {"prompt": "007", "chosen": "two\nlines\r\nand\rmore", "rejected": "null"},
    {"prompt": "1e5", "chosen": " x" * 200_000, "rejected": "\ufeff"},
]
TURNS: Rows = [{"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]}] * 2


def json_lines(rows: Rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def json_list(rows: Rows) -> bytes:
    return json.dumps(rows, indent=1).encode()


def table(delimiter: str) -> Callable[[Path, Rows], object]:
    return lambda path, rows: pandas.DataFrame(rows).to_csv(path, index=False, sep=delimiter)


def parquet(path: Path, rows: Rows) -> object:
    return Dataset.from_list(rows).to_parquet(path)


WRITERS: dict[str, Callable[[Path, Rows], object]] = {
    "a.jsonl": lambda path, rows: path.write_bytes(json_lines(rows)),
    "a.JSONL": lambda path, rows: path.write_bytes(b"\xef\xbb\xbf" + json_lines(rows)),
    "a.ndjson": lambda path, rows: path.write_bytes(json_lines(rows).replace(b"}\n", b"}\r\n")),
    "a.jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress(json_lines(rows))),
    "lines.json": lambda path, rows: path.write_bytes(json_lines(rows)),
    "a.txt": lambda path, rows: path.write_bytes(b"\n" + json_lines(rows)),
    "none": lambda path, rows: path.write_bytes(json_lines(rows)),
    "list.json": lambda path, rows: path.write_bytes(json_list(rows)),
    "list.jsonl": lambda path, rows: path.write_bytes(json_list(rows)),
    "list.json.gz": lambda path, rows: path.write_bytes(gzip.compress(json_list(rows))),
    "a.csv": table(","),
    "a.csv.gz": table(","),
    "a.tsv": table("\t"),
    "a.parquet": parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_holds_the_same_records(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name, ROWS)
    assert not is_plain_text(tmp_path / name, TextError)
    records = list(read_records(tmp_path / name, TextError))
    assert [record for _, record in records] == ROWS
    assert list(load_triples(tmp_path / name)) == [Triple(**row) for row in ROWS]
    assert TextFile(tmp_path / name).kind == "triples" and TextFile(tmp_path / name).n_entries == 3
    assert [record_name.rpartition("/")[2].split()[0] for record_name, _ in records] == [name] * 3


@pytest.mark.parametrize("name", [name for name in WRITERS if not name.startswith(("a.csv", "a.tsv"))])
def test_messages(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name, TURNS)
    assert list(load_triples(tmp_path / name)) == [Triple(**row) for row in TURNS]


def test_texts_of_tables(tmp_path: Path) -> None:
    rows = [{"text": "the cat", "n": 1}, {"text": "12", "n": 2}]
    for name in ("a.csv", "a.parquet", "list.json"):
        WRITERS[name](tmp_path / name, rows)
        file = TextFile(tmp_path / name)
        assert (file.kind, list(file.entries())) == ("records", ["the cat", "12"])


def test_columns_of_json_in_parquet(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "tools": Json()})
    tools = [{"name": "f", "parameters": {"x": 1}}]
    Dataset.from_dict({"text": ["a"], "tools": [tools]}, features=features).to_parquet(tmp_path / "a.parquet")
    assert [row for _, row in read_records(tmp_path / "a.parquet", TextError)] == [{"text": "a", "tools": tools}]


def test_endings() -> None:
    assert [ending_of(name) for name in ("a.jsonl.gz", "x/b.CSV", "c.parquet", "d.gz", "e", ".json", "f.v2.txt")] == [
        ".jsonl",
        ".csv",
        ".parquet",
        "",
        "",
        "",
        ".txt",
    ]
    assert ".txt" not in ENDINGS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"the cat\n", r"a\.txt is plain text; accepted: JSON Lines"),
        ("rows", b'[{"a": 1}]', r"rows is plain text; .* Give the file's name the ending of what it holds"),
        ("a.zip", b"PK", r"a\.zip is a \.zip file; accepted: JSON Lines .* Unpack it"),
        ("a.jsonl.zst", b"x", r"is a \.zst file; .* Unpack it"),
        ("a.XLSX", b"PK", r"is a \.xlsx file; .* Save the sheet as CSV"),
        ("a.arrow", b"ARROW1", r"is a \.arrow file; .* the folder that `save_to_disk` wrote"),
        ("a.parquet", b"hello", r"a\.parquet is not Parquet, or damaged"),
        ("a.jsonl", b'{"a": 1}\n{"a": 1}, \n', r"a\.jsonl line 2 is not JSON \(.*\): '{\"a\": 1}, '; accepted"),
        ("a.jsonl", b'{"a": 1}\n' + b"[" * 100_000, r"a\.jsonl line 2 is not JSON"),
        (
            "a.json",
            b'{\n"a": 1}\n',
            r"a\.json line 1 is not JSON .* accepted: one JSON object per line, or one JSON list",
        ),
        ("a.json", b'[{"a": 1},\n', r"a\.json is not JSON"),
        ("a.json", b'[{"a": 1},\n"\xff"]', r"a\.json line 2 is not UTF-8"),
        ("a.csv", b'a,b\n1,2\n"x', r"a\.csv line 3 is not CSV"),
        ("a.csv", b"a,b\n1,2\n\n1,2,3\n", r"a\.csv row 2 is of 3 values; accepted: 2, one per column: \['a', 'b'\]"),
        ("a.csv", b"a,b,a\n1,2,3\n", r"a\.csv line 1 is the columns \['a', 'b', 'a'\]"),
        ("a.csv", b"a,b\n1,\xff\n", r"a\.csv line 2 is not UTF-8"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError, match=message):
        list(read_records(tmp_path / name, TextError))


@pytest.mark.parametrize("quote", [json.dumps, str], ids=["json", "python"])
def test_messages_that_were_printed_into_csv(tmp_path: Path, quote: Callable[[object], str]) -> None:
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([list(TURNS[0]), [quote(value) for value in TURNS[0].values()]])
    with pytest.raises(
        TextError, match=r"a\.csv row 1: `prompt` is a list of messages, printed.* JSON Lines or Parquet"
    ):
        list(read_records(tmp_path / "a.csv", TextError))


def test_tables_of_odd_programs(tmp_path: Path) -> None:
    """A byte order mark counts as one at the beginning of the file alone, and blank lines may precede the columns."""
    (tmp_path / "a.csv").write_bytes('\ufeff\n\n"a",b\n1,"two\n\ufefflines"\n'.encode())
    assert list(read_records(tmp_path / "a.csv", TextError)) == [
        (f"{tmp_path / 'a.csv'} row 1", {"a": "1", "b": "two\n\ufefflines"})
    ]


def test_a_missing_file(tmp_path: Path) -> None:
    for name in ("a", *("a" + ending for ending in (".jsonl", ".csv", ".parquet"))):
        with pytest.raises(TextError, match="is not a file"):
            list(read_records(tmp_path / name, TextError))
