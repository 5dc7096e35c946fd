"""How much the tests of this folder draw, and a record of what they did.

DSPA_SOAK multiplies the numbers of inputs, kills and calls, and draws others in each run; `make soak` sets it. Without
it, as in the gate, they are few and the same each time.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from pathlib import Path

import pytest

TIMES = int(os.environ.get("DSPA_SOAK", "0"))
SEED = time.time_ns() if TIMES else 0
REPORT = Path("build") / "soak.json"

_done: Counter[str] = Counter()
_started = time.monotonic()


@pytest.fixture(scope="session")
def done() -> Counter[str]:
    """Numbers of inputs, kills and calls by name, for the summary."""
    return _done


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what was done, and write it to a file if DSPA_SOAK is set."""
    if not _done:
        return
    figures = dict(sorted(_done.items())) | {"hours": round((time.monotonic() - _started) / 3600, 2), "seed": SEED}
    terminalreporter.section("soak")
    for name, figure in figures.items():
        terminalreporter.write_line(f"{name}: {figure}")
    if TIMES:
        REPORT.parent.mkdir(exist_ok=True)
        REPORT.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
