"""The index arithmetic that kernels and host share, csrc/schedule.h, over every supported shape."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# An overflow of an index ends the program, without a library for it.
FLAGS = "-std=c++17 -O1 -Wall -Wextra -Werror -fsanitize=undefined -fsanitize-undefined-trap-on-error"


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """schedule_test.cpp; that it compiles is what csrc/supported.h asserts."""
    path = tmp_path_factory.mktemp("schedule") / "schedule_test"
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    source = Path(__file__).with_name("schedule_test.cpp")
    subprocess.run([*compiler, *shlex.split(FLAGS), "-I", str(ROOT / "csrc"), str(source), "-o", str(path)], check=True)
    return path


@pytest.mark.parametrize("check", ["tiles", "order", "ring", "layout", "stages", "grid_barrier"])
def test_schedule(check: str, program: Path) -> None:
    done = subprocess.run([str(program), check], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
