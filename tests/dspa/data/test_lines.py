"""`dspa.data.lines`: ends of lines, marks, gzip, and every refusal."""

from __future__ import annotations

import functools
import gzip
from pathlib import Path

import pytest

from dspa.data.lines import read_lines, read_text
from dspa.errors import TextError

# What `str.splitlines` takes for ends of lines and a text editor does not.
OTHER_ENDS = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"

# Without the time, which would give a test another name in each process.
pack = functools.partial(gzip.compress, mtime=0)


def lines_of(path: Path, content: bytes) -> list[tuple[str, str]]:
    path.write_bytes(content)
    return [(name.removeprefix(f"{path} "), line) for name, line in read_lines(path, TextError)]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("last", [True, False], ids=["ended", "not ended"])
def test_lines_are_those_of_an_editor(tmp_path: Path, end: str, last: bool) -> None:
    """Python's own universal newlines are the other implementation."""
    lines = ["the cat", "", f"a dog{OTHER_ENDS}of my own ", "\t", "\u2028", "  wörter"]
    content = (end.join(lines) + end * last).encode()
    kept = lines_of(tmp_path / "a.txt", content)
    assert kept == [("line 1", lines[0]), ("line 3", lines[2]), ("line 6", lines[5])]
    with (tmp_path / "a.txt").open(encoding="utf-8") as file:
        assert [line.removesuffix("\n") for line in file] == lines
    assert read_text(tmp_path / "a.txt", TextError).split("\n")[: len(lines)] == lines


def test_mixed_ends(tmp_path: Path) -> None:
    assert lines_of(tmp_path / "a", b"a\rb\r\n\r\r\nc\n\nd") == [
        ("line 1", "a"),
        ("line 2", "b"),
        ("line 5", "c"),
        ("line 7", "d"),
    ]


def test_marks_are_no_text(tmp_path: Path) -> None:
    """The second is that of another file which was appended."""
    assert lines_of(tmp_path / "a", "\ufeffone\n\ufefftwo \ufeff\n".encode()) == [
        ("line 1", "one"),
        ("line 2", "two \ufeff"),
    ]
    assert read_text(tmp_path / "a", TextError).startswith("one")


def test_gzip_is_known_by_its_content(tmp_path: Path) -> None:
    content = pack("\ufeffone\n".encode()) + pack(b"two")
    for name in ("a.txt.gz", "a.txt"):
        assert lines_of(tmp_path / name, content) == [("line 1", "one"), ("line 2", "two")]


def test_lines_are_read_one_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one\n\xe9t\xe9\n")
    lines = read_lines(tmp_path / "a", TextError)
    assert next(lines)[1] == "one"
    with pytest.raises(TextError, match=r"a line 2 is not UTF-8 .*0xe9.* accepted: .*iconv -f LATIN1 -t UTF-8"):
        next(lines)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a text".encode("utf-16"), "is text in UTF-16 or UTF-32; .*iconv -f UTF-16 -t UTF-8"),
        ("a text".encode("utf-32"), "is text in UTF-16 or UTF-32"),
        (pack("a text".encode("utf-16")), "is text in UTF-16 or UTF-32"),
        ("a\nb".encode("utf-16-le"), "line 1 is not text: it has a NUL byte"),
        (b"a\nb\0\n", "line 2 is not text: it has a NUL byte"),
        (pack(b"a text that is long enough")[:-6], "is a damaged gzip file"),
        (pack(pack(b"a text")), "is gzipped twice; accepted: packed once. Unpack it by gunzip"),
        (b"\x1f\x8bno gzip at all", "is a damaged gzip file"),
    ],
)
def test_other_bytes(tmp_path: Path, content: bytes, message: str) -> None:
    for read in (lambda path: list(read_lines(path, TextError)), lambda path: read_text(path, TextError)):
        (tmp_path / "a.txt").write_bytes(content)
        with pytest.raises(TextError, match=rf"a\.txt {message}"):
            read(tmp_path / "a.txt")


def test_a_path_that_is_not_a_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(TextError, match="is not a file"):
            next(read_lines(path, TextError))
