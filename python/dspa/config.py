"""The settings of DSPA's online part."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from dspa.errors import refusal

MODES = ("ablate", "augment", "both")
POSITIONS = ("response", "generated", "all")
SCORINGS = ("raw", "demixed", "whitened", "confident")
# Setting, its type, which values are valid, and what a message says of them.
CHECKS: tuple[tuple[str, Any, Callable[[Any], bool], str], ...] = (
    ("k_prompt", int, lambda value: value >= 1, "a whole number >= 1"),
    ("k_diff", int, lambda value: value >= 1, "a whole number >= 1"),
    ("alpha", (int, float), lambda value: 0 <= value < math.inf, "a finite number >= 0 (published: 0.2)"),
    ("ridge", (int, float), lambda value: 0 < value < math.inf, "a finite number > 0"),
    ("delta", (int, float), lambda value: 0 < value < 1, "a number between 0 and 1"),
)


@dataclass(frozen=True)
class SteeringConfig:
    """Settings of steering; the defaults are the published ones.

    The metadata of each field hold its help, and its choices where it has some.

    Raises:
        ValueError: a setting outside its choices or its range.
    """

    k_prompt: int = field(
        default=32, metadata={"help": "Number of input latents, a prompt's densest, whose rows of the map are summed."}
    )
    k_diff: int = field(default=16, metadata={"help": "Number of output latents to augment, and to ablate, at most."})
    alpha: float = field(
        default=0.2,
        metadata={
            "help": "Strength: how far a latent is moved, as a multiple of the token's largest latent (0: no edit)."
        },
    )
    mode: str = field(
        default="ablate",
        metadata={
            "help": "Edits to make. ablate: weaken latents of rejected responses; augment: strengthen those of "
            "chosen ones; or both.",
            "choices": MODES,
        },
    )
    positions: str = field(
        default="response",
        metadata={
            "help": "Tokens to edit. response: the last prompt token, which predicts the first of the response, and "
            "all after it; generated: only those after it; all: the whole prompt too.",
            "choices": POSITIONS,
        },
    )
    scoring: str = field(
        default="raw",
        metadata={
            "help": "How a prompt's output latents are chosen. raw: by the sum of its rows of the map, as published; "
            "demixed: less what its input latents have in common; whitened: relative to each latent's variance; "
            "confident: by entries beyond chance only.",
            "choices": SCORINGS,
        },
    )
    ridge: float = field(default=1e-3, metadata={"help": "Ridge of the least squares of demixed scoring."})
    delta: float = field(
        default=0.05,
        metadata={"help": "Level of confident scoring, which keeps entries beyond their radius at 1 - delta."},
    )

    def __post_init__(self) -> None:
        for name, kind, is_valid, accepted in CHECKS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kind) or not is_valid(value):
                raise refusal(ValueError, f"`{name}`", repr(value), accepted)
        for setting in fields(self):
            value, choices = getattr(self, setting.name), setting.metadata.get("choices")
            if choices and value not in choices:
                raise refusal(ValueError, f"`{setting.name}`", repr(value), ", ".join(choices))
