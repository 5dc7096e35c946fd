"""One step that reads the whole encoder, between marks for a profiler: `python -m bench.checks.one_step`.

Under `ncu --profile-from-start off` its launch is the only one that is profiled.
"""

from __future__ import annotations

import argparse

import torch

from bench.harness.cases import KERNELS, SHAPES, Shape
from bench.harness.measure import DEVICE, synchronize
from bench.ops import steer


def one_step(shape: Shape, name: str) -> None:
    """Run a step of one row that never settles, after one that compiles and loads what it needs."""
    (case,) = steer.cases(["stream"], [name], shape, [1])
    with case.steps() as steps:
        first, second, *_ = steps.calls
        first()
        synchronize()
        with torch.cuda.profiler.profile():
            second()
            synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=KERNELS, default=KERNELS[0])
    chosen = parser.parse_args()
    if DEVICE.type != "cuda":
        print("bench.checks.one_step needs a CUDA device, and torch finds none")
        return 2
    one_step(SHAPES[0], chosen.backend)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
