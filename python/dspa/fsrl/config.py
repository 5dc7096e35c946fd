"""What an adapter is, and how strongly it is kept sparse."""

from __future__ import annotations

import math
from dataclasses import dataclass

ACTIVATIONS = ("soft_threshold", "relu", "jumprelu")


@dataclass(frozen=True)
class FSRLConfig:
    """An adapter `v = act(h W_a + b_a)` on the latents of an SAE; the defaults are the published settings.

    Attributes:
        activation: "soft_threshold" (sign(u) max(|u| - threshold, 0)), "relu", or "jumprelu" (u where u > threshold).
        initial_threshold: the threshold of every latent at the start; W_a starts uniform within plus and minus this.
        l1: lambda, the weight of the mean over response tokens of sum_j |v_j|, in the loss.
        bandwidth: of the straight-through estimate by which a JumpReLU's thresholds learn.
        seed: of the start of W_a.

    Raises:
        ValueError: another activation, a negative l1, a threshold or bandwidth that is not above 0.
    """

    activation: str = "soft_threshold"
    initial_threshold: float = 1e-6
    l1: float = 2e-2
    bandwidth: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"`activation` is {self.activation!r}; accepted: {', '.join(ACTIVATIONS)}.")
        for name in ("initial_threshold", "bandwidth", "l1"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value < 0 or (value == 0 and name != "l1"):
                least = "a finite number >= 0 (lambda; published: 0.02)" if name == "l1" else "a finite number > 0"
                raise ValueError(f"`{name}` is {value!r}; accepted: {least}.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ValueError(f"`seed` is {self.seed!r}; accepted: a whole number from 0 to 2**32 - 1.")
