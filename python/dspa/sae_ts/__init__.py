"""SAE-TS (arXiv 2411.02193): steering vectors that target latents, by a linear model of what directions do to them."""

from dspa.sae_ts.approximator import EffectApproximator, fit_effects
from dspa.sae_ts.effects import OPENERS, Effects, measure_effects
from dspa.sae_ts.imitation import map_target, prompts_target
from dspa.sae_ts.vectors import targeted_vector

__all__ = [
    "OPENERS",
    "EffectApproximator",
    "Effects",
    "fit_effects",
    "map_target",
    "measure_effects",
    "prompts_target",
    "targeted_vector",
]
