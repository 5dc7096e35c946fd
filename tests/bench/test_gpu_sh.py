"""`bench/gpu.sh` with stand-ins for every program that it starts."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "gpu.sh"
STAGES = ("build", "check", "sanitize", "stress", "bench", "generate", "train", "profile", "tune", "tune_cuda")
# Records how it was called, builds a library if asked to, and fails where $FAIL matches.
STAND_IN = """#!/usr/bin/env bash
echo "$(basename "$0") $* [$TORCH_CUDA_ARCH_LIST]" >>"$CALLS"
case "$*" in
*get_device_capability*) echo 9.0a ;;
csrc/build.py*) mkdir -p build/csrc && echo new >build/csrc/libdspa_kernels.so ;;
esac
[ -z "$DSPA_CUDA_EMULATED$TRITON_INTERPRET$DSPA_BACKEND" ] || exit 9
case "$*" in $FAIL) exit 3 ;; esac
"""
LIBRARY = "dspa_kernels/libdspa_kernels.so"


class Tree:
    """A source tree with the script, and what it called."""

    def __init__(self, root: Path) -> None:
        self.root, self.programs = root, root / "programs"
        for folder in ("bench", "dspa_kernels", "programs"):
            (root / folder).mkdir()
        shutil.copy(SCRIPT, root / "bench")
        for name in ("python3", "compute-sanitizer", "ncu"):
            (self.programs / name).write_text(STAND_IN)
            (self.programs / name).chmod(0o755)

    def run(self, *arguments: str, fail: str = "", **variables: str) -> tuple[int, str, list[str]]:
        calls = self.root / "calls"
        calls.write_text("")
        environment = {
            "PATH": f"{self.programs}:{os.environ['PATH']}", "CALLS": str(calls), "FAIL": fail,
            "TORCH_CUDA_ARCH_LIST": "", "DSPA_CUDA_EMULATED": "a library", "TRITON_INTERPRET": "1", "DSPA_BACKEND": "",
        } | variables  # fmt: skip
        command = ["bash", self.root / "bench" / "gpu.sh", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=self.root, check=False)
        return done.returncode, done.stdout + done.stderr, calls.read_text().splitlines()


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_what_it_names_exists() -> None:
    text = SCRIPT.read_text()
    paths = re.findall(r"\b(?:tests|csrc|bench)/[\w/]+(?:\.\w+)?", text.replace("build/csrc", ""))
    modules = [module.replace(".", "/") + ".py" for module in re.findall(r"-m (bench[\w.]+)", text)]
    assert {"tests/kernels", "bench/offline/fsrl.py"} <= {*paths, *modules}
    for path in (*paths, *modules):
        assert (ROOT / path).exists(), path


def test_usage_lists_the_stages(tree: Tree) -> None:
    for arguments in ((), ("check",), ("everything", "out")):
        code, text, calls = tree.run(*arguments)
        assert code == 2 and [line.split()[0] for line in text.splitlines() if line.startswith("  ")] == [
            *STAGES,
            "all",
        ]
        assert not [call for call in calls if "bench" in call]


def test_without_a_device_it_says_so_at_once(tree: Tree) -> None:
    code, text, calls = tree.run("check", "out", fail="*is_available*")
    assert (code, text) == (2, "bench/gpu.sh needs a CUDA device, and torch finds none\n") and len(calls) <= 2


def test_all_runs_everything_and_builds_first(tree: Tree) -> None:
    code, text, calls = tree.run("all", "out")
    assert code == 0 and text.endswith("== all succeeded: all\n")
    names = [line.split()[1].rstrip(":") for line in text.splitlines() if ": status 0" in line]
    ran = list(dict.fromkeys(next(stage for stage in reversed(STAGES) if name.startswith(stage)) for name in names))
    assert ran == list(STAGES)
    assert [call for call in calls if "csrc" in call] == ["python3 csrc/build.py --out build/csrc [9.0a]"]
    for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
        for kernel in ("triton", "cuda", "cuda-ahead", "cuda-programmatic"):
            assert (tree.root / "out" / f"sanitize-{tool}-{kernel}.log").is_file()
    assert (tree.root / "out" / "profile-3584x16384-cuda.csv").is_file()


def test_a_stage_builds_if_there_is_no_library(tree: Tree) -> None:
    library = tree.root / LIBRARY
    for built in (True, False):
        code, _, calls = tree.run("stress", "out", "--only", "chained")
        assert code == 0 and library.read_text() == "new\n"
        assert any("csrc/build.py" in call for call in calls) == built
        assert sum("bench.checks.stress" in call and "--only chained" in call for call in calls) == 4
    library.write_text("old")
    _, _, calls = tree.run("build", "out", TORCH_CUDA_ARCH_LIST="8.0")
    assert library.read_text() == "new\n" and any("csrc/build.py" in call and "[8.0]" in call for call in calls)


def test_a_failure_is_reported_and_the_rest_runs(tree: Tree) -> None:
    (tree.root / LIBRARY).write_text("old")
    code, text, calls = tree.run("all", "out", fail="csrc/build.py*")
    assert code == 1 and "== FAILED: build (3)\n" in text
    assert not (tree.root / LIBRARY).exists() and any("bench.tuning.cuda" in call for call in calls)
    (tree.programs / "ncu").unlink()
    code, text, _ = tree.run("profile", "out")
    assert code == 1 and "== FAILED: profile-2304x16384-triton-record (127)" in text


def test_cuda_is_compared_with_what_was_tuned(tree: Tree) -> None:
    for table in (False, True):
        _, _, calls = tree.run("tune_cuda", "out")
        assert any("--launch-table" in call for call in calls) == table
        (tree.root / "out" / "launch_table.json").touch()
