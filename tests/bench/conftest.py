"""Makes `bench` importable: it is part of the checkout and of no package."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))
