"""The settings of RAHF's two stages."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated

from dspa.baselines.settings import TrainingSettings
from dspa.errors import refusal
from dspa.schemas import Count, Flag, Fraction, NonNegative, OneOf, Positive, PositiveInt, schema

TUNING_LOSSES = ("clean", "paper", "rahf_code_compat")
ALIGNMENT_LOSSES = ("norm", "squared", "rahf_code_compat")


@schema
class TuningConfig(TrainingSettings):
    """Settings of stage 1, contrastive instruction tuning of all weights; the defaults are the published ones.

    The metadata of each field hold its help, and its choices where it has some.

    Raises:
        ValueError: an invalid loss, a number out of its range, a micro-batch that does not divide the batch.
    """

    loss: Annotated[str, OneOf(TUNING_LOSSES)] = field(
        default="clean",
        metadata={
            "help": "Loss of a response after its own and after the opposite instruction.",
            "choices": {
                "clean": "that of RAHF's code without its defects",
                "paper": "the published formula, with sums over tokens",
                "rahf_code_compat": "that of RAHF's code, whose contrast compares tokens with their own logits",
            },
        },
    )
    epsilon: Fraction = field(
        default=0.2, metadata={"help": "Share of the opposite label in the contrast, from 0 to 1; not in the paper's."}
    )
    lr: Positive = field(default=2e-5, metadata={"help": "Peak learning rate, before a linear decay."})
    warmup: Fraction = field(
        default=0.1, metadata={"help": "Fraction of the steps over which the learning rate rises from 0."}
    )
    epochs: Positive = field(default=2.0, metadata={"help": "Number of passes over the examples, two of each triple."})
    gradient_checkpointing: Flag = field(
        default=False, metadata={"help": "Recompute activations in the backward pass: less memory, more time."}
    )


@schema
class AlignmentConfig(TrainingSettings):
    """Settings of stage 2, a LoRA on q and v that moves residuals; the defaults are the published ones.

    The metadata of each field hold its help, and its choices where it has some.

    Raises:
        ValueError: an invalid loss, a number out of its range, a micro-batch that does not divide the batch.
    """

    loss: Annotated[str, OneOf(ALIGNMENT_LOSSES)] = field(
        default="norm",
        metadata={
            "help": "Distance of residuals from their targets.",
            "choices": {
                "norm": "the mean distance over layers and tokens",
                "squared": "the squared distance of the paper, summed over layers",
                "rahf_code_compat": "as norm, with padding in the mean",
            },
        },
    )
    targets: tuple[Count, ...] | None = None
    alpha: NonNegative = field(
        default=5.0, metadata={"help": "How many times the difference of good and bad is added to the residuals."}
    )
    lr: Positive = field(default=3e-4, metadata={"help": "Learning rate, constant."})
    max_steps: PositiveInt | None = field(
        default=None, metadata={"help": "Optimizer steps; by default 2 % of the number of triples, at most 450."}
    )
    rank: PositiveInt = field(default=8, metadata={"help": "Rank of the LoRA."})
    lora_alpha: PositiveInt = field(default=16, metadata={"help": "Alpha of the LoRA."})
    dropout: Fraction = field(default=0.05, metadata={"help": "Dropout of the LoRA."})

    def steps(self, n_triples: int) -> int:
        """Return the number of optimizer steps for a number of triples."""
        return self.max_steps or max(1, min(450, round(0.02 * n_triples)))

    def target_layers(self, n_layers: int) -> tuple[int, ...]:
        """Return the layers whose input residuals are moved, in ascending order.

        By default every second one from 5/16 to 9/16 of the layers: 8 to 14 of 26 and 10 to 18 of 32, as published for
        models of these depths.

        Raises:
            ValueError: a layer that the model does not have.
        """
        targets = range(round(5 * n_layers / 16), round(9 * n_layers / 16) + 1, 2)
        chosen = tuple(sorted(set(targets if self.targets is None else self.targets)))
        if not chosen or not 0 < chosen[0] <= chosen[-1] < n_layers:
            got = list(chosen)
            raise refusal(ValueError, "`targets`", got, f"layers from 1 to {n_layers - 1} of the model's {n_layers}")
        return chosen
