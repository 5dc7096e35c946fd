"""Steer language models with sparse autoencoders: DSPA at inference time, and adapters on their features (FSRL)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dspa import fsrl, sae_ts, serving
    from dspa.audit.evidence import collect_evidence, top_contexts
    from dspa.config import SteeringConfig
    from dspa.data.triples import Triple, load_triples
    from dspa.errors import AdapterError, MapError, ModelError, PreferenceError, SAEError, VectorError
    from dspa.evaluate.compare.comparison import Comparison
    from dspa.evaluate.compare.methods import Method
    from dspa.evaluate.compare.run import compare
    from dspa.maps.build import build_map
    from dspa.maps.cdmap import ConditionalDifferenceMap
    from dspa.maps.collect import collect
    from dspa.maps.collection import Collection
    from dspa.maps.reduce import reduce
    from dspa.models.load import load_model
    from dspa.saes.frozen import FrozenSAE
    from dspa.saes.meanings import top_tokens
    from dspa.steering.decisions import EntropyGate, FirstTokens, RandomGate
    from dspa.steering.dspa import Steering, detach
    from dspa.steering.joint import JointSteering
    from dspa.steering.vector import SteeringVector
    from dspa.version import __version__

# The module of each public name. It is imported on first use, because torch and transformers take seconds to import,
# and `dspa --help` should not wait for them.
HOMES = {
    "ConditionalDifferenceMap": "dspa.maps.cdmap",
    "Comparison": "dspa.evaluate.compare.comparison",
    "Method": "dspa.evaluate.compare.methods",
    "build_map": "dspa.maps.build",
    "compare": "dspa.evaluate.compare.run",
    "collect": "dspa.maps.collect",
    "Collection": "dspa.maps.collection",
    "reduce": "dspa.maps.reduce",
    "SteeringConfig": "dspa.config",
    "AdapterError": "dspa.errors",
    "MapError": "dspa.errors",
    "ModelError": "dspa.errors",
    "PreferenceError": "dspa.errors",
    "Triple": "dspa.data.triples",
    "load_triples": "dspa.data.triples",
    "load_model": "dspa.models.load",
    "SAEError": "dspa.errors",
    "VectorError": "dspa.errors",
    "FrozenSAE": "dspa.saes.frozen",
    "collect_evidence": "dspa.audit.evidence",
    "top_contexts": "dspa.audit.evidence",
    "top_tokens": "dspa.saes.meanings",
    "EntropyGate": "dspa.steering.decisions",
    "FirstTokens": "dspa.steering.decisions",
    "RandomGate": "dspa.steering.decisions",
    "Steering": "dspa.steering.dspa",
    "JointSteering": "dspa.steering.joint",
    "SteeringVector": "dspa.steering.vector",
    "detach": "dspa.steering.dspa",
    "__version__": "dspa.version",
}

__all__ = [
    "AdapterError",
    "Collection",
    "Comparison",
    "ConditionalDifferenceMap",
    "EntropyGate",
    "FirstTokens",
    "FrozenSAE",
    "JointSteering",
    "MapError",
    "Method",
    "ModelError",
    "PreferenceError",
    "RandomGate",
    "SAEError",
    "Steering",
    "SteeringConfig",
    "SteeringVector",
    "Triple",
    "VectorError",
    "__version__",
    "build_map",
    "collect",
    "collect_evidence",
    "compare",
    "detach",
    "fsrl",
    "load_model",
    "load_triples",
    "reduce",
    "sae_ts",
    "serving",
    "top_contexts",
    "top_tokens",
]


def __getattr__(name: str) -> Any:
    if name in ("fsrl", "sae_ts", "serving"):
        return import_module(f"dspa.{name}")
    if name not in HOMES:
        raise AttributeError(f"module 'dspa' has no attribute {name!r}")
    return getattr(import_module(HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
