from __future__ import annotations

import collections
import os
from collections.abc import Hashable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from dspa_kernels.backends import IMPLEMENTED, OPS
from dspa_kernels.cuda_library import DTYPES, MAX_ROWS
from dspa_kernels.testing import BACKENDS
from tests.kernels.thinning import LARGE, Case, thinned

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ALL_CASES = os.environ.get("DSPA_ALL_CASES") == "1"
KERNELS = BACKENDS[1:]


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill new memory with NaN and large integers, so that what is read or returned unwritten shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan() and torch.empty(1, dtype=torch.int32) > 1 << 30
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[pytest.param(b, marks=[pytest.mark.gpu] * (b != "reference")) for b in BACKENDS])
def backend(request: pytest.FixtureRequest, poisoned_memory: None) -> str:
    """Every backend of `dspa_kernels.testing.BACKENDS` that has the op. Without a GPU, they are emulated."""
    return str(request.param)


@pytest.fixture
def ordered_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sum products in the order of k in the interpreter, as fused multiply-adds.

    It would multiply with numpy, which rounds a sum by its place in the matrix and by the shapes.
    """
    if not INTERPRETED:
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def dot(_builder: Any, a: Any, b: Any, acc: Any, *_precision: Any) -> Any:
        w, x, total = a.data.astype(np.float64), b.data.astype(np.float64), acc.data
        for k in range(w.shape[1]):
            total = (total + w[:, k, None] * x[None, k]).astype(np.float32)
        return TensorHandle(total, acc.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)


def parameters(item: Any) -> dict[str, Any]:
    """Return the parameters of a test by name, or none."""
    return dict(item.callspec.params) if hasattr(item, "callspec") else {}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Remove cases that no kernel has, and in the interpreter most cases of large grids.

    Kernels compute in fp32, and fp64 is the reference's alone (test_backends.py says what else happens). An op has no
    test on a backend that does not have it, and `steer` none in CUDA with arguments that it does not take. What is left
    out of large grids is reported as deselected, and DSPA_ALL_CASES=1 runs it.
    """
    items[:] = [item for item in items if _applies(item)]
    if not INTERPRETED or ALL_CASES:
        return
    grids: dict[str, list[Case]] = collections.defaultdict(list)
    for item in items:
        if "triton" in _atoms(item):
            case = Case(item.nodeid, {name: _hashable(value) for name, value in parameters(item).items()})
            grids[item.nodeid.partition("[")[0]].append(case)
    large = [cases for cases in grids.values() if len(cases) > LARGE]
    left_out = {case.name for cases in large for case in cases}.difference(*map(thinned, large))
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in left_out])
        items[:] = [item for item in items if item.nodeid not in left_out]


def _applies(item: Any) -> bool:
    atoms = _atoms(item)
    kernels = atoms & set(KERNELS)
    if not kernels:
        return True
    names = {item.path.stem.removeprefix("test_"), *(atom for atom in atoms if atom in OPS)}
    op = max((op for op in OPS for name in names if name.startswith(op)), key=len, default="")
    if "cuda" in kernels and op == "steer" and not _is_for_cuda(item):
        return False
    return torch.float64 not in atoms and (not op or all((op, kernel) in IMPLEMENTED for kernel in kernels))


def _is_for_cuda(item: Any) -> bool:
    """Return True if the test's parameters are those of a decoding step in 16 bits; others have the mark not_cuda."""
    values = parameters(item)
    dtypes = set(values.get("dtypes", ())) | {values[name] for name in ("dtype",) if name in values}
    return (
        dtypes <= set(DTYPES)
        and len(dtypes) <= 1
        and values.get("normalize", "none") == "none"
        and values.get("n", 0) <= MAX_ROWS
        and item.get_closest_marker("not_cuda") is None
    )


def _atoms(item: Any) -> set[Hashable]:
    """Return the values of a test's parameters, tuples unpacked."""
    values = parameters(item).values()
    return {_hashable(atom) for value in values for atom in (value if isinstance(value, tuple) else (value,))}


def _hashable(value: Any) -> Hashable:
    """Return a value that can be an element of a set: itself, or the identity of an object."""
    if isinstance(value, tuple):
        return tuple(map(_hashable, value))
    return value if isinstance(value, (str, int, float, torch.dtype)) else id(value)
