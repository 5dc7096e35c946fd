"""The folder of a training: what it was told, where it stopped, what came of it."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from dspa.errors import TrainingError
from dspa.files import write_atomically

RECORD = "training.json"
PARTIAL = ".partial"
ACCEPTED = "a new folder in one that exists, or a folder in which this training was stopped"

# What was reported on the way, a line each.
History: TypeAlias = list[dict[str, float]]


@dataclass(frozen=True)
class TrainingFolder:
    """`training.json`, with the settings from the start and the results at the end, and the newest checkpoint, of
    which each appears whole or not at all."""

    path: Path

    @property
    def finished(self) -> bool:
        """Whether the training that began here has come to its end."""
        return (self.path / RECORD).exists() and "history" in self.read()

    @property
    def partial(self) -> Path:
        """Where a checkpoint is written before it counts as one."""
        return self.path / f"checkpoint{PARTIAL}"

    def check(self, *, finished: bool = False) -> None:
        """Raise `TrainingError` unless a training can begin here, or go on, or, if `finished`, is at its end."""
        path = self.path
        if not path.parent.is_dir() or (path.exists() and not path.is_dir()):
            raise TrainingError(f"The output folder is {path}; accepted: {ACCEPTED}.")
        held = sorted(each.name for each in path.iterdir() if each.suffix != PARTIAL) if path.exists() else []
        if held and RECORD not in held:
            raise TrainingError(f"The output folder {path} holds {held[:8]}; accepted: {ACCEPTED}. Name another.")
        if self.finished and not finished:
            raise TrainingError(
                f"The output folder {path} holds a finished training; accepted: {ACCEPTED}. Name another."
            )

    def claim(self, settings: dict[str, Any], *, finished: bool = False) -> None:
        """Begin here, or see that what was begun here, or finished if that is allowed, is the same training."""
        self.check(finished=finished)
        # Of a training that never came to a checkpoint there is nothing to lose.
        if not self.finished and not self.checkpoints():
            self.path.mkdir(exist_ok=True)
            self.write({"settings": settings})
        theirs = self.read()["settings"]
        differ = [
            f"{key}: {theirs.get(key)!r} there, {value!r} now"
            for key, value in settings.items()
            if theirs.get(key) != value
        ]
        if differ:
            raise TrainingError(
                f"The output folder {self.path} holds a training of other settings ({'; '.join(differ)}). Go on with "
                "those, or name another folder."
            )

    def read(self) -> dict[str, Any]:
        """What `training.json` holds."""
        try:
            record = json.loads((self.path / RECORD).read_text(encoding="utf-8"))
            return {**record, "settings": dict(record["settings"])}
        except (ValueError, TypeError, KeyError) as error:
            raise TrainingError(
                f"{self.path / RECORD} is not what a training wrote ({error}). Name another folder."
            ) from error

    def write(self, record: dict[str, Any]) -> None:
        """Put `training.json` in the place of what was there."""
        write_atomically(self.path / RECORD, (json.dumps(record, indent=2) + "\n").encode())

    def checkpoints(self) -> list[Path]:
        """From the oldest to the newest; there is more than one only where a run was stopped between two."""
        return sorted(self.path.glob("checkpoint-*"))

    def keep(self, written: Path, step: int) -> None:
        """Make a folder that is written the checkpoint of a step, in the place of those before."""
        older = self.checkpoints()
        os.replace(written, self.path / f"checkpoint-{step:09d}")
        for folder in older:
            shutil.rmtree(folder)

    def finish(self, results: dict[str, Any]) -> None:
        """Add the results, `history` among them, to `training.json`, and drop what is not needed now."""
        self.write(self.read() | results)
        for folder in self.checkpoints():
            shutil.rmtree(folder)
        shutil.rmtree(self.partial, ignore_errors=True)
