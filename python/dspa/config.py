"""The settings of DSPA's online part."""

from dataclasses import field
from typing import Annotated, TypeAlias

from pydantic import Field, StrictFloat

from dspa.schemas import Accepts, NonNegative, OneOf, Positive, PositiveInt, schema

MODES = ("ablate", "augment", "both")
POSITIONS = ("response", "generated", "all")
SCORINGS = ("raw", "demixed", "whitened", "confident")
Strength: TypeAlias = Annotated[NonNegative, Accepts("a finite number >= 0 (published: 0.2)")]
Level: TypeAlias = Annotated[StrictFloat, Field(gt=0, lt=1), Accepts("a number between 0 and 1")]


@schema
class SteeringConfig:
    """Settings of steering; the defaults are the published ones.

    The metadata of each field hold its help, and its choices where it has some, with what they mean.

    Raises:
        ValueError: a setting outside its choices or its range.
    """

    k_prompt: PositiveInt = field(
        default=32, metadata={"help": "Number of input latents, a prompt's densest, whose rows of the map are summed."}
    )
    k_diff: PositiveInt = field(
        default=16, metadata={"help": "Number of output latents to augment, and to ablate, at most."}
    )
    alpha: Strength = field(
        default=0.2,
        metadata={
            "help": "Strength: how far a latent is moved, as a multiple of the token's largest latent (0: no edit)."
        },
    )
    mode: Annotated[str, OneOf(MODES)] = field(
        default="ablate",
        metadata={
            "help": "Edits to make. ablate: weaken latents of rejected responses; augment: strengthen those of "
            "chosen ones; or both.",
            "choices": MODES,
        },
    )
    positions: Annotated[str, OneOf(POSITIONS)] = field(
        default="response",
        metadata={
            "help": "Tokens to edit.",
            "choices": {
                "response": "the last prompt token, which predicts the first of the response, and all after it",
                "generated": "only those after it",
                "all": "the whole prompt too",
            },
        },
    )
    scoring: Annotated[str, OneOf(SCORINGS)] = field(
        default="raw",
        metadata={
            "help": "How a prompt's output latents are chosen.",
            "choices": {
                "raw": "by the sum of its rows of the map, as published",
                "demixed": "less what its input latents have in common",
                "whitened": "relative to each latent's variance",
                "confident": "by entries beyond chance only",
            },
        },
    )
    ridge: Positive = field(default=1e-3, metadata={"help": "Ridge of the least squares of demixed scoring."})
    delta: Level = field(
        default=0.05,
        metadata={"help": "Level of confident scoring, which keeps entries beyond their radius at 1 - delta."},
    )
