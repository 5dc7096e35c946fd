"""Set-up that all tests share."""

from __future__ import annotations

import collections
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
EMULATED = ROOT / "build" / "emulated"
# Files that compile for minutes and print nothing meanwhile, and their places in the order in which files are started.
# Of two processes, the other one shows progress from the start, and compiles before the end.
COMPILING = {"kernels/test_compiled.py": 0, "csrc/test_compiled.py": 2}

# Without a GPU, Triton kernels run in Triton's interpreter, and those of csrc/ in a library that emulates one. Both
# have to be chosen before they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("DSPA_TESTS_EMULATED_CUDA", str(EMULATED / "libdspa_emulated.so"))

# The readline library exports the size of a terminal to the processes that pytest starts. A console of rich would keep
# that width from its import on, and tests choose their own.
os.environ.pop("COLUMNS", None)


def pytest_configure(config: pytest.Config) -> None:
    """Have xdist hand out files in the order of `pytest_collection_modifyitems`, not those of most tests first."""
    config.option.loadscopereorder = False


def pytest_sessionstart(session: pytest.Session) -> None:
    """Compile the emulated library, before any of the processes that share the tests looks for it."""
    config = session.config
    if not torch.cuda.is_available() and not hasattr(config, "workerinput") and not config.option.collectonly:
        command = [sys.executable, str(ROOT / "csrc" / "build.py"), "--emulated", "--out", str(EMULATED)]
        built = subprocess.run(command, capture_output=True, text=True)
        if built.returncode:
            pytest.exit(f"csrc/ does not compile for the CPU:\n{built.stdout}{built.stderr}", returncode=1)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Order the files for several processes: those that compile at their places, the others by their number of tests.

    `--dist loadfile` hands out files in this order. A file of few but slow tests that came last would leave all
    processes but one without work, and the screen still, until it is done.
    """
    if not hasattr(config, "workerinput"):
        return
    n_tests = collections.Counter(item.path for item in items)
    files = [path for path, _ in n_tests.most_common()]
    for name, place in COMPILING.items():
        path = ROOT / "tests" / name
        if path in n_tests:
            files.remove(path)
            files.insert(place, path)
    items.sort(key=lambda item: files.index(item.path))


def pytest_deselected(items: list[pytest.Item]) -> None:
    """Count what an xdist worker deselects, of which xdist itself does not inform the process that reports."""
    output = getattr(items[0].config, "workeroutput", None) if items else None
    if output is not None:
        output["n_deselected"] = output.get("n_deselected", 0) + len(items)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Have the summary line show what the workers deselected, once, since all deselect the same."""
    n_deselected = (getattr(node, "workeroutput", None) or {}).get("n_deselected", 0)
    reporter = node.config.pluginmanager.get_plugin("terminalreporter")
    if reporter and n_deselected:
        # Plugins look for attributes of what is listed.
        reporter.stats.setdefault("deselected", [SimpleNamespace()] * n_deselected)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Use one thread: on tensors as small as those of the tests, threads only wait for each other."""
    torch.set_num_threads(1)
