"""The program of a stage's process: `python -m bench.device.stages STAGE --results FILE`.

It announces each case before it begins, so that whoever watches it knows where it hangs, and appends a line of results
after it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import tuning
from bench.device import plan
from bench.device.watch import LOST, SOME_FAILED
from bench.harness import results
from bench.harness.cases import FEW_ROWS, KERNELS, ON_GPU, ROWS, SCREEN, SHAPES, Case, timed
from bench.harness.machine import ROOT, describe
from bench.harness.measure import Stopwatch, synchronize
from bench.ops import counts, fsrl, read, saes, steer, stress
from dspa_kernels import BackendError, cuda_library

FIRST, LAST = SHAPES[0], SHAPES[min(2, len(SHAPES) - 1)]
STREAM_ROWS = [n for n in (1, 64, 8, 16, 32) if n in ROWS]


def stream() -> Iterator[Case]:
    yield from read.cases(FIRST)
    yield from steer.cases(["stream"], KERNELS, FIRST, STREAM_ROWS)
    yield from steer.cases(steer.FIXED, KERNELS, FIRST, FEW_ROWS)


def wide() -> Iterator[Case]:
    yield from read.cases(LAST)
    yield from steer.cases(["stream", "hard", f"hard, {SCREEN}"], KERNELS, LAST, FEW_ROWS)


def mean() -> Iterator[Case]:
    yield from steer.cases(["hard", f"hard, {SCREEN}"], KERNELS, FIRST, [n for n in (1, 64, 8) if n in ROWS])


def dense() -> Iterator[Case]:
    yield from steer.cases((*steer.EAGER, *steer.COMPILED), ["torch"], FIRST, FEW_ROWS)
    yield from steer.cases(steer.EAGER, ["torch"], LAST, FEW_ROWS)


def sae() -> Iterator[Case]:
    yield from saes.cases(saes.OURS, ["triton"], FIRST)
    yield from saes.cases((*saes.OF_SAE_LENS, saes.EAGER, saes.COMPILED), ["torch"], FIRST)


def generate() -> Iterator[Case]:
    # transformers takes seconds to import, and no other stage needs it.
    from bench.ops import generate

    yield from generate.cases(generate.BATCHES[:1])


def adapters() -> Iterator[Case]:
    yield from fsrl.cases(["triton", "torch"], FIRST, FEW_ROWS)
    yield from fsrl.training(FIRST)


def tune() -> Iterator[Case]:
    yield from tuning.cases(FIRST)


def smoke() -> Iterator[Case]:
    names = ("stream", "stream, top-k", "hard", f"hard, {SCREEN}", *steer.FIXED)
    yield from steer.cases(names, KERNELS, FIRST, [n for n in (1, 8, 64) if n in ROWS])


def bits() -> Iterator[Case]:
    yield from stress.cases(KERNELS, FIRST, turns=500 if ON_GPU else 2)


def thorough() -> Iterator[Case]:
    for shape in SHAPES:
        yield from stress.cases(KERNELS, shape, turns=10_000, thorough=True)


CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "smoke": smoke,
    "bits": bits,
    "stream": stream,
    "wide": wide,
    "mean": mean,
    "counts": lambda: counts.cases(["triton", "torch"], FIRST),
    "dense": dense,
    "sae": sae,
    "generate": generate,
    "fsrl": adapters,
    "tune": tune,
    "stress": thorough,
}
BUILD = (sys.executable, "csrc/build.py")
# Stages that only compare. Each of their jobs has one kernel.
CHECKED = ("smoke", "bits", "stress")


def check(case: Case) -> dict[str, Any]:
    with case.steps() as steps:
        steps.check()
        synchronize()
    return {**case.labels(), "checked": True}


def compile_first(case: Case) -> dict[str, Any]:
    """Call a case's first step once, which compiles what it launches."""
    with case.steps() as steps:
        for call in steps.calls[:1]:
            call()
        synchronize()
    return {**case.labels(), "compiled": True}


def is_lost() -> bool:
    """Return True if no kernel can be launched any more, as after one that has read out of bounds."""
    try:
        synchronize()
    except RuntimeError:
        return True
    return False


