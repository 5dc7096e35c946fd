"""Comparisons of two maps, against sums written out here."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dspa import ConditionalDifferenceMap, FrozenSAE, MapError
from dspa.maps.difference import difference
from dspa.testing import L_OUT, make_map, make_sae, with_tensors


def with_values(cdmap: ConditionalDifferenceMap, values: torch.Tensor, *columns: int) -> ConditionalDifferenceMap:
    """A map of some columns, which holds these rows first and no further entry."""
    dense = torch.zeros(len(cdmap.values), len(columns))
    dense[: len(values)] = values
    return with_tensors(
        cdmap, columns=torch.tensor(columns, dtype=torch.int32), values=dense, variance=torch.ones(len(columns))
    )


def test_a_map_differs_from_itself_in_nothing(cdmap: ConditionalDifferenceMap) -> None:
    same = difference(cdmap, cdmap)
    assert same.settings == {} and same.columns == (0, 40, 0)
    assert same.correlation == pytest.approx(1) and same.same_sign == same.rows == 1


def test_differences(cdmap: ConditionalDifferenceMap) -> None:
    other = with_tensors(
        cdmap,
        columns=cdmap.columns[5:],
        values=-cdmap.values[:, 5:].contiguous(),
        variance=cdmap.variance[5:],
    )
    other.meta = replace(cdmap.meta, percentile=50.0)
    changed = difference(cdmap, other)
    assert changed.settings == {"percentile": (90.0, 50.0)}
    assert changed.columns == (5, 35, 0)
    assert -1 < changed.correlation < -0.8 and changed.same_sign == 0 and changed.rows < 0.2


def test_figures_of_small_maps(cdmap: ConditionalDifferenceMap) -> None:
    one = with_values(cdmap, torch.tensor([[-1.0, 2.0], [3.0, 0.0]]), 4, 9)
    other = with_values(cdmap, torch.tensor([[-2.0, -1.0], [1.0, 0.0]]), 4, 11)
    compared = difference(one, other)
    # Columns 4, 9 and 11. The entries that are not 0 in both or one: row 0 in all three, row 1 in the first.
    assert compared.columns == (1, 1, 1)
    assert compared.correlation == pytest.approx(np.corrcoef([-1, 2, 0, 3], [-2, 0, -1, 1])[0, 1])
    assert compared.same_sign == 1
    # Row 0 ablates 4, and 4 and 11. Row 1 ablates nothing, and does not count.
    assert compared.rows == 0.5


def test_figures_that_are_not_defined(cdmap: ConditionalDifferenceMap) -> None:
    one, other = (with_values(cdmap, torch.tensor([[1.0]]), column) for column in (4, 9))
    apart = difference(one, other)
    assert (apart.same_sign, apart.rows) == (None, None) and apart.correlation == pytest.approx(-1)
    assert difference(one, one).correlation is None
    equal = with_values(cdmap, torch.full((3, 2), 0.5), 4, 9)
    assert difference(equal, equal).correlation is None and difference(equal, equal).same_sign == 1


def test_maps_of_other_saes(cdmap: ConditionalDifferenceMap, sae_in: FrozenSAE) -> None:
    other = make_map(sae_in, make_sae(L_OUT, 128, seed=9))
    with pytest.raises(MapError, match="different SAEs: sae_out is"):
        difference(cdmap, other)
