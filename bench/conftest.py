"""The `measure` fixture, and the file that results are written to."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import report
from bench.harness.cases import SHAPES, activity_of
from bench.harness.machine import describe
from bench.harness.measure import DEVICE, ROUNDS, Step, Stopwatch
from dspa_kernels.testing import Activity

Measure = Callable[..., None]
RECORD = pytest.StashKey["Record"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, default=Path(__file__).parent / "results", help="folder of results")
    parser.addoption("--commit", default="", help="the commit that is measured, where git does not know it")


class Record:
    """The results of this run, written after each one, so that a run that is stopped leaves what it has."""

    def __init__(self, folder: Path, commit: str, stopwatch: Stopwatch) -> None:
        self.run = describe(commit) | {
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "read_gb_s": 1e-9 * stopwatch.read_bandwidth,
            "read_way": stopwatch.read_way,
            "matmul_tflop_s": 1e-12 * stopwatch.matmul_rate,
            "results": [],
        }
        self.path = report.path_of(folder, self.run)

    def add(self, result: dict[str, Any]) -> None:
        self.run["results"].append(result)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.run, indent=1) + "\n")


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def stopwatch() -> Stopwatch:
    return Stopwatch()


@pytest.fixture(scope="session")
def record(pytestconfig: pytest.Config, stopwatch: Stopwatch) -> Record:
    pytestconfig.stash[RECORD] = Record(
        pytestconfig.getoption("--results"), pytestconfig.getoption("--commit"), stopwatch
    )
    return pytestconfig.stash[RECORD]


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def activity(request: pytest.FixtureRequest) -> Activity:
    return activity_of(request.param)


@pytest.fixture
def measure(request: pytest.FixtureRequest, stopwatch: Stopwatch, record: Record) -> Measure:
    """Times steps and records the result under labels; `n_bytes` and `n_flops` are those of a mean step."""
    plugin = request.config.pluginmanager.hasplugin("benchmark")
    benchmark = request.getfixturevalue("benchmark") if plugin else None

    def run(
        steps: Sequence[Step],
        *,
        capture: bool = True,
        n_bytes: float | None = None,
        n_flops: float | None = None,
        **labels: Any,
    ) -> None:
        on_device = stopwatch.device(steps) if capture and DEVICE.type == "cuda" else None
        wall = stopwatch.wall(steps, max(ROUNDS, min(len(steps), 32)), benchmark)
        seconds = 1e-6 * (on_device or wall).median
        result = {**labels, "device_us": on_device and asdict(on_device), "wall_us": asdict(wall)}
        if n_bytes is not None:
            result |= {"bytes": n_bytes, "gb_s": 1e-9 * n_bytes / seconds}
            result["of_read_ceiling"] = n_bytes / seconds / stopwatch.read_bandwidth
        if n_flops is not None:
            result |= {"flops": n_flops, "of_matmul_rate": n_flops / seconds / stopwatch.matmul_rate}
        record.add(result)

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    record = config.stash.get(RECORD, None)
    if record and record.run["results"]:
        where = "on the GPU" if DEVICE.type == "cuda" else "on the CPU, which says nothing about a GPU"
        terminalreporter.section(f"microseconds per step, {where}")
        terminalreporter.write_line(report.plain(record.run["results"]))
        terminalreporter.write_line(str(record.path))
