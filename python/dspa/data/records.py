"""Files of records: JSON Lines, JSON lists, CSV and Parquet.

All readers of user files leave it to this module what a file holds.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path, PurePath
from typing import Literal, TypeAlias, TypeVar

from dspa.data.lines import BOM, check_file, decode, open_text, read_lines, read_text
from dspa.errors import refusal, require_package
from dspa.schemas import parse_json

E = TypeVar("E", bound=Exception)
Layout: TypeAlias = Literal["text", "lines", "list", "csv", "parquet"]

JSON = (".jsonl", ".ndjson", ".json")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
PARQUET = ".parquet"
REFUSED = {
    **dict.fromkeys((".zip", ".tar", ".tgz", ".bz2", ".xz", ".zst", ".lz4", ".7z"), "Unpack it, or pack it by gzip."),
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "Save the sheet as CSV."),
    ".arrow": "Write it anew by `datasets.Dataset.to_parquet`, or give the folder that `save_to_disk` wrote.",
}
ENDINGS = (*JSON, *DELIMITERS, PARQUET, *REFUSED)
ACCEPTED = "JSON Lines (.jsonl, .ndjson, .json), a JSON list, CSV, TSV (all of them also as .gz) or Parquet"
# What `str` and `json.dumps` make of messages.
PRINTED_MESSAGES = re.compile(r"""\[\s*\{\s*['"](role|content)['"]\s*:""")
ROWS_PER_BATCH = 1000


def ending_of(path: str | Path) -> str:
    """Return the ending of a file's name in lower case, without .gz: ".jsonl" of "prefs.JSONL.gz"."""
    return PurePath(PurePath(path).name.lower().removesuffix(".gz")).suffix


def is_plain_text(path: str | Path, kind: type[E]) -> bool:
    """Return True for a file of plain text, and False for one of records.

    Records have one of the endings for them, or begin with "{" and are JSON Lines.

    Raises:
        E: a path that is not a file, an ending of files that cannot be read, or a first line that is not UTF-8.
    """
    return _layout(path, kind) == "text"


def read_records(path: str | Path, kind: type[E]) -> Iterator[tuple[str, object]]:
    """Yield the name ("prefs.jsonl line 3") and the content of every record of a file.

    Blank lines are skipped. Values of CSV are text, as they are written.

    Args:
        path: the file. A JSON list is held in memory as a whole, other files are not.
        kind: class of the errors.

    Raises:
        E: a path that is not a file, plain text, another file that cannot be read, or a record that is damaged. The
            records before it are yielded first.
        RuntimeError: Parquet without the package datasets.
    """
    layout = _layout(path, kind)
    if layout == "lines":
        return _read_json_lines(path, kind)
    if layout == "list":
        return _read_list(path, kind)
    if layout == "csv":
        return _read_csv(path, kind)
    if layout == "parquet":
        return _read_parquet(path, kind)
    raise refusal(kind, str(path), "plain text", ACCEPTED, "Give the file's name the ending of what it holds.")


def _layout(path: str | Path, kind: type[E]) -> Layout:
    ending = ending_of(path)
    if ending in REFUSED:
        raise refusal(kind, str(path), f"a {ending} file", ACCEPTED, REFUSED[ending])
    if ending in DELIMITERS:
        return "csv"
    if ending == PARQUET:
        return "parquet"
    _, first = next(read_lines(path, kind), ("", ""))
    if ending in JSON:
        return "list" if first.lstrip().startswith("[") else "lines"
    return "lines" if first.lstrip().startswith("{") else "text"


def _read_json_lines(path: str | Path, kind: type[E]) -> Iterator[tuple[str, object]]:
    for name, line in read_lines(path, kind):
        yield name, _parse(name, line, kind)


def _read_list(path: str | Path, kind: type[E]) -> Iterator[tuple[str, object]]:
    content = _parse(str(path), read_text(path, kind), kind)
    assert isinstance(content, list)
    for number, record in enumerate(content, start=1):
        yield f"{path} entry {number}", record


def _parse(name: str, text: str, kind: type[E]) -> object:
    return parse_json(text, kind, name, "one JSON object per line, or one JSON list", "Correct or remove it.")


def _read_csv(path: str | Path, kind: type[E]) -> Iterator[tuple[str, object]]:
    # A text may be longer than the module's limit of 128 KB.
    csv.field_size_limit(sys.maxsize)
    with open_text(path, kind) as file:
        lines = (decode(f"{path} line {number}", line, kind) for number, line in enumerate(file, start=1))
        # A line of a field may begin with a mark too.
        unmarked = chain([next(lines, "").removeprefix(BOM)], lines)
        reader = csv.reader(unmarked, delimiter=DELIMITERS[ending_of(path)], strict=True)
        rows = filter(None, reader)
        try:
            columns = next(rows, [])
            if len(set(columns)) < len(columns):
                got = f"the columns {columns}"
                raise refusal(kind, f"{path} line {reader.line_num}", got, "columns of different names")
            for number, values in enumerate(rows, start=1):
                yield f"{path} row {number}", _csv_record(f"{path} row {number}", columns, values, kind)
        except csv.Error as error:
            got, accepted = f"not CSV ({error})", "fields as Excel and pandas write them"
            raise refusal(kind, f"{path} line {reader.line_num}", got, accepted) from error


def _csv_record(name: str, columns: list[str], values: list[str], kind: type[E]) -> dict[str, str]:
    if len(values) != len(columns):
        raise refusal(kind, name, f"of {len(values)} values", f"{len(columns)}, one per column: {columns}")
    for column, value in zip(columns, values, strict=True):
        if PRINTED_MESSAGES.match(value):
            advice = "Save messages as JSON Lines or Parquet."
            raise refusal(kind, f"{name}: `{column}`", "a list of messages, printed", "text", advice)
    return dict(zip(columns, values, strict=True))


def _read_parquet(path: str | Path, kind: type[E]) -> Iterator[tuple[str, object]]:
    check_file(path, kind)
    require_package("datasets", f"Reading {path}")
    from datasets import Features
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        table = ParquetFile(path)
        # Columns that hold JSON are known to datasets alone.
        features = Features.from_arrow_schema(table.schema_arrow)
        rows = (row for batch in table.iter_batches(ROWS_PER_BATCH) for row in batch.to_pylist())
        for number, row in enumerate(rows, start=1):
            yield f"{path} row {number}", features.decode_example(row)
    except ArrowException as error:
        raise refusal(kind, str(path), f"not Parquet, or damaged ({error})", "a Parquet file") from error
