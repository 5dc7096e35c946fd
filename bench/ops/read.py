"""Cases that do nothing but read an encoder, or launch: the limits of a step that streams it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.harness.cases import ON_GPU, Case, Shape, Steps, activity_of
from bench.harness.measure import DEVICE

LAUNCH = "launch only"
N_CALLS = 32 if ON_GPU else 4


def readers() -> dict[str, Callable[[Tensor], Any]]:
    """Ways to read a tensor, by name. All are tried, since the fastest depends on the size."""
    if not ON_GPU:
        return {"torch.sum": torch.sum}
    from bench.harness.read_triton import FEW_READERS

    return {str(reader): reader for reader in FEW_READERS}


def read(case: Case, _backend: str) -> Steps:
    W = activity_of(case.shape).sae.encoder_rows
    return Steps([partial(readers()[case.name], W)] * N_CALLS, n_bytes=float(W.nbytes))


def launch_only(_case: Case, _backend: str) -> Steps:
    """A launch that does nothing, with as many programs as `steer` has."""
    from bench.harness.read_triton import launch_only

    return Steps([partial(launch_only, DEVICE)] * N_CALLS)


def cases(shape: Shape) -> Iterator[Case]:
    for name in readers():
        yield Case("read", name, "read", shape, 1, read)
    if ON_GPU:
        yield Case("read", LAUNCH, "read", shape, 1, launch_only)
