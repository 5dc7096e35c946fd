"""FSRL (arXiv 2509.12934): an adapter that moves the SAE features of a frozen model, trained on preferences."""

from dspa.fsrl.adapter import FSRLAdapter, Moves
from dspa.fsrl.config import FSRLConfig

__all__ = ["FSRLAdapter", "FSRLConfig", "Moves"]
