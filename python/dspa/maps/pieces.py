"""Preference triples cut into pieces of work, of similar lengths within each window of the data.

The pieces depend on the data alone, so that every process cuts the same ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

from dspa.data.messages import content_of
from dspa.data.triples import Triple, key_of, load_triples
from dspa.errors import refusal
from dspa.schemas import PositiveInt, Text, check, schema

# Triples that are held at once and sorted by length.
TRIPLES_PER_WINDOW = 2048
# A stopped run loses one piece at most.
TRIPLES_PER_PIECE = 64
CHARACTERS_PER_PIECE = 1 << 17


@dataclass(frozen=True)
class Piece:
    """Some triples, each with its number in the data, from 0.

    Attributes:
        number: number of the piece, from 0.
        triples: numbers and triples.
    """

    number: int
    triples: list[tuple[int, Triple]]

    @cached_property
    def digest(self) -> str:
        """Digest of the triples and their numbers."""
        return _digest([f"{index} {key_of(triple)}" for index, triple in self.triples])


@schema
class DataRecord:
    """Size and digest of data that were read to their end."""

    n_triples: PositiveInt
    n_pieces: PositiveInt
    digest: Text

    def __post_init__(self) -> None:
        if self.n_pieces > self.n_triples:
            raise refusal(ValueError, "`n_pieces`", self.n_pieces, f"1 to the number of triples, {self.n_triples}")

    @classmethod
    def of(cls, n_triples: int, digests: Sequence[str]) -> DataRecord:
        """Make the record of data from the digests of all pieces, in order."""
        return cls(n_triples, len(digests), _digest(digests))


class TripleSource:
    """A source of triples, read one window at a time and never all at once.

    Args:
        triples: what `load_triples` takes.
        first: use only the first N triples. Default: all.
    """

    def __init__(self, triples: Iterable[Triple] | str | Path, first: int | None = None) -> None:
        if first is not None:
            check(PositiveInt, first, ValueError, "`first`")
        self._triples, self._first = triples, first

    @property
    def rereadable(self) -> bool:
        """True where the data can be read more than once: a file, a list, a `datasets.Dataset`."""
        return isinstance(self._triples, (str, Path)) or hasattr(self._triples, "__len__")

    def pieces(self) -> Iterator[Piece]:
        """Yield all pieces in order.

        Raises:
            PreferenceError: an invalid triple, when the iteration comes to it.
        """
        triples_in_order = enumerate(islice(load_triples(self._triples), self._first))
        number = 0
        while window := list(islice(triples_in_order, TRIPLES_PER_WINDOW)):
            # Longest first, so that a triple too long for the memory shows at once and keeps no rank late at the end.
            window.sort(key=lambda numbered: _n_characters(numbered[1]), reverse=True)
            for triples in _cut_window(window):
                yield Piece(number, triples)
                number += 1


class Tally:
    """Counts pieces as they are read, for their `DataRecord`."""

    def __init__(self) -> None:
        self._n_triples, self._digests = 0, list[str]()

    def add(self, piece: Piece) -> None:
        """Count the next piece."""
        self._n_triples += len(piece.triples)
        self._digests.append(piece.digest)

    def record(self) -> DataRecord:
        """Return the record of the pieces so far."""
        return DataRecord.of(self._n_triples, self._digests)


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256(" ".join(texts).encode()).hexdigest()[:16]


def _cut_window(window: list[tuple[int, Triple]]) -> Iterator[list[tuple[int, Triple]]]:
    """Yield runs of neighbours, as many as a piece may hold."""
    piece: list[tuple[int, Triple]] = []
    characters = 0
    for index, triple in window:
        length = _n_characters(triple)
        if piece and (len(piece) == TRIPLES_PER_PIECE or characters + length > CHARACTERS_PER_PIECE):
            yield piece
            piece, characters = [], 0
        piece.append((index, triple))
        characters += length
    if piece:
        yield piece


def _n_characters(triple: Triple) -> int:
    """Return the characters of a triple, an estimate of its tokens."""
    texts = (triple.prompt, triple.chosen, triple.rejected)
    return sum(len(t) if isinstance(t, str) else sum(len(content_of(m)) for m in t) for t in texts)
