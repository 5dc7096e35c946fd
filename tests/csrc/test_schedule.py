"""csrc/schedule.h, the index arithmetic that kernels and host share, for every supported shape."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# The program traps if an index overflows, without a sanitizer library.
FLAGS = "-std=c++17 -O1 -Wall -Wextra -Werror -fsanitize=undefined -fsanitize-undefined-trap-on-error"


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile schedule_test.cpp, which also checks the assertions of csrc/supported.h."""
    path = tmp_path_factory.mktemp("schedule") / "schedule_test"
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    source = Path(__file__).with_name("schedule_test.cpp")
    subprocess.run([*compiler, *shlex.split(FLAGS), "-I", str(ROOT / "csrc"), str(source), "-o", str(path)], check=True)
    return path


@pytest.mark.parametrize("check", ["tiles", "order", "pipeline", "layout", "stages", "grid_barrier"])
def test_schedule(check: str, program: Path) -> None:
    done = subprocess.run([str(program), check], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
