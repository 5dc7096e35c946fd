"""Intervals against their closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from dspa.intervals import wilson

from ..rounding import rounding


@pytest.mark.parametrize(("k", "n"), [(0, 5), (7, 20), (20, 20)])
def test_wilson_is_the_closed_form(k, n):
    z, p = 1.959963984540054, k / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    apart = rounding(20, 1.0, torch.float64)
    assert wilson(k, n) == pytest.approx((max(0.0, middle - half), min(1.0, middle + half)), rel=0, abs=apart)
