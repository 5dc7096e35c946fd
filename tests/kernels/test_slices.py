"""Sliced arguments compile no kernel that whole ones do not need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_sliced_arguments_compile_nothing_new() -> None:
    """A compilation in the middle of decoding takes seconds."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.slices"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    calls = json.loads(done.stdout)
    assert len(calls) == 12
    for op, whole, all_kernels in calls:
        assert whole and all_kernels == whole, op
