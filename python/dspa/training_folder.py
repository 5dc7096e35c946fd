"""The folder of a training: what it was told, where it stopped, what came of it."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from safetensors.torch import load_file, save_file

from dspa.errors import TrainingError
from dspa.files import write_atomically
from dspa.saes.activations import Position

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

    def save_checkpoint(self, trainer: Any, position: Position, history: History) -> None:
        """Keep all that decides how an `SAETrainer` goes on, in the place of the checkpoint before."""
        shutil.rmtree(self.partial, ignore_errors=True)
        trainer.save_trainer_state(self.partial)
        save_file(trainer.sae.state_dict(), self.partial / "sae.safetensors")
        stream = {"position": asdict(position), "history": history}
        (self.partial / "stream.json").write_text(json.dumps(stream), encoding="utf-8")
        self.keep(self.partial, trainer.n_training_steps)

    def keep(self, written: Path, step: int) -> None:
        """Make a folder that is written the checkpoint of a step, in the place of those before."""
        older = self.checkpoints()
        os.replace(written, self.path / f"checkpoint-{step:09d}")
        for folder in older:
            shutil.rmtree(folder)

    def restore(self, trainer: Any) -> tuple[Position | None, History]:
        """Set `trainer` back to the newest checkpoint, if there is one: the place in the stream, and the history."""
        if not (found := self.checkpoints()):
            return None, []
        try:
            # SAELens reads its state with torch.load's default, weights_only.
            trainer.load_trainer_state(found[-1])
            trainer.sae.load_state_dict(load_file(found[-1] / "sae.safetensors"))
            stream = json.loads((found[-1] / "stream.json").read_text(encoding="utf-8"))
            return Position(**stream["position"]), stream["history"]
        # Three formats, each with errors of its own, and torch's would advise to unpickle what is not trusted.
        except Exception as error:
            raise TrainingError(
                f"The checkpoint {found[-1]} is damaged ({type(error).__name__}). Delete it, and the training begins "
                "again."
            ) from error

    def finish(self, results: dict[str, Any]) -> None:
        """Add the results, `history` among them, to `training.json`, and drop what is not needed now."""
        self.write(self.read() | results)
        for folder in self.checkpoints():
            shutil.rmtree(folder)
        shutil.rmtree(self.partial, ignore_errors=True)
