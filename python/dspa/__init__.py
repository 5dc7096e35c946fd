"""Steer language models with sparse autoencoders: DSPA at inference time, without changing a weight."""

from dspa.cdmap import ConditionalDifferenceMap, build_map
from dspa.config import SteeringConfig
from dspa.errors import MapError, ModelError
from dspa.preferences import PreferenceError, Triple, load_triples
from dspa.saes import FrozenSAE
from dspa.steering import Steering
from dspa.version import __version__

__all__ = [
    "ConditionalDifferenceMap",
    "FrozenSAE",
    "MapError",
    "ModelError",
    "PreferenceError",
    "Steering",
    "SteeringConfig",
    "Triple",
    "__version__",
    "build_map",
    "load_triples",
]
