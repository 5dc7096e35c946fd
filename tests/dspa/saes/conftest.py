"""Rows that SAEs encode."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ..support.saes import D_IN


@pytest.fixture
def h() -> Tensor:
    return 2 * torch.randn(3, 7, D_IN, generator=torch.Generator().manual_seed(9))
