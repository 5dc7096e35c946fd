"""Gates against torch's percentiles. How they make a map is in test_reduce.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dspa.maps.gates import _percentile, find_gates
from dspa.maps.table import DensityTable

from ...rounding import rounding
from ..support.counts import ODD, as_collection, draw


@pytest.mark.parametrize("n_zeros", [0, 1, 30, 59, 60])
def test_percentiles_are_those_of_torch(n_zeros: int) -> None:
    g = np.random.default_rng(n_zeros)
    values = g.random(60 - n_zeros) * g.integers(1, 4, 60 - n_zeros)
    column = torch.tensor(g.permutation([*values, *[0.0] * n_zeros]))
    for percentile in (0, 1, 12.5, 50, 90, 98.30508474576271, 99.9, 100):
        wanted = torch.quantile(column, percentile / 100).item()
        # Between two values, at a place of up to 60 that is rounded.
        apart = rounding(1, 60.0 * float(column.max()), torch.float64)
        assert _percentile(values, n_zeros, percentile) == pytest.approx(wanted, rel=0, abs=apart)


@pytest.mark.parametrize("percentile", [25, 50, 75, 90, 97.5])
@pytest.mark.parametrize("active", [0.05, 0.3, 0.9])
def test_gates_are_those_of_torch(percentile: float, active: float) -> None:
    data = draw(41, seed=int(percentile), lengths_from=ODD, active=active)
    rho = torch.tensor(data[0] / data[3][0][:, None])
    wanted = rho >= torch.quantile(rho, percentile / 100, dim=0)
    gates = find_gates(DensityTable(as_collection(data), "all", None), percentile, "published")
    assert gates.n_open.tolist() == wanted.sum(dim=0).tolist()
    assert np.array_equal(gates.open.toarray(), wanted.numpy().T[gates.latents])
