"""Preference triples cut into pieces of work, the same ones whoever reads them: a window at a time, alike in length."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

from dspa.data.triples import Triple, load_triples

# Triples that are held at once, among which those of like length find each other.
TRIPLES_PER_WINDOW = 2048
# A piece is what a stopped run loses at most.
TRIPLES_PER_PIECE = 64
CHARACTERS_PER_PIECE = 1 << 17


@dataclass(frozen=True)
class Piece:
    """Some triples, each with its number in the data, from 0."""

    number: int
    triples: list[tuple[int, Triple]]

    @cached_property
    def digest(self) -> str:
        """Of the triples and their numbers."""
        return _short([f"{index} {key_of(triple)}" for index, triple in self.triples])


@dataclass(frozen=True)
class DataRecord:
    """What is known of data that were read to their end."""

    n_triples: int
    n_pieces: int
    digest: str

    @classmethod
    def of(cls, n_triples: int, digests: Sequence[str]) -> DataRecord:
        """Of the digests of all pieces, in order."""
        return cls(n_triples, len(digests), _short(digests))


class TripleSource:
    """Triples from where they come. Read one window at a time, never all at once.

    triples: what `load_triples` takes; first: how many of them count, None for all.
    """

    def __init__(self, triples: Iterable[Triple] | str | Path, first: int | None = None) -> None:
        self._triples, self._first = triples, first

    @property
    def known(self) -> bool:
        """Whether the data can be read before they are needed, and again: a file, a list, a `datasets.Dataset`."""
        return isinstance(self._triples, (str, Path)) or hasattr(self._triples, "__len__")

    def pieces(self) -> Iterator[Piece]:
        """All pieces in order. Raises `PreferenceError` at a triple that is none."""
        numbered = enumerate(islice(load_triples(self._triples), self._first))
        number = 0
        while window := list(islice(numbered, TRIPLES_PER_WINDOW)):
            # Longest first, so that what is too long for the memory shows at once, and no rank ends late with it.
            window.sort(key=lambda each: _length(each[1]), reverse=True)
            for triples in _cut(window):
                yield Piece(number, triples)
                number += 1


class Tally:
    """Counts pieces as they are read, for their `DataRecord`."""

    def __init__(self) -> None:
        self._n_triples, self._digests = 0, list[str]()

    def add(self, piece: Piece) -> None:
        """The next piece."""
        self._n_triples += len(piece.triples)
        self._digests.append(piece.digest)

    def record(self) -> DataRecord:
        """Of the pieces so far."""
        return DataRecord.of(self._n_triples, self._digests)


def key_of(triple: Triple) -> int:
    """64 bits of what a triple says, by which it is found again."""
    content = json.dumps([triple.prompt, triple.chosen, triple.rejected]).encode()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big", signed=True)


def _short(texts: Sequence[str]) -> str:
    return hashlib.sha256(" ".join(texts).encode()).hexdigest()[:16]


def _cut(window: list[tuple[int, Triple]]) -> Iterator[list[tuple[int, Triple]]]:
    """Neighbours, as many as a piece may hold."""
    piece: list[tuple[int, Triple]] = []
    characters = 0
    for each in window:
        length = _length(each[1])
        if piece and (len(piece) == TRIPLES_PER_PIECE or characters + length > CHARACTERS_PER_PIECE):
            yield piece
            piece, characters = [], 0
        piece.append(each)
        characters += length
    if piece:
        yield piece


def _length(triple: Triple) -> int:
    """Characters, as a guess of tokens."""
    texts = (triple.prompt, triple.chosen, triple.rejected)
    return sum(len(t) if isinstance(t, str) else sum(len(m["content"]) for m in t) for t in texts)
