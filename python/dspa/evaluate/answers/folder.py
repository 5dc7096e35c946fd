"""The folder of answers: a record of how they were made, every turn with its tokens, and the files for judges."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, field, replace
from itertools import count
from pathlib import Path
from typing import Any

from pydantic import StrictInt, StrictStr

from dspa.errors import listed, refusal
from dspa.evaluate.compare.methods import Method
from dspa.files import digest_of
from dspa.outputs import held, is_own, write_atomically
from dspa.schemas import Count, Flag, NonNegative, Text, check, parse_json, read_json, schema

FORMAT = "dspa.answers.1"
RECORD, TURNS = "record.json", "turns"
FOLDER = "The folder of answers"
# Characters of a method's name that its files are called by.
NAMED = 60


@schema
class Turn:
    """The answer to one turn of a question.

    Attributes:
        question: id of the question.
        seed: the seed.
        turn: number of the turn, from 0.
        ids: token ids, up to and including an end token.
        cut: True where the largest number of tokens ended it.
        unsteered: True where its prompt selected nothing to edit, so that it is the base model's; None where nothing is
            selected, as by the base model.
        ended: time at which its batch was finished, in seconds since 1970.
    """

    question: StrictInt | StrictStr
    seed: Count
    turn: Count
    ids: list[Count]
    cut: Flag
    unsteered: Flag | None
    ended: NonNegative


@schema
class TurnBatch:
    """Answers that were generated together.

    Attributes:
        turns: the answers.
        seconds: time of generation.
    """

    turns: list[Turn]
    seconds: NonNegative


@schema
class MethodRecord:
    """How a method answered.

    Attributes:
        id: what files call it.
        name: name of the method.
        kind: as of `Method`.
        control_of: name of the method that it is a control of, or nothing.
        settings: all that its answers depend on, with digests of maps, SAEs and adapters.
        digest: identifies them.
        versions: of the packages, for every version that answered.
        n_turns: number of turns to answer, of all questions and seeds.
        generated: number of them that were generated so far. By greedy decoding, all seeds share an answer.
        unsteered: number of generated ones whose prompt selected nothing to edit; None where nothing is selected.
        cut: number of generated ones that were ended by the largest number of tokens.
        tokens: tokens that were generated.
        seconds: time of generation.
        tokens_per_second: tokens by seconds, 0 before the first.
        files: names of its files of answers, none before all questions are answered.
    """

    id: Text
    name: Text
    kind: Text
    control_of: Text
    settings: dict[Text, Any]
    digest: Text
    versions: list[dict[Text, Text]]
    n_turns: Count = 0
    generated: Count = 0
    unsteered: Count | None = None
    cut: Count = 0
    tokens: Count = 0
    seconds: NonNegative = 0.0
    tokens_per_second: NonNegative = 0.0
    files: list[Text] = field(default_factory=list)


class AnswerFolder:
    """A folder that answers are written to as they come, and that the same command continues.

    Attributes:
        path: the folder.
        model: name of the model that answered last, or where it was.
        settings: what all answers in it share, as JSON; None in a new folder.
        methods: records of its methods by their names.
    """

    def __init__(self, path: Path) -> None:
        """Read what the folder holds, if it is there.

        Raises:
            ValueError: something else than answers.
        """
        self.path = path
        self.model = ""
        self.settings: dict[str, Any] | None = None
        self.methods: dict[str, MethodRecord] = {}
        advice = "Name another folder."
        if (file := path / RECORD).exists():
            record = check(dict[Text, Any], read_json(file, ValueError, advice), ValueError, str(file), advice)
            if record.get("format") != FORMAT:
                accepted = f"one of the format {FORMAT}, as dspa evaluate answers writes it"
                raise refusal(ValueError, str(file), "a record of something else", accepted, advice)
            self.settings = check(dict[Text, Any], record.get("settings"), ValueError, f"{file}: `settings`", advice)
            methods = check(list[MethodRecord], record.get("methods"), ValueError, f"{file}: `methods`", advice)
            self.methods = {method.name: method for method in methods}
        elif path.is_dir() and (others := sorted(file.name for file in path.iterdir() if not is_own(file))):
            got = f"{path}, with other files ({listed(others, 3)})"
            raise refusal(ValueError, FOLDER, got, "a new or empty folder, or one of answers", advice)

    def held(self) -> AbstractContextManager[None]:
        """Return a context in which no other process answers in the folder.

        Raises:
            ValueError: another process does, when it is entered.
        """
        return held(self.path, FOLDER, ValueError)

    def begin(self, model: str, settings: Mapping[str, Any], methods: Sequence[Method], n_turns: int) -> None:
        """Take in methods, each with the settings that it had before, if it was here.

        Args:
            model: name of the model.
            settings: what all answers share, as JSON can hold it.
            methods: the methods.
            n_turns: number of turns that each answers.

        Raises:
            ValueError: other settings than those of the answers that are here.
        """
        if self.settings is not None:
            self._check_same("", self.settings, _as_read(settings))
        self.model, self.settings = model, _as_read(settings)
        for method in methods:
            if known := self.methods.get(method.name):
                self._check_same(f" of {method.name!r}", known.settings, _as_read(method.settings))
            else:
                kept = (method.name, method.kind, method.control_of, method.settings, method.digest)
                self.methods[method.name] = MethodRecord(self._new_id(method.name), *kept, [], n_turns)
        self.save()

    def _check_same(self, of: str, known: Mapping[str, Any], given: Mapping[str, Any]) -> None:
        if difference := _difference(known, given):
            name, before, now = difference
            got = (
                f"{self.path}, whose answers{of} were made with `{name}` {_shown(before)}, and now it is {_shown(now)}"
            )
            accepted = "a new folder, or one with answers by the same settings"
            raise refusal(ValueError, FOLDER, got, accepted, "Name another folder.")

    def _new_id(self, name: str) -> str:
        """Return what the files of a new method are called."""
        taken = {method.id for method in self.methods.values()}
        start = re.sub(r"[^a-z0-9.]+", "-", name.lower())[:NAMED].strip("-.")
        return next(text for n in count(1) if (text := start if n == 1 else f"{start}-{n}") not in taken)

    def save(self) -> None:
        """Write the record."""
        methods = [asdict(method) for method in self.methods.values()]
        content = {"format": FORMAT, "model": self.model, "settings": self.settings, "methods": methods}
        write_atomically(self.path / RECORD, json.dumps(content, indent=1).encode())

    def read_batches(self, name: str) -> list[TurnBatch]:
        """Return the batches that a method has answered. The end of what was killed may be cut, and is left out.

        Raises:
            ValueError: batches of other settings.
        """
        if not (file := self._turns(name)).exists():
            return []
        header, *lines = file.read_bytes().decode(errors="replace").splitlines() or [""]
        if not lines and self._header(name).startswith(header):
            # Killed as it began.
            file.unlink()
            return []
        if header != self._header(name):
            got = f"{file}, which holds turns of other settings than {self.path / RECORD} says"
            raise refusal(ValueError, FOLDER, got, "a folder whose files belong together", "Name another folder.")
        batches = list[TurnBatch]()
        for line in lines:
            with suppress(ValueError):
                batches.append(check(TurnBatch, parse_json(line, ValueError, "a batch"), ValueError, "a batch"))
        return batches

    def add(self, name: str, batch: TurnBatch) -> None:
        """Keep a batch of a method."""
        self._turns(name).parent.mkdir(exist_ok=True)
        with self._turns(name).open("a", encoding="utf-8") as file:
            if not file.tell():
                file.write(self._header(name))
            # A cut line before it, if there is one, stays alone.
            file.write("\n" + json.dumps(asdict(batch)))

    def note_versions(self, name: str, versions: dict[str, str]) -> None:
        """Note with which versions of the packages a method answers from now on."""
        record = self.methods[name]
        if versions not in record.versions:
            self.methods[name] = replace(record, versions=[*record.versions, versions])
            self.save()

    def finish(self, name: str, files: Mapping[str, bytes]) -> None:
        """Write the files of a method that has answered all questions, and note its figures."""
        for file, content in files.items():
            write_atomically(self.path / file, content)
        batches = self.read_batches(name)
        turns = [turn for batch in batches for turn in batch.turns]
        selected = [turn.unsteered for turn in turns if turn.unsteered is not None]
        tokens, seconds = sum(len(turn.ids) for turn in turns), sum(batch.seconds for batch in batches)
        self.methods[name] = replace(
            self.methods[name],
            generated=len(turns),
            unsteered=sum(selected) if selected else None,
            cut=sum(turn.cut for turn in turns),
            tokens=tokens,
            seconds=seconds,
            tokens_per_second=tokens / seconds if seconds else 0.0,
            files=list(files),
        )
        self.save()

    def _turns(self, name: str) -> Path:
        return self.path / TURNS / f"{self.methods[name].id}.jsonl"

    def _header(self, name: str) -> str:
        return json.dumps({"format": FORMAT, "made_by": digest_of([self.settings, self.methods[name].digest])})


def _as_read(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as JSON reads them again."""
    return check(dict[Text, Any], parse_json(json.dumps(settings), ValueError, "settings"), ValueError, "settings")


def _difference(known: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """Return the name of the first setting that differs, and both of its values."""
    for name in {**known, **given}:
        before, now = known.get(name), given.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            if within := _difference(before, now):
                return f"{name}.{within[0]}", *within[1:]
        elif before != now:
            return name, before, now
    return None


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= NAMED else f"{text[:NAMED]}..."
