"""Checkpoints of SAELens' trainer, with the place in the stream and the history of the training."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from dspa.errors import TrainingError, refusal
from dspa.files import check_seal, sealed
from dspa.outputs import workspace
from dspa.saes.activations import Position
from dspa.schemas import Text, check, read_json, schema
from dspa.training_folder import History, TrainingFolder, check_step, reading_checkpoint


@schema
class Stream:
    """The content of `stream.json`.

    Attributes:
        position: place in the stream after the last step.
        history: what was reported up to there.
        seal: digest of both; empty in checkpoints of earlier versions.
    """

    position: Position
    history: History
    seal: Text = ""


def save_checkpoint(folder: TrainingFolder, trainer: Any, position: Position, history: History) -> None:
    """Save the state of an `SAETrainer`, its place in the stream and its history, in place of the checkpoint before."""
    with workspace(folder.path) as place:
        made = place / "checkpoint"
        trainer.save_trainer_state(made)
        save_file(trainer.sae.state_dict(), made / "sae.safetensors")
        (made / "stream.json").write_text(json.dumps(sealed(asdict(Stream(position, history)))), encoding="utf-8")
        folder.keep(made, trainer.n_training_steps)


def restore_checkpoint(folder: TrainingFolder, trainer: Any) -> tuple[Position | None, History]:
    """Set `trainer` back to the newest checkpoint, if there is one. Returns its place in the stream and its history.

    Raises:
        TrainingError: a damaged checkpoint.
    """
    checkpoints = folder.checkpoints()
    if not checkpoints:
        return None, []
    newest, config = checkpoints[-1], trainer.cfg
    with reading_checkpoint(newest):
        # SAELens reads its state with torch.load's default, weights_only.
        trainer.load_trainer_state(newest)
        trainer.sae.load_state_dict(_finite(load_file(newest / "sae.safetensors")))
        check_step(newest, trainer.n_training_steps, config.total_training_samples // config.train_batch_size_samples)
        content = read_json(newest / "stream.json", TrainingError)
        stream = check(Stream, content, TrainingError, "stream.json")
        check_seal(content, TrainingError, "stream.json", "")
    return stream.position, stream.history


def _finite(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise refusal(TrainingError, f"`{name}`", "partly NaN or infinite", "finite numbers")
    return tensors
