"""The progress of a training: what happens after every step, and the history of what was logged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from typing_extensions import TypedDict

from dspa.errors import TrainingError
from dspa.fsrl.adapter import FSRLAdapter
from dspa.schemas import PositiveInt, check, read_json
from dspa.training_folder import History, check_step, reading_checkpoint


# The entries of transformers' state of a training that are read here.
class _State(TypedDict):
    global_step: PositiveInt
    max_steps: PositiveInt
    log_history: History


class Steps(TrainerCallback):
    """Callback of every optimizer step."""

    def __init__(self, adapter: FSRLAdapter, bar: tqdm[Any]) -> None:
        self.adapter, self.bar = adapter, bar

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Show how far the training came before it was stopped."""
        self.bar.reset(state.max_steps)
        self.bar.update(state.global_step)

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Keep thresholds at 0 or above: a negative one would get no gradient and never change."""
        if self.adapter.config.activation == "soft_threshold":
            self.adapter.threshold.clamp_(min=0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Log before a checkpoint, which does not hold the sums of the means that are logged next."""
        self.bar.update()
        control.should_log = control.should_log or control.should_save

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Show the figures that were logged last."""
        names = {"loss": "loss", "rewards/accuracies": "accuracy", "l0": "L0", "l1": "L1"}
        shown = {label: f"{logs[name]:.4g}" for name, label in names.items() if name in (logs or {})}
        if shown:
            self.bar.set_postfix(shown)


def without_times(history: Iterable[Mapping[str, float]]) -> History:
    """Return what was logged without timings, and without TRL's summary at the end of a training."""
    kept = [entry for entry in history if "train_runtime" not in entry]
    return [{k: v for k, v in entry.items() if not k.endswith(("_runtime", "_per_second", "_time"))} for entry in kept]


def whole_history(checkpoint: Path) -> History | None:
    """Return what was logged up to a checkpoint of the last step, or None for an earlier checkpoint.

    A trainer that resumed from the last step would make one step more.

    Raises:
        TrainingError: the checkpoint is damaged.
    """
    with reading_checkpoint(checkpoint):
        state = check(_State, read_json(checkpoint / TRAINER_STATE_NAME, TrainingError), TrainingError, "its state")
        check_step(checkpoint, state["global_step"], state["max_steps"])
    return without_times(state["log_history"]) if state["global_step"] == state["max_steps"] else None
