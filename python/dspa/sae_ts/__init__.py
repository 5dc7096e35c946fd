"""SAE-TS (arXiv 2411.02193): steering vectors that target latents, by a linear model of what directions do to them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dspa.evaluate.scale import FoundScale, find_scale
    from dspa.sae_ts.approximator import EffectApproximator, fit_effects
    from dspa.sae_ts.effects import OPENERS, Effects, draw_directions, measure_effects
    from dspa.sae_ts.imitation import map_target, prompts_target
    from dspa.sae_ts.settings import FitSettings, RolloutSettings
    from dspa.sae_ts.vectors import targeted_vector

# Modules of the names, which are imported on first use: the command line reads the settings without torch.
HOMES = {
    "EffectApproximator": "dspa.sae_ts.approximator",
    "Effects": "dspa.sae_ts.effects",
    "FitSettings": "dspa.sae_ts.settings",
    "FoundScale": "dspa.evaluate.scale",
    "OPENERS": "dspa.sae_ts.effects",
    "RolloutSettings": "dspa.sae_ts.settings",
    "draw_directions": "dspa.sae_ts.effects",
    "find_scale": "dspa.evaluate.scale",
    "fit_effects": "dspa.sae_ts.approximator",
    "map_target": "dspa.sae_ts.imitation",
    "measure_effects": "dspa.sae_ts.effects",
    "prompts_target": "dspa.sae_ts.imitation",
    "targeted_vector": "dspa.sae_ts.vectors",
}

__all__ = [
    "OPENERS",
    "EffectApproximator",
    "Effects",
    "FitSettings",
    "FoundScale",
    "RolloutSettings",
    "draw_directions",
    "find_scale",
    "fit_effects",
    "map_target",
    "measure_effects",
    "prompts_target",
    "targeted_vector",
]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'dspa.sae_ts' has no attribute {name!r}")
    return getattr(import_module(HOMES[name]), name)
