"""One step that reads the whole encoder, between marks for a profiler: `python -m bench.checks.one_step`.

Under `ncu --profile-from-start off` its launch is the only one that is profiled.
"""

from __future__ import annotations

import argparse

import torch

from bench.harness.cases import KERNELS, SHAPES, Setting, activity_of, running
from bench.harness.measure import DEVICE, synchronize
from bench.tuning.triton import shape


def one_step(of: tuple[int, int], name: str) -> None:
    """Run a step of one row that never settles, after one that compiles and loads what it needs."""
    activity = activity_of(of)
    setting = Setting.of(activity, "hard", 1).never_settled(activity)
    with torch.no_grad(), running(name) as backend:
        first, second, *_ = setting.steps(lambda h, rows: setting.steer(h, rows, backend=backend))
        first()
        synchronize()
        with torch.cuda.profiler.profile():
            second()
            synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=shape, default=SHAPES[0], metavar="D_INxD_SAE")
    parser.add_argument("--backend", choices=KERNELS, default=KERNELS[0])
    chosen = parser.parse_args()
    if DEVICE.type != "cuda":
        print("bench.checks.one_step needs a CUDA device, and torch finds none")
        return 2
    one_step(chosen.shape, chosen.backend)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
