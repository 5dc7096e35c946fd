"""The folder of a training: its settings, its newest checkpoint and its results."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias, TypeVar

from typing_extensions import NotRequired, TypedDict

from dspa.archives import check_archive
from dspa.errors import TrainingError, refusal
from dspa.outputs import held, is_own, try_folder, write_atomically
from dspa.schemas import AnyNumber, Day, Text, check, read_json, whole

T = TypeVar("T")

RECORD, CHECKPOINT, OUT = "training.json", "checkpoint-", "The output folder"
# Settings one of which every training records, and files of other makers do not.
MARKS = {"data", "template_date"}
ACCEPTED = "a new folder in one that exists, or a folder of this training, stopped or finished"

# Metrics that were reported on the way, one entry per report.
History: TypeAlias = list[dict[Text, AnyNumber]]


# The entries that every training reads again; the others are compared, or are those of one kind of training.
class _Settings(TypedDict, total=False):
    data: Text
    template_date: Day | None
    chat_template_kwargs: dict[Text, Any] | None


class _Record(TypedDict):
    settings: _Settings
    history: NotRequired[History]


@dataclass(frozen=True)
class TrainingFolder:
    """A folder with `training.json` and the newest checkpoint, each of which appears whole or not at all.

    `training.json` holds the settings from the start, and the results at the end.
    """

    path: Path

    @property
    def finished(self) -> bool:
        """True where the training in this folder has ended."""
        return (self.path / RECORD).exists() and "history" in self.read()

    @property
    def _settled(self) -> bool:
        """True for a finished training that left nothing to remove, as one does that is killed after its last file."""
        return self.finished and not self.checkpoints() and not any(map(is_own, self.path.iterdir()))

    def check(self) -> None:
        """Raise `TrainingError` unless a training can begin or continue here, or has ended here."""
        path, advice = self.path, "Name another."
        if not path.parent.is_dir() or (path.exists() and not path.is_dir()):
            raise refusal(TrainingError, OUT, str(path), ACCEPTED)
        names = sorted(item.name for item in path.iterdir() if not is_own(item)) if path.exists() else []
        if names and RECORD not in names:
            raise refusal(TrainingError, OUT, f"{path}, which holds {names[:8]}", ACCEPTED, advice)
        if RECORD in names:
            # Raises for a record of something else.
            self.read()

    def check_free(self) -> None:
        """Raise `TrainingError` if a training here would write, and could not, or another process does."""
        if not self._settled:
            try_folder(self.path, OUT, TrainingError)

    def held(self) -> AbstractContextManager[None]:
        """Return a context in which no other process trains here. Where all is done, nothing is written any more.

        Raises:
            TrainingError: as for `check_free`, when it is entered.
        """
        return nullcontext() if self._settled else held(self.path, OUT, TrainingError)

    def claim(self, settings: dict[str, Any], *, earlier: Mapping[str, Any] = MappingProxyType({})) -> None:
        """Begin a training here, or check that the one begun or finished here has the same settings.

        Args:
            settings: all that the training depends on.
            earlier: values of settings that a folder of an earlier version does not record.

        Raises:
            TrainingError: the folder holds something else, or a training of other settings.
        """
        self.check()
        # A training without a checkpoint has nothing to lose.
        if not self.finished and not self.checkpoints():
            self.path.mkdir(exist_ok=True)
            self.write({"settings": settings})
        recorded = {**earlier, **self.read()["settings"]}
        differences = [
            f"{key}: {recorded.get(key)!r} there, {value!r} now"
            for key, value in settings.items()
            if recorded.get(key) != value
        ]
        if differences:
            raise TrainingError(
                f"The output folder {self.path} holds a training of other settings ({'; '.join(differences)}). "
                "Continue with those, or name another folder."
            )
        if self.finished:
            self._remove_checkpoints()

    def first_date(self, today: str | None) -> str | None:
        """Return the date on which the training here was begun, or today's for a new one.

        Args:
            today: today's date, or None for a training that does not depend on it.

        Raises:
            TrainingError: the folder holds something else.
        """
        if today is None:
            return None
        self.check()
        if not (self.path / RECORD).exists():
            self.path.mkdir(exist_ok=True)
            self.write({"settings": {"template_date": today}})
        date: str | None = self.read()["settings"].get("template_date", today)
        return date

    def read(self) -> dict[str, Any]:
        """Return the content of `training.json`.

        Raises:
            TrainingError: a file of something else, or a damaged one.
            FileNotFoundError: no training was begun here.
        """
        record = self._content()
        self.check_record(_Record, record)
        return record

    @property
    def begun(self) -> bool:
        """True where a training wrote `training.json`, whatever became of it, and False for another program's."""
        try:
            return bool(self._content())
        except (FileNotFoundError, TrainingError):
            return False

    def _content(self) -> dict[str, Any]:
        try:
            record: dict[str, Any] = read_json(self.path / RECORD, ValueError)
            if not dict(record["settings"]).keys() & MARKS:
                raise KeyError(*MARKS)
            return record
        except (ValueError, TypeError, KeyError) as error:
            raise TrainingError(
                f"{self.path / RECORD} is not what a training wrote ({error}). Name another folder."
            ) from error

    def check_record(self, kind: type[T], record: object) -> T:
        """Return the content of `training.json`, or an entry of it, as an instance of a schema.

        Raises:
            TrainingError: it does not fit the schema.
        """
        return check(kind, record, TrainingError, f"{self.path / RECORD} is damaged", "Name another folder.")

    def write(self, record: dict[str, Any]) -> None:
        """Write `training.json`, in place of the one that was there."""
        write_atomically(self.path / RECORD, (json.dumps(record, indent=2) + "\n").encode())

    def checkpoints(self) -> list[Path]:
        """Return the checkpoints, oldest first. More than one are there only where a run was stopped between two."""
        return sorted(path for path in self.path.glob(f"{CHECKPOINT}{9 * '[0-9]'}") if path.is_dir())

    def keep(self, written: Path, step: int) -> None:
        """Make a written folder the checkpoint of a step, and remove the earlier ones."""
        older = self.checkpoints()
        os.replace(written, self.path / f"{CHECKPOINT}{step:09d}")
        for folder in older:
            shutil.rmtree(folder)

    def finish(self, results: dict[str, Any]) -> None:
        """Add the results, `history` among them, to `training.json`, and remove the checkpoints."""
        self.write(self.read() | results)
        self._remove_checkpoints()

    def _remove_checkpoints(self) -> None:
        # Other processes of the same training may do it too.
        for folder in self.checkpoints():
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def reading_checkpoint(checkpoint: Path) -> Iterator[None]:
    """Turn whatever is raised for the files of a checkpoint into `TrainingError`, except for `MemoryError`.

    Raises:
        TrainingError: the checkpoint is damaged.
    """
    try:
        for file in checkpoint.glob("*.pt*"):
            check_archive(file, TrainingError)
        yield
    except MemoryError:
        raise
    # Each format has its own errors, and torch's would advise to unpickle what is not trusted.
    except Exception as error:
        reason = str(error) if isinstance(error, TrainingError) else type(error).__name__
        raise TrainingError(
            f"The checkpoint {checkpoint} is damaged ({reason}). Delete it, then the training begins again."
        ) from error


def check_step(checkpoint: Path, step: object, n_steps: int) -> None:
    """Raise `TrainingError` unless `step`, as the files of a checkpoint say, is that of its name and one of `n_steps`.

    A trainer that is past its last step would not end.
    """
    named = int(checkpoint.name.removeprefix(CHECKPOINT))
    check(whole(1, n_steps, f"1 to {n_steps}"), step, TrainingError, "the step")
    if step != named:
        raise refusal(TrainingError, "the step", repr(step), f"{named}, as in its name")
