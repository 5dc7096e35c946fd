"""Text files of the user: UTF-8 with or without a byte order mark, gzipped or not."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from dspa.errors import refusal

E = TypeVar("E", bound=Exception)

GZIP = b"\x1f\x8b"
# A file may unpack to this many times its size, which text does not: gzip can make 1,000 zeros of one byte. Files below
# SMALL bytes may be as repetitive as they like.
MOST_EXPANSION, SMALL = 200, 1 << 16
BOM = "\ufeff"
# The mark of UTF-16 in little-endian order is also the beginning of that of UTF-32.
WIDE_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)
ACCEPTED = "text in UTF-8"


def read_lines(path: str | Path, kind: type[E]) -> Iterator[tuple[str, str]]:
    """Yield the name ("prompts.txt line 3") and the text of every line of a file that is not blank.

    Args:
        path: the file.
        kind: class of the errors.

    Raises:
        E: a path that is not a file, a damaged gzip file, or a line that is not text in UTF-8. The lines before it are
            yielded first.
    """
    with open_text(path, kind) as file:
        yield from split_lines(str(path), file, kind)


def split_lines(label: str, blocks: Iterable[bytes], kind: type[E]) -> Iterator[tuple[str, str]]:
    """Yield the name and the text of every line that is not blank, as `read_lines` does.

    Args:
        label: name of the file.
        blocks: bytes of the file, cut after every line feed.
        kind: class of the errors.

    Raises:
        E: a line that is not text in UTF-8.
    """
    return ((name, line) for name, line in _all_lines(label, blocks, kind) if line.strip())


def read_text(path: str | Path, kind: type[E]) -> str:
    """Return the text of a whole file, with line feeds for all ends of lines; raise `kind` as `read_lines` does."""
    with open_text(path, kind) as file:
        return "\n".join(line for _, line in _all_lines(str(path), file, kind))


@contextmanager
def open_text(path: str | Path, kind: type[E]) -> Iterator[io.BufferedReader]:
    """Open a file of text for reading its bytes, unpacked where it is gzipped.

    Raises:
        E: a path that is not a file, a damaged gzip file, one within another, or UTF-16.
    """
    check_file(path, kind)
    with open(path, "rb") as file:
        stream = _unpacked(file, path, kind) if file.peek(2).startswith(GZIP) else file
        try:
            if stream is not file and stream.peek(2).startswith(GZIP):
                raise refusal(kind, str(path), "gzipped twice", "packed once", "Unpack it by gunzip.")
            if stream.peek(4).startswith(WIDE_MARKS):
                raise refusal(kind, str(path), "text in UTF-16 or UTF-32", ACCEPTED, _conversion("UTF-16"))
            yield stream
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            got, advice = f"a damaged gzip file ({error})", "Copy or download it again."
            raise refusal(kind, str(path), got, "a whole one", advice) from error


def check_file(path: str | Path, kind: type[E]) -> None:
    """Raise `kind` for a path that is not a file, or is a stream: files are read more than once."""
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        advice = "Write it to a file first, such as by cat."
        raise refusal(kind, str(path), "a stream, which can be read only once", "a regular file", advice)
    if not path.is_file():
        raise refusal(kind, str(path), "not a file", "a file that exists")


class _Unpacked(io.RawIOBase):
    """The content of a gzip file, which is refused where it is far larger than the file."""

    def __init__(self, file: gzip.GzipFile, most: int, error: Exception) -> None:
        self.file, self.left, self.error = file, most, error

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        n_read = self.file.readinto(buffer)
        self.left -= n_read
        if self.left < 0:
            raise self.error
        return n_read


def _unpacked(file: io.BufferedReader, path: str | Path, kind: type[E]) -> io.BufferedReader:
    size = Path(path).stat().st_size
    got = f"a gzip file of {size} bytes that unpacks to more than {MOST_EXPANSION} times as many"
    error = refusal(kind, str(path), got, "a gzip file of text", "If it is what it should be, unpack it by gunzip.")
    most = MOST_EXPANSION * max(size, SMALL)
    return io.BufferedReader(_Unpacked(gzip.GzipFile(fileobj=file), most, error))


def decode(name: str, line: bytes, kind: type[E]) -> str:
    """Return the text of a line; raise `kind`, with the name of the line, for bytes that are not text in UTF-8."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise refusal(kind, name, f"not UTF-8 ({error})", ACCEPTED, _conversion("LATIN1")) from error
    if "\0" in text:
        raise refusal(kind, name, "not text: it has a NUL byte", ACCEPTED, "Check what kind of file this is.")
    return text


def check_encodable(kind: type[E], what: str, text: str) -> None:
    """Raise `kind` for text that no tokenizer takes: JSON and the command line can hold half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        got = f"text with a lone surrogate {text[error.start]!r} at character {error.start}"
        raise refusal(kind, what, got, "text that UTF-8 can encode", "Write the whole character.") from error


def _all_lines(label: str, blocks: Iterable[bytes], kind: type[E]) -> Iterator[tuple[str, str]]:
    r"""Yield every line. It ends with \n, \r\n or \r; U+2028 and others that Unicode counts as ends are text."""
    number = 0
    # Bytes, because text is decoded in blocks: a bad line would take the good ones before it along.
    for block in blocks:
        for line in block.removesuffix(b"\n").removesuffix(b"\r").split(b"\r"):
            number += 1
            name = f"{label} line {number}"
            # Files that were joined bring one mark each.
            yield name, decode(name, line, kind).removeprefix(BOM)


def _conversion(encoding: str) -> str:
    return f"Convert a text to UTF-8 first, such as by iconv -f {encoding} -t UTF-8."
