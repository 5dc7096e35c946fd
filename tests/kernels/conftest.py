from __future__ import annotations

import collections
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dspa_kernels.backends import IMPLEMENTED, OPS
from dspa_kernels.testing import BACKENDS

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KERNELS = BACKENDS[1:]
GRID = 40


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Memory comes filled with NaN and large integers: what is read or returned unwritten shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan() and torch.empty(1, dtype=torch.int32) > 1 << 30
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[pytest.param(b, marks=[pytest.mark.gpu] * (b != "reference")) for b in BACKENDS])
def backend(request: pytest.FixtureRequest, poisoned_memory: None) -> str:
    """Every backend of `dspa_kernels.testing.BACKENDS` that has the op; without a GPU, they are emulated."""
    return str(request.param)


def parameters(item: Any) -> Iterator[Any]:
    """What a test is called with, tuples unpacked."""
    for value in item.callspec.params.values() if hasattr(item, "callspec") else ():
        yield from value if isinstance(value, tuple) else (value,)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Kernels compute in fp32: fp64 is the reference's alone (test_backends.py says what else happens). An op has no
    test on a backend that does not have it.

    In the interpreter, which takes half a second for what a GPU does in microseconds, every fourth of a kernel's
    tests runs where they are a grid of more than `GRID`.
    """
    items[:] = [item for item in items if _applies(item)]
    grids = collections.Counter(_grid(item) for item in items)
    seen: collections.Counter[str] = collections.Counter()
    kept = []
    for item in items:
        grid = _grid(item)
        if grid and INTERPRETED and grids[grid] > GRID:
            seen[grid] += 1
            if seen[grid] % 4:
                continue
        kept.append(item)
    items[:] = kept


def _applies(item: Any) -> bool:
    values = {*map(_hashable, parameters(item))}
    kernels = values & set(KERNELS)
    if not kernels:
        return True
    names = {item.path.stem.removeprefix("test_"), *(value for value in values if value in OPS)}
    op = max((op for op in OPS for name in names if name.startswith(op)), key=len, default="")
    return torch.float64 not in values and (not op or all((op, each) in IMPLEMENTED for each in kernels))


def _grid(item: Any) -> str:
    """The test function of a kernel's test, of all others nothing."""
    return item.nodeid.partition("[")[0] if "triton" in map(_hashable, parameters(item)) else ""


def _hashable(value: Any) -> Any:
    return value if isinstance(value, (str, torch.dtype)) else id(value)
