"""FSRL (arXiv 2509.12934): an adapter that moves the SAE features of a frozen model, trained on preferences."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dspa.data.rankings import Ranking
    from dspa.data.tokens import response_tokens
    from dspa.data.triples import load_rankings
    from dspa.errors import LabelError
    from dspa.evaluate.coherence import Coherence, compare_texts
    from dspa.evaluate.responses import Response, responses_of
    from dspa.evaluate.scores import Scores, score_responses, score_triples
    from dspa.fsrl.ablations import FractionCurve, MaskEffect, fraction_curve, mask_effect
    from dspa.fsrl.adapter import FSRLAdapter, Moves
    from dspa.fsrl.categories import CategoryShare, category_shares
    from dspa.fsrl.config import FSRLConfig, TrainingConfig
    from dspa.fsrl.results import HeldOut, HeldOutRankings, Sweep, held_out, held_out_rankings
    from dspa.fsrl.sweep import train_sweep
    from dspa.fsrl.training import read_held_out, train
    from dspa.fsrl.usage import Decay, Usage, fit_decay, latent_usage
    from dspa.saes.label_quality import Agreement, compare_labels
    from dspa.saes.labels import Labels, read_labels

# Modules of the names that are imported on first use: torch, scipy and what training needs are slow to import, and the
# command line reads the configs without them.
HOMES = {
    "Agreement": "dspa.saes.label_quality",
    "CategoryShare": "dspa.fsrl.categories",
    "Coherence": "dspa.evaluate.coherence",
    "Decay": "dspa.fsrl.usage",
    "FSRLAdapter": "dspa.fsrl.adapter",
    "FSRLConfig": "dspa.fsrl.config",
    "FractionCurve": "dspa.fsrl.ablations",
    "HeldOut": "dspa.fsrl.results",
    "HeldOutRankings": "dspa.fsrl.results",
    "LabelError": "dspa.errors",
    "Labels": "dspa.saes.labels",
    "MaskEffect": "dspa.fsrl.ablations",
    "Moves": "dspa.fsrl.adapter",
    "Ranking": "dspa.data.rankings",
    "Response": "dspa.evaluate.responses",
    "Scores": "dspa.evaluate.scores",
    "Sweep": "dspa.fsrl.results",
    "TrainingConfig": "dspa.fsrl.config",
    "Usage": "dspa.fsrl.usage",
    "category_shares": "dspa.fsrl.categories",
    "compare_labels": "dspa.saes.label_quality",
    "compare_texts": "dspa.evaluate.coherence",
    "fit_decay": "dspa.fsrl.usage",
    "fraction_curve": "dspa.fsrl.ablations",
    "held_out": "dspa.fsrl.results",
    "held_out_rankings": "dspa.fsrl.results",
    "latent_usage": "dspa.fsrl.usage",
    "load_rankings": "dspa.data.triples",
    "mask_effect": "dspa.fsrl.ablations",
    "read_held_out": "dspa.fsrl.training",
    "read_labels": "dspa.saes.labels",
    "response_tokens": "dspa.data.tokens",
    "responses_of": "dspa.evaluate.responses",
    "score_responses": "dspa.evaluate.scores",
    "score_triples": "dspa.evaluate.scores",
    "train": "dspa.fsrl.training",
    "train_sweep": "dspa.fsrl.sweep",
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
    "HeldOutRankings",
    "LabelError",
    "Labels",
    "MaskEffect",
    "Moves",
    "Ranking",
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
    "held_out_rankings",
    "latent_usage",
    "load_rankings",
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
    return getattr(import_module(HOMES[name]), name)
