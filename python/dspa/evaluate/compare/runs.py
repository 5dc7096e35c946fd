"""Runs of one method: its answers for a seed, and its scores of triples, kept so that a comparison can go on."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from pydantic import StrictFloat

from dspa.errors import refusal
from dspa.outputs import held, output_file, try_output
from dspa.schemas import Count, Flag, NonNegative, Text, check, parse_json, read_json, schema

FORMAT = "dspa.compare.2"
PARTIAL = ".partial"
RESULTS = "The file of results"


@schema
class Answers:
    """Answers of a method to N prompts, by one seed.

    Attributes:
        ids: token ids of each answer, up to and including an end token.
        nll: minus the log-probability of each answer's tokens under the base model after the plain prompt, their sum.
        edited: numbers of each answer's tokens that were predicted from an edited residual; None where edits are not
            recorded, as for adapters.
        unsteered: True for each prompt that selected nothing to edit; None where none is selected.
        seconds: time of generation alone.
        touched: number of each answer's tokens that a gate let through, or that were junctions; None without either.
    """

    ids: list[list[Count]]
    nll: list[StrictFloat]
    edited: list[list[Count]] | None
    unsteered: list[Flag] | None
    seconds: NonNegative
    touched: list[Count] | None = None


@schema
class TripleScores:
    """Mean log-probability per token that a method gives to both responses of N triples.

    Attributes:
        chosen, rejected: of each triple.
        unsteered: as in `Answers`, of the triples' prompts.
    """

    chosen: list[StrictFloat]
    rejected: list[StrictFloat]
    unsteered: list[Flag] | None


Runs: TypeAlias = dict[Text, dict[Text, Any]]
R = TypeVar("R")


@dataclass
class RunStore:
    """Finished runs by a key of all their inputs, each written to a file as it is added.

    Attributes:
        path: the file of results, with links resolved. Runs of an earlier comparison in it are used again; those of a
            stopped one are next to it, in a file that ends in ".partial". None keeps runs in memory.
        format: name of the format of the file of results.
        runs: finished runs, as JSON.
    """

    path: Path | None
    format: str = FORMAT
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path | None, format: str = FORMAT) -> RunStore:
        """Read the runs that are kept for `path`, a file of `format`.

        Raises:
            ValueError: a file of something else, a path where no file can be written, or one that another process
                writes.
        """
        if path is None:
            return cls(None, format)
        try_output(path, RESULTS)
        store = cls(output_file(path, RESULTS), format)
        # No runs are kept next to a pipe.
        if store.path is None:
            return store
        with store.held():
            if store.path.is_file():
                store.runs |= _finished(path, format)
            if store._partial.exists():
                store.runs |= _stopped(store._partial, store._header)
        return store

    def held(self) -> AbstractContextManager[None]:
        """Return a context in which no other process compares for the same file.

        Raises:
            ValueError: another process does, when it is entered.
        """
        return nullcontext() if self.path is None else held(self.path, RESULTS, ValueError, file=True)

    @property
    def _partial(self) -> Path:
        assert self.path is not None
        return self.path.with_name(self.path.name + PARTIAL)

    @property
    def _header(self) -> str:
        """First line of the file of a stopped comparison."""
        return json.dumps({"format": self.format})

    def get(self, key: str, kind: type[R]) -> R | None:
        """Return a finished run, or None."""
        advice = "Delete the file, or name another."
        return check(kind, self.runs[key], ValueError, f"{self.path}: a run", advice) if key in self.runs else None

    def add(self, key: str, run: Any) -> None:
        """Keep a finished run, an instance of a schema."""
        self.runs[key] = asdict(run)
        if self.path is not None:
            with self._partial.open("a", encoding="utf-8") as file:
                if not file.tell():
                    file.write(self._header)
                # A cut line before it, if there is one, stays alone.
                file.write("\n" + json.dumps({key: self.runs[key]}))

    def finish(self) -> None:
        """Remove the file of a stopped comparison: all runs are in the file of results."""
        if self.path is not None:
            self._partial.unlink(missing_ok=True)


def _finished(path: Path, format: str) -> dict[str, dict[str, Any]]:
    try:
        record = read_json(path, ValueError)
        if record["format"] == format:
            return check(Runs, record["runs"], ValueError, str(path))
    except (ValueError, KeyError, TypeError):
        pass
    accepted = "a new file, or one that the same command wrote, whose runs are used again"
    raise refusal(ValueError, RESULTS, f"{path}, which holds something else", accepted, "Name another.")


def _stopped(path: Path, header: str) -> dict[str, dict[str, Any]]:
    """Return the runs of a stopped comparison. The end of what was killed may be cut."""
    runs, text = dict[str, dict[str, Any]](), path.read_bytes().decode(errors="replace")
    first, *lines = text.splitlines() or [""]
    if first != header and not (header.startswith(first) and not lines):
        got = f"next to {path}, which holds something else, or a comparison of an earlier version"
        raise refusal(ValueError, RESULTS, got, "a file without it", "Name another, or move that away.")
    for line in lines:
        with suppress(ValueError):
            runs |= check(Runs, parse_json(line, ValueError, "a run"), ValueError, "a run")
    return runs
