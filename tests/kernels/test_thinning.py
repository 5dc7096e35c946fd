"""The cases of large grids that run where Triton's kernels are interpreted.

Run as a program, it writes the parameters of all tests of this folder, and which of them are deselected.
"""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.thinning import LARGE, PUBLISHED, SHARE, Case, thinned

ROOT = Path(__file__).parents[2]
Parameters = dict[str, str]


class Recorder:
    """Record the parameters of the tests that are kept and of those that are deselected, by grid."""

    def __init__(self) -> None:
        self.grids: dict[str, dict[str, list[Parameters]]] = collections.defaultdict(
            lambda: {"kept": [], "left out": []}
        )

    def record(self, items: list[Any], what: str) -> None:
        for item in items:
            if hasattr(item, "callspec"):
                values = {name: repr(value) for name, value in item.callspec.params.items()}
                self.grids[item.nodeid.partition("[")[0]][what].append(values)

    def pytest_deselected(self, items: list[Any]) -> None:
        self.record(items, "left out")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.record(session.items, "kept")


@pytest.fixture(scope="module")
def grids(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[Parameters]]]:
    """The grids of this folder that are thinned without a GPU, as another process collects them."""
    output = tmp_path_factory.mktemp("grids") / "grids.json"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "DSPA_ALL_CASES": "0", "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "tests.kernels.test_thinning", str(output)]
    collected = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert collected.returncode == 0, collected.stdout + collected.stderr
    grids: dict[str, dict[str, list[Parameters]]] = json.loads(output.read_text())
    return {name: grid for name, grid in grids.items() if grid["left out"]}


def values(cases: list[Parameters]) -> set[tuple[str, str]]:
    return {pair for case in cases for pair in case.items()}


def test_every_value_is_still_run(grids: dict[str, dict[str, list[Parameters]]]) -> None:
    assert len(grids) >= 5
    for name, grid in grids.items():
        kept = [case for case in grid["kept"] if case["backend"] == "'triton'"]
        assert values(grid["left out"]) <= values(kept), name


def test_published_settings_are_kept(grids: dict[str, dict[str, list[Parameters]]]) -> None:
    texts = {name: repr(value) for name, value in PUBLISHED.items()}
    n_grids: collections.Counter[str] = collections.Counter()
    for name, grid in grids.items():
        published = texts.items() & values(grid["kept"] + grid["left out"])
        n_grids.update(parameter for parameter, _ in published)
        assert not any(published <= case.items() for case in grid["left out"]), name
    assert {"alpha", "mode", "dtypes"} <= n_grids.keys()


def test_only_large_grids_of_triton_are_thinned(grids: dict[str, dict[str, list[Parameters]]]) -> None:
    for name, grid in grids.items():
        assert {case["backend"] for case in grid["left out"]} == {"'triton'"}, name
        cases = [case for case in grid["kept"] + grid["left out"] if case["backend"] == "'triton'"]
        assert len(cases) > LARGE and len(grid["left out"]) > len(cases) / 2, name


def grid_of(**parameters: list[Any]) -> list[Case]:
    """A grid of a test whose last parameter varies fastest."""
    cases: list[dict[str, Any]] = [{}]
    for name, choices in parameters.items():
        cases = [{**case, name: value} for case in cases for value in choices]
    return [Case(f"test[{'-'.join(map(str, case.values()))}]", case) for case in cases]


@pytest.mark.parametrize("n", [2, 3, 4, 8])
def test_no_period_decides(n: int) -> None:
    """A choice by counting keeps one value of the fastest parameter, where that has 2 or 4."""
    cases = grid_of(slow=list(range(8)), middle=list(range(8)), fast=list(range(n)))
    kept = [case for case in cases if case.name in thinned(cases)]
    n_cases = collections.Counter(case.parameters["fast"] for case in kept)
    assert len(n_cases) == n and max(n_cases.values()) < 2 * len(kept) / n
    assert len(cases) / SHARE / 2 < len(kept) < len(cases) / SHARE * 2


def test_a_value_of_one_case_is_run() -> None:
    """Values that the rank alone would lose: of 41 values that stand in one case each, it keeps a quarter."""
    cases = [*grid_of(a=[0], b=list(range(41)))]
    assert thinned(cases) == {case.name for case in cases}


def test_the_choice_follows_the_names_alone() -> None:
    cases = grid_of(alpha=[0.2, 3], kind=list("abcde"), n=list(range(9)))
    assert thinned(cases) == thinned(cases[::-1])
    kept = [case for case in cases if case.name in thinned(cases)]
    assert sum(case.parameters["alpha"] == 0.2 for case in kept) == 45 < len(kept) < 70


if __name__ == "__main__":
    recorder = Recorder()
    status = pytest.main(["tests/kernels", "--collect-only", "-q", "-p", "no:cacheprovider"], plugins=[recorder])
    Path(sys.argv[1]).write_text(json.dumps(recorder.grids))
    sys.exit(status)
