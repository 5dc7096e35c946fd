"""How to steer: the settings of DSPA's online part."""

import math
from dataclasses import dataclass

MODES = ("ablate", "augment", "both")
POSITIONS = ("response", "generated", "all")
SCORINGS = ("raw", "demixed", "whitened", "confident")


@dataclass(frozen=True)
class SteeringConfig:
    """How to steer; the defaults are the published settings.

    k_prompt: prompt latents that choose. k_diff: latents to augment and to ablate, at most. alpha: strength,
    in units of the token's largest latent. mode: "ablate", "augment" or "both". positions: "response" (the
    last prompt token and every generated one), "generated" (generated ones only) or "all". scoring: "raw", or
    one of the refinements "demixed" (with `ridge`), "whitened", "confident" (entries beyond their confidence
    radius at level 1 - `delta`).
    """

    k_prompt: int = 32
    k_diff: int = 16
    alpha: float = 0.2
    mode: str = "ablate"
    positions: str = "response"
    scoring: str = "raw"
    ridge: float = 1e-3
    delta: float = 0.05

    def __post_init__(self) -> None:
        for name in ("k_prompt", "k_diff"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` is {value!r}; accepted: a whole number >= 1.")
        for name in ("alpha", "ridge", "delta"):
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), (int, float)):
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; accepted: a number.")
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise ValueError(f"`alpha` is {self.alpha!r}; accepted: a finite number >= 0 (published: 0.2).")
        if not (math.isfinite(self.ridge) and self.ridge > 0):
            raise ValueError(f"`ridge` is {self.ridge!r}; accepted: a finite number > 0.")
        if not 0 < self.delta < 1:
            raise ValueError(f"`delta` is {self.delta!r}; accepted: a number between 0 and 1.")
        for name, accepted in (("mode", MODES), ("positions", POSITIONS), ("scoring", SCORINGS)):
            if getattr(self, name) not in accepted:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; accepted: {', '.join(accepted)}.")
