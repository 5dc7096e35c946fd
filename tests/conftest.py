"""What all tests share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """On tensors as small as those of the tests, threads only wait for each other."""
    torch.set_num_threads(1)
