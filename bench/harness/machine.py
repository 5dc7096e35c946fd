"""The machine and the versions that a result was measured with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from dspa_kernels.cuda_library import EMULATED

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "triton", "transformers", "sae-lens", "numpy")
CLOCKS = "clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,power.limit,temperature.gpu,driver_version"


def output_of(*command: str) -> str:
    """Return the output of a command, empty if it does not exist or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def clocks() -> dict[str, str]:
    """The present clocks of the first GPU; empty if they cannot be read."""
    values = output_of("nvidia-smi", "-i", "0", f"--query-gpu={CLOCKS}", "--format=csv,noheader").split(", ")
    names = CLOCKS.split(",")
    return dict(zip(names, values, strict=True)) if len(values) == len(names) else {}


def describe(commit: str) -> dict[str, Any]:
    """Commit (from git, otherwise `commit`), date, versions and device, which is the CPU if that emulates kernels."""
    gpu = torch.cuda.is_available() and not EMULATED and os.environ.get("TRITON_INTERPRET") != "1"
    # Results that are written into the tree while it is measured do not change what is measured.
    changes = ("git", "status", "--porcelain", "--untracked-files=no")
    known = output_of("git", "rev-parse", "--short=12", "HEAD")
    return {
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "capability": list(torch.cuda.get_device_capability()) if gpu else None,
        "host": platform.processor() or platform.machine(),
        "commit": known or commit or "unknown",
        "dirty": bool(output_of(*changes)) if known else None,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "cuda": torch.version.cuda if gpu else None,
        "versions": {package: version_of(package) for package in PACKAGES},
        "clocks": clocks() if gpu else {},
    }
