from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dspa_kernels.testing import BACKENDS


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Memory comes filled with NaN and large integers: what is read or returned unwritten shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan() and torch.empty(1, dtype=torch.int32) > 1 << 30
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[pytest.param(b, marks=[pytest.mark.gpu] * (b != "reference")) for b in BACKENDS])
def backend(request: pytest.FixtureRequest, poisoned_memory: None) -> str:
    """Every backend of `dspa_kernels.testing.BACKENDS`; without a GPU, Triton runs in its interpreter."""
    return str(request.param)


def parameters(item: Any) -> Iterator[Any]:
    """What a test is called with, tuples unpacked."""
    for value in item.callspec.params.values() if hasattr(item, "callspec") else ():
        yield from value if isinstance(value, tuple) else (value,)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Kernels compute in fp32: fp64 is the reference's alone (test_backends.py says what else happens)."""
    items[:] = [item for item in items if not {"triton", torch.float64} <= {*map(_hashable, parameters(item))}]


def _hashable(value: Any) -> Any:
    return value if isinstance(value, (str, torch.dtype)) else id(value)
