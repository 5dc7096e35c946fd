"""The `measure` fixture, and the file that results are written to."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bench import report
from bench.harness import results
from bench.harness.cases import Case, timed
from bench.harness.machine import describe
from bench.harness.measure import DEVICE, Stopwatch
from dspa_kernels import BackendError

Measure = Callable[[Case], None]
RECORD = pytest.StashKey["Record"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, default=Path(__file__).parent / "results", help="folder of results")
    parser.addoption("--commit", default="", help="the commit that is measured, where git does not know it")


class Record:
    """The results of this run and their file."""

    def __init__(self, folder: Path, commit: str) -> None:
        run = describe(commit)
        self.results: list[dict[str, Any]] = []
        self.path = report.path_of(folder, run)
        self.path.unlink(missing_ok=True)
        results.append(self.path, {"run": run})

    def add(self, result: dict[str, Any]) -> None:
        self.results.append(result)
        results.append(self.path, result)


@pytest.fixture(scope="session")
def stopwatch() -> Stopwatch:
    return Stopwatch()


@pytest.fixture(scope="session")
def record(pytestconfig: pytest.Config, stopwatch: Stopwatch) -> Record:
    record = Record(pytestconfig.getoption("--results"), pytestconfig.getoption("--commit"))
    record.add(stopwatch.ceilings())
    pytestconfig.stash[RECORD] = record
    return record


@pytest.fixture
def measure(request: pytest.FixtureRequest, stopwatch: Stopwatch, record: Record) -> Measure:
    """Checks and times a case, and records the result."""
    plugin = request.config.pluginmanager.hasplugin("benchmark")
    benchmark = partial(request.getfixturevalue, "benchmark") if plugin else None

    def run(case: Case) -> None:
        try:
            record.add(timed(case, stopwatch, benchmark))
        except BackendError as error:
            pytest.skip(str(error))

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    record = config.stash.get(RECORD, None)
    if record:
        where = "on the GPU" if DEVICE.type == "cuda" else "on the CPU, which says nothing about a GPU"
        terminalreporter.section(f"microseconds per step, {where}")
        terminalreporter.write_line(report.plain(record.results))
        terminalreporter.write_line(str(record.path))
