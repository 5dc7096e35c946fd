"""Settings of the texts under directions, and of the fit of their effects."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated

from dspa.errors import refusal
from dspa.schemas import NonNegative, OneOf, Positive, PositiveInt, Seed, schema

METHODS = ("ridge", "adam")
VARIANTS = ("targeted", "pseudo-inverse", "rotation")


@schema
class RolloutSettings:
    """Settings of the texts; the published ones but for `rollouts`, which is 896 there.

    The metadata of each field hold its help.
    """

    rollouts: PositiveInt = field(
        default=56, metadata={"help": "Texts per direction (published: 896). Openers take turns."}
    )
    length: PositiveInt = field(
        default=32, metadata={"help": "Tokens per text, opener included. End tokens do not end a text."}
    )
    top_k: PositiveInt = field(default=50, metadata={"help": "Number of likeliest tokens that are drawn from."})
    top_p: Positive = field(
        default=0.3, metadata={"help": "Share of their probability that is drawn from, from the likeliest on."}
    )
    seed: Seed = field(default=0, metadata={"help": "Seed of the draws, of texts and of directions."})

    def __post_init__(self) -> None:
        if self.top_p > 1:
            raise refusal(ValueError, "`top_p`", self.top_p, "a number above 0, up to 1")


@schema
class FitSettings:
    """Settings of the fit; those of Adam are the published ones.

    The metadata of each field hold its help.
    """

    method: Annotated[str, OneOf(METHODS)] = field(
        default="ridge",
        metadata={
            "help": "How to fit.",
            "choices": {"ridge": "in closed form", "adam": "by steps of Adam, as published"},
        },
    )
    ridge: NonNegative | None = field(
        default=None,
        metadata={
            "help": "Penalty of ridge, relative to the mean variance of a coordinate of the directions. By default "
            "chosen by generalised cross-validation.",
        },
    )
    held_out: PositiveInt | None = field(
        default=None,
        metadata={"help": "Directions to hold out, the last ones. By default 100, or a tenth where they are few."},
    )
    epochs: PositiveInt = field(default=15, metadata={"help": "Passes of Adam over the directions."})
    lr: Positive = field(
        default=2e-4, metadata={"help": "Learning rate of Adam, which falls by a cosine from epoch to epoch."}
    )
    batch_size: PositiveInt = field(default=64, metadata={"help": "Directions per step of Adam."})
    seed: Seed = field(default=0, metadata={"help": "Seed of Adam and of the control with shuffled directions."})

    def __post_init__(self) -> None:
        if self.method == "adam" and self.ridge is not None:
            raise refusal(ValueError, "`ridge`", f"{self.ridge:g} with `method` adam", "a penalty for ridge alone")
