"""Checkpoints of SAELens' trainer, with the place in the stream and the history of the training."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from safetensors.torch import load_file, save_file

from dspa.errors import TrainingError
from dspa.outputs import workspace
from dspa.saes.activations import Position
from dspa.schemas import read_json
from dspa.training_folder import History, TrainingFolder


def save_checkpoint(folder: TrainingFolder, trainer: Any, position: Position, history: History) -> None:
    """Save the state of an `SAETrainer`, its place in the stream and its history, in place of the checkpoint before."""
    with workspace(folder.path) as place:
        made = place / "checkpoint"
        trainer.save_trainer_state(made)
        save_file(trainer.sae.state_dict(), made / "sae.safetensors")
        stream = {"position": asdict(position), "history": history}
        (made / "stream.json").write_text(json.dumps(stream), encoding="utf-8")
        folder.keep(made, trainer.n_training_steps)


def restore_checkpoint(folder: TrainingFolder, trainer: Any) -> tuple[Position | None, History]:
    """Set `trainer` back to the newest checkpoint, if there is one. Returns its place in the stream and its history.

    Raises:
        TrainingError: a damaged checkpoint.
    """
    checkpoints = folder.checkpoints()
    if not checkpoints:
        return None, []
    newest = checkpoints[-1]
    try:
        # SAELens reads its state with torch.load's default, weights_only.
        trainer.load_trainer_state(newest)
        trainer.sae.load_state_dict(load_file(newest / "sae.safetensors"))
        stream = read_json(newest / "stream.json", TrainingError)
        return Position(**stream["position"]), stream["history"]
    # Each of the three formats has its own errors, and torch's would advise to unpickle what is not trusted.
    except Exception as error:
        raise TrainingError(
            f"The checkpoint {newest} is damaged ({type(error).__name__}). Delete it, then the training begins again."
        ) from error
