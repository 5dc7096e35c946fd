"""What all tests share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
EMULATED = ROOT / "build" / "emulated"

# Without a GPU, Triton kernels run in Triton's interpreter, and those of csrc/ in a library that emulates one. Both
# have to be chosen before they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("DSPA_CUDA_EMULATED", str(EMULATED / "libdspa_emulated.so"))


def pytest_sessionstart(session: pytest.Session) -> None:
    """Compile that library, before any of the processes that share the tests looks for it."""
    if not torch.cuda.is_available() and not hasattr(session.config, "workerinput"):
        command = [sys.executable, str(ROOT / "csrc" / "build.py"), "--emulated", "--out", str(EMULATED)]
        built = subprocess.run(command, capture_output=True, text=True)
        if built.returncode:
            pytest.exit(f"csrc/ does not compile for the CPU:\n{built.stdout}{built.stderr}", returncode=1)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """On tensors as small as those of the tests, threads only wait for each other."""
    torch.set_num_threads(1)
