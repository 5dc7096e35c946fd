"""`bench/gpu.sh` with a stand-in for Python."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from bench.device import plan

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu.sh"
# Records how it was called and with which environment, and fails where $FAIL matches.
STAND_IN = """#!/usr/bin/env bash
echo "$* [$DSPA_TESTS_EMULATED_CUDA$TRITON_INTERPRET$DSPA_BACKEND] $PYTHONPATH" >>"$CALLS"
for folder in ${PYTHONPATH//:/ }; do
    [ -f "$folder/dspa_kernels-0.dist-info/METADATA" ] && echo "metadata" >>"$CALLS"
done
case "$*" in $FAIL) exit 3 ;; esac
"""


class Tree:
    """A source tree with the script, and what it called."""

    def __init__(self, root: Path) -> None:
        self.root, self.python, self.caller = root, root / "my python", root / "a folder"
        (root / "bench").mkdir()
        self.caller.mkdir()
        shutil.copy(SCRIPT, root / "bench")
        self.python.write_text(STAND_IN)
        self.python.chmod(0o755)

    def run(self, *arguments: str, fail: str = "nothing") -> tuple[int, str, list[str]]:
        calls = self.root / "calls"
        calls.write_text("")
        environment = {"PATH": os.environ["PATH"], "CALLS": str(calls), "FAIL": fail, "PYTHON": str(self.python)}
        environment |= {"DSPA_TESTS_EMULATED_CUDA": "a library", "TRITON_INTERPRET": "1", "DSPA_BACKEND": "reference"}
        command = ["bash", "../bench/gpu.sh", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=self.caller, check=False)
        return done.returncode, done.stdout + done.stderr, calls.read_text().splitlines()


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


@pytest.mark.parametrize("arguments", [(), ("A",), ("A", "")])
def test_usage(tree: Tree, arguments: tuple[str, ...]) -> None:
    code, text, calls = tree.run(*arguments)
    assert code == 2 and not calls
    of = {line.split()[0]: line.partition("minutes")[2].split() for line in text.splitlines() if line.startswith("  ")}
    for name, (_, stages) in plan.CALLS.items():
        assert of[name] == [stage.name for stage in stages]
    assert all(stage.name in text for stage in plan.LONG)


def test_the_kernels_are_measured_and_no_emulation(tree: Tree) -> None:
    code, _, calls = tree.run("A", "/out", "--commit", "abc")
    assert code == 0 and calls[-1] == "-m bench.device A /out --commit abc [] .:python"


def test_the_results_are_where_the_caller_is(tree: Tree) -> None:
    _, _, calls = tree.run("A", "out/a", "--rehearse")
    assert calls[-1].startswith(f"-m bench.device A {tree.caller}/out/a --rehearse [")


def test_metadata_stands_in_for_an_installation(tree: Tree) -> None:
    _, _, calls = tree.run("A", "out", fail="*importlib.metadata*")
    assert calls[-1] == "metadata" and "-m bench.device A " in calls[-2]
    folder = calls[-2].rpartition(":")[2]
    assert not Path(folder).exists()


def test_its_status_is_that_of_the_call(tree: Tree) -> None:
    assert tree.run("A", "out", fail="*bench.device*")[0] == 3
