"""FSRL (arXiv 2509.12934): an adapter that moves the SAE features of a frozen model, trained on preferences."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dspa.fsrl.adapter import FSRLAdapter, Moves
from dspa.fsrl.config import FSRLConfig

if TYPE_CHECKING:
    from dspa.fsrl.evaluate import Scores, score_triples

# Where names live that are imported when they are first asked for: scipy and what training needs are slow to import.
HOMES = {
    "Scores": "evaluate",
    "score_triples": "evaluate",
}

__all__ = ["FSRLAdapter", "FSRLConfig", "Moves", "Scores", "score_triples"]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'dspa.fsrl' has no attribute {name!r}")
    return getattr(import_module(f"dspa.fsrl.{HOMES[name]}"), name)
