"""The progress of an adapter's training."""

from __future__ import annotations

from typing import Any

import torch
from tqdm import tqdm

from dspa import resuming
from dspa.fsrl.adapter import FSRLAdapter


class Steps(resuming.Steps):
    """Callback of every optimizer step."""

    shown = {"loss": "loss", "rewards/accuracies": "accuracy", "l0": "L0", "l1": "L1"}  # noqa: RUF012

    def __init__(self, adapter: FSRLAdapter, bar: tqdm[Any]) -> None:
        super().__init__(bar)
        self.adapter = adapter

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Keep thresholds at 0 or above: a negative one would get no gradient and never change."""
        if self.adapter.config.activation == "soft_threshold":
            self.adapter.threshold.clamp_(min=0)
