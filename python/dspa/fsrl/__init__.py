"""FSRL (arXiv 2509.12934): an adapter that moves the SAE features of a frozen model, trained on preferences."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dspa.fsrl.adapter import FSRLAdapter, Moves
from dspa.fsrl.config import FSRLConfig

if TYPE_CHECKING:
    from dspa.fsrl.ablations import FractionCurve, MaskEffect, fraction_curve, mask_effect
    from dspa.fsrl.agreement import Agreement, compare_labels
    from dspa.fsrl.coherence import Coherence, compare_texts
    from dspa.fsrl.evaluate import Response, Scores, response_tokens, responses_of, score_responses, score_triples
    from dspa.fsrl.figures import HeldOut, held_out
    from dspa.fsrl.labels import CategoryShare, LabelError, Labels, category_shares, read_labels
    from dspa.fsrl.sweep import Sweep, train_sweep
    from dspa.fsrl.training import TrainingConfig, read_held_out, train
    from dspa.fsrl.usage import Decay, Usage, fit_decay, latent_usage

# Where names live that are imported when they are first asked for: scipy and what training needs are slow to import.
HOMES = {
    "Agreement": "agreement",
    "CategoryShare": "labels",
    "Coherence": "coherence",
    "Decay": "usage",
    "FractionCurve": "ablations",
    "HeldOut": "figures",
    "LabelError": "labels",
    "Labels": "labels",
    "MaskEffect": "ablations",
    "Response": "evaluate",
    "Scores": "evaluate",
    "Sweep": "sweep",
    "TrainingConfig": "training",
    "Usage": "usage",
    "category_shares": "labels",
    "compare_labels": "agreement",
    "compare_texts": "coherence",
    "fit_decay": "usage",
    "fraction_curve": "ablations",
    "held_out": "figures",
    "latent_usage": "usage",
    "mask_effect": "ablations",
    "read_held_out": "training",
    "read_labels": "labels",
    "response_tokens": "evaluate",
    "responses_of": "evaluate",
    "score_responses": "evaluate",
    "score_triples": "evaluate",
    "train": "training",
    "train_sweep": "sweep",
}

__all__ = [
    "Agreement",
    "CategoryShare",
    "Coherence",
    "Decay",
    "FSRLAdapter",
    "FSRLConfig",
    "FractionCurve",
    "HeldOut",
    "LabelError",
    "Labels",
    "MaskEffect",
    "Moves",
    "Response",
    "Scores",
    "Sweep",
    "TrainingConfig",
    "Usage",
    "category_shares",
    "compare_labels",
    "compare_texts",
    "fit_decay",
    "fraction_curve",
    "held_out",
    "latent_usage",
    "mask_effect",
    "read_held_out",
    "read_labels",
    "response_tokens",
    "responses_of",
    "score_responses",
    "score_triples",
    "train",
    "train_sweep",
]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'dspa.fsrl' has no attribute {name!r}")
    return getattr(import_module(f"dspa.fsrl.{HOMES[name]}"), name)