def run(cases: Iterable[Case], measure: Callable[[Case], dict[str, Any]], chosen: argparse.Namespace) -> int:
    """Measure cases, and append what came of each. Return the exit status."""
    cases, status = list(cases), 0
    for number, case in enumerate(cases, 1):
        if number <= chosen.after or f"{case.name}, {case.backend}" in chosen.without:
            continue
        print(f"case {number} of {len(cases)}: {case}", flush=True)
        try:
            line = measure(case)
        except BackendError as error:
            print(f"left out: {error}", flush=True)
            continue
        except Exception as error:
            traceback.print_exc(limit=-4)
            kind = "wrong" if isinstance(error, AssertionError) else "failed"
            line = {**case.labels(), kind: f"{type(error).__name__}: {error}"[:500]}
            status = SOME_FAILED
        results.append(chosen.results, {"stage": chosen.stage, **line})
        if "failed" in line and is_lost():
            return LOST
    return status


def machine(chosen: argparse.Namespace) -> int:
    """Describe the machine, and see that the CUDA library loads."""
    if not (ON_GPU or chosen.rehearse):
        print("there is no CUDA device: torch finds none")
        return LOST
    if chosen.rehearse:
        subprocess.run([*BUILD, "--emulated", "--out", "build/emulated"], cwd=ROOT, check=True)
    elif not loads():
        build()
    results.append(chosen.results, {"run": describe(chosen.commit) | {"call": chosen.call}})
    return 0 if loads() else SOME_FAILED


def loads() -> bool:
    """Return True if there is a CUDA library that loads."""
    try:
        cuda_library.library()
    except cuda_library.CudaError as error:
        print(error, flush=True)
        return False
    return True


def build() -> None:
    """Compile the library for this GPU, to where an installation puts it."""
    major, minor = torch.cuda.get_device_capability()
    environment = {"TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"} | os.environ
    if subprocess.run([*BUILD, "--out", "build/csrc"], cwd=ROOT, env=environment, check=False).returncode == 0:
        cuda_library.LIBRARY.unlink(missing_ok=True)
        cuda_library.LIBRARY.write_bytes((ROOT / "build" / "csrc" / cuda_library.LIBRARY.name).read_bytes())


def profile(chosen: argparse.Namespace) -> int:
    """Record a step with every counter, and print the details."""
    file = chosen.results.parent / f"{chosen.job}.ncu-rep"
    step = [sys.executable, "-m", "bench.checks.one_step", "--backend", chosen.job]
    record = [
        "ncu",
        "--profile-from-start",
        "off",
        "--set",
        "full",
        "--import-source",
        "yes",
        "--clock-control",
        "none",
    ]
    recorded = subprocess.run([*record, "--force-overwrite", "--export", str(file), *step], check=False)
    details = ["ncu", "--import", str(file), "--page", "details", "--print-details", "all"]
    return recorded.returncode or subprocess.run(details, check=False).returncode


def compiled(chosen: argparse.Namespace) -> Iterator[Case]:
    """Cases of a call, or of a stage, with different launches, of which a job takes its part."""
    _, stages = plan.call(chosen.call)
    names = [stage.name for stage in stages if stage.name in CASES and stage.name != "generate"]
    cases = [case for name in names for case in CASES[name]() if case.backend in ("triton", "read", "auto")]
    different = {(case.op, case.name, case.rows, case.launch): case for case in reversed(cases)}
    yield from list(different.values())[int(chosen.job) :: len(plan.PARTS)]


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[stage for stage in plan.STAGES if plan.STAGES[stage].command is None])
    parser.add_argument("--results", type=Path, required=True, help="file that results are appended to")
    parser.add_argument("--job", default="", help="a kernel, or a part of what is compiled")
    parser.add_argument("--call", default="A", help="the call that the stage is part of")
    parser.add_argument("--commit", default="", help="the commit that is measured, where git does not know it")
    parser.add_argument("--after", type=int, default=0, help="begin after the case of this number")
    parser.add_argument("--without", action="append", default=[], help="leave out a kind of case")
    parser.add_argument("--rehearse", action="store_true", help="run without a GPU")
    return parser.parse_args(arguments)


def main() -> int:
    chosen = parsed()
    if chosen.stage in ("machine", "ncu"):
        return machine(chosen) if chosen.stage == "machine" else profile(chosen)
    if chosen.stage == "compile":
        return run(compiled(chosen), compile_first, chosen)
    cases = CASES[chosen.stage]()
    if chosen.stage in CHECKED:
        return run((case for case in cases if case.backend == chosen.job), check, chosen)
    stopwatch = Stopwatch(rounds=1 if chosen.rehearse else None)
    if chosen.stage == "stream" and not chosen.after:
        results.append(chosen.results, {"stage": chosen.stage, **stopwatch.ceilings()})
    return run(cases, lambda case: timed(case, stopwatch), chosen)


if __name__ == "__main__":
    sys.exit(main())
