"""The stages of a call, in the order of what matters most. Times are seconds on an H200 with 16 cores."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

# The kernels of `steer`, as in bench/harness/cases.py, which would import torch.
KERNELS = ("triton", "cuda", "cuda-ahead", "cuda-programmatic")
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
# A sanitizer needs registers itself, so that a grid of the usual size may not fit.
SMALL = ("-m", "bench.checks.every_kernel", "--programs", "16", "--rows", "1", "19")


@dataclass(frozen=True)
class Stage:
    """A part of a call. Each of its jobs is a process.

    Attributes:
        name: name of the stage.
        needs: seconds that it is expected to take; it is not started with less left.
        limit: seconds after which it is ended.
        silence: seconds without output after which a job counts as hung.
        jobs: names of the processes, which run at the same time.
        command: the command of a job; by default the program of bench/device/stages.py.
        tool: a program that it cannot run without.
        resumes: its program announces its cases, and takes --after and --without to leave out some.
    """

    name: str
    needs: float
    limit: float
    silence: float = 25
    jobs: tuple[str, ...] = ("",)
    command: Callable[[str], list[str]] | None = field(default=None, repr=False)
    tool: str = ""
    resumes: bool = True

    def obstacle(self) -> str:
        """Return why it cannot run here, empty if it can."""
        return f"{self.tool} is not on PATH" if self.tool and not shutil.which(self.tool) else ""


def sanitizer(job: str) -> list[str]:
    """Return the command of a job "tool kernel", or "tool kernel N" for N checks."""
    tool, kernel, *some = job.split()
    command = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
    return [
        *command,
        sys.executable,
        *SMALL,
        "--backends",
        kernel,
        *(["--only", "steer", "--some", *some] if some else []),
    ]


def every_op(kernel: str) -> list[str]:
    return [sys.executable, "-m", "bench.checks.every_kernel", "--backends", kernel]


PARTS = tuple(map(str, range(max(1, (os.cpu_count() or 1) - 2))))

# Versions, clocks, and the CUDA library, which is compiled if there is none that loads.
MACHINE = Stage("machine", needs=10, limit=150, silence=140)
# First calls of all cases of this call, so that Triton's cache has what they need.
COMPILE = Stage("compile", needs=30, limit=75, silence=60, jobs=PARTS)
# Cases against the reference, untimed.
SMOKE = Stage("smoke", needs=40, limit=60, jobs=KERNELS)
# Graph replays, streams, and the bits of rows in any batch.
BITS = Stage("bits", needs=25, limit=45, jobs=KERNELS)
# At 2304 x 16384: bare reads and launches of the same size, whole encoder, fixed costs.
STREAM = Stage("stream", needs=45, limit=90)
# Whole encoder and realistic steps at 4096 x 65536.
WIDE = Stage("wide", needs=45, limit=90)
# Realistic steps at 2304 x 16384, with and without the screen.
MEAN = Stage("mean", needs=30, limit=60)
# `activation_counts` and `activation_sums`.
COUNTS = Stage("counts", needs=15, limit=40)
# The same step in plain PyTorch and in SAELens, eager and compiled.
DENSE = Stage("dense", needs=45, limit=90, silence=60)
# Encode, decode and call of an SAE at 1 and 4096 rows, of this package and of SAELens, eager and compiled.
SAE = Stage("sae", needs=65, limit=110, silence=60)
# Decoding with a whole model, captured by hand, then in generate().
GENERATE = Stage("generate", needs=100, limit=160, silence=150)
# Decoding and training steps under an adapter.
FSRL = Stage("fsrl", needs=60, limit=100, silence=60)
CHECKED = ("memcheck triton 6", "memcheck cuda 6", "racecheck cuda 6")
MEMORY = Stage("memory", 70, 100, 60, CHECKED, sanitizer, "compute-sanitizer", resumes=False)
# Nsight Compute on a step that reads the whole encoder.
NCU = Stage("ncu", needs=50, limit=90, silence=60, jobs=("triton", "cuda"), tool="ncu", resumes=False)
# A handful of launch parameters for `steer`.
TUNE = Stage("tune", needs=60, limit=100, silence=60)

# Calls, with the seconds of each.
CALLS = {
    "A": (240.0, (MACHINE, COMPILE, SMOKE, BITS, STREAM, WIDE, MEAN, COUNTS)),
    "B": (430.0, (MACHINE, COMPILE, DENSE, SAE, GENERATE, FSRL, MEMORY, NCU)),
}
# What takes longer than a call, or fits into neither.
SANITIZE = tuple(f"{tool} {kernel}" for tool in SANITIZERS for kernel in KERNELS)
LONG = (
    TUNE,
    Stage("ops", 0, 3600, 300, KERNELS, every_op, resumes=False),
    Stage("stress", 0, 3600, 300, KERNELS),
    Stage("sanitize", 0, 3600, 600, SANITIZE, sanitizer, "compute-sanitizer", resumes=False),
)
STAGES = {stage.name: stage for stage in (*CALLS["A"][1], *CALLS["B"][1], *LONG)}


def call(name: str) -> tuple[float, tuple[Stage, ...]]:
    """Return the seconds and the stages of a call, or of a single stage by its name."""
    if name in CALLS:
        return CALLS[name]
    stages = (STAGES[name],) if name == MACHINE.name else (MACHINE, STAGES[name])
    return float("inf"), stages


def command(stage: Stage, job: str, call: str, results: Path, commit: str, rehearse: bool) -> list[str]:
    """Return the command of a job."""
    if stage.command:
        return stage.command(job)
    program = [sys.executable, "-m", "bench.device.stages", stage.name, "--job", job, "--call", call]
    return [*program, "--results", str(results), "--commit", commit, *(["--rehearse"] if rehearse else [])]
