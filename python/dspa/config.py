"""The settings of DSPA's online part."""

import math
from dataclasses import dataclass, field, fields

from dspa.errors import refusal

MODES = ("ablate", "augment", "both")
POSITIONS = ("response", "generated", "all")
SCORINGS = ("raw", "demixed", "whitened", "confident")


@dataclass(frozen=True)
class SteeringConfig:
    """Settings of steering; the defaults are the published ones.

    The metadata of each field hold its help, and its choices where it has some.

    Raises:
        ValueError: a setting outside its choices or its range.
    """

    k_prompt: int = field(default=32, metadata={"help": "Number of prompt latents that choose what is edited."})
    k_diff: int = field(default=16, metadata={"help": "Number of output latents to augment and to ablate, at most."})
    alpha: float = field(
        default=0.2,
        metadata={"help": "Strength of the edit, in units of each token's largest latent (0: no edit)."},
    )
    mode: str = field(default="ablate", metadata={"help": "Which latents are edited.", "choices": MODES})
    positions: str = field(
        default="response",
        metadata={
            "help": "Tokens to steer: the last prompt token and every generated one, generated ones only, or all.",
            "choices": POSITIONS,
        },
    )
    scoring: str = field(
        default="raw",
        metadata={"help": "How output latents are scored: by the map as it is, or refined.", "choices": SCORINGS},
    )
    ridge: float = field(default=1e-3, metadata={"help": "Ridge of the least squares of demixed scoring."})
    delta: float = field(
        default=0.05,
        metadata={"help": "Level of confident scoring, which keeps entries beyond their radius at 1 - delta."},
    )

    def __post_init__(self) -> None:
        for name in ("k_prompt", "k_diff"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise refusal(ValueError, f"`{name}`", repr(value), "a whole number >= 1")
        for name in ("alpha", "ridge", "delta"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise refusal(ValueError, f"`{name}`", repr(value), "a number")
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise refusal(ValueError, "`alpha`", repr(self.alpha), "a finite number >= 0 (published: 0.2)")
        if not (math.isfinite(self.ridge) and self.ridge > 0):
            raise refusal(ValueError, "`ridge`", repr(self.ridge), "a finite number > 0")
        if not 0 < self.delta < 1:
            raise refusal(ValueError, "`delta`", repr(self.delta), "a number between 0 and 1")
        for setting in fields(self):
            value, choices = getattr(self, setting.name), setting.metadata.get("choices")
            if choices and value not in choices:
                raise refusal(ValueError, f"`{setting.name}`", repr(value), ", ".join(choices))
