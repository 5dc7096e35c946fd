"""Zip archives, in which NumPy and torch keep tensors: their sizes come before their contents."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar
from zipfile import ZipFile, is_zipfile

from dspa.data.lines import MOST_EXPANSION, SMALL
from dspa.errors import refusal

E = TypeVar("E", bound=Exception)


def check_archive(path: Path, error: type[E], advice: str = "Download or save it again.") -> None:
    """Raise `error` for a zip archive, as NumPy and torch write them, that is damaged or unpacks to far too much.

    Both store arrays as they are. A file of another kind, as torch wrote them before, does not unpack.
    """
    if not is_zipfile(path):
        return
    size = path.stat().st_size
    try:
        with ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    # Damaged lists of entries lead to errors of several classes.
    except Exception as failed:
        got = f"not readable ({type(failed).__name__})"
        raise refusal(error, str(path), got, "an undamaged file", advice) from failed
    if unpacked > MOST_EXPANSION * max(size, SMALL):
        got = f"{size} bytes that unpack to {unpacked}"
        raise refusal(error, str(path), got, f"at most {MOST_EXPANSION} times as many", advice)
