"""A map whose tensors were changed after it was made is refused, and a copy of one is a map."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import dspa
from dspa.maps.cdmap import TENSORS, ConditionalDifferenceMap
from dspa.testing import L_IN, L_OUT, make_map, make_model, make_sae, with_tensors

PROMPT = torch.tensor([[1, 5, 9, 12]])
CONFIG = dspa.SteeringConfig()
CHANGES: dict[str, Callable[[ConditionalDifferenceMap], object]] = {
    "values in place": lambda cdmap: cdmap.values.neg_(),
    "one value": lambda cdmap: cdmap.values[0].__setitem__(0, 9.0),
    "columns in place": lambda cdmap: cdmap.columns.add_(1),
    "gates": lambda cdmap: cdmap.gates.zero_(),
    "another tensor": lambda cdmap: setattr(cdmap, "values", cdmap.values.clone()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_map_is_refused(change: str, tmp_path: Path) -> None:
    sae_in, sae_out, model = make_sae(L_IN, 64), make_sae(L_OUT, 128), make_model("gemma2")
    cdmap = make_map(sae_in, sae_out)
    steering = dspa.Steering(sae_in, sae_out, cdmap).attach(model)
    model.generate(PROMPT, max_new_tokens=1)
    CHANGES[change](cdmap)
    counts = torch.ones(1, 64, dtype=torch.int32)
    uses: dict[str, Callable[[], object]] = {
        "generate": lambda: model.generate(PROMPT, max_new_tokens=1),
        "a new Steering": lambda: dspa.Steering(sae_in, sae_out, cdmap),
        "select": lambda: cdmap.select(counts, CONFIG),
        "score": lambda: cdmap.score(counts.float()),
        "save": lambda: cdmap.save(tmp_path / "map"),
        "copy": lambda: copy.copy(cdmap),
        "pickle": lambda: pickle.dumps(cdmap),
    }
    for name, use in uses.items():
        with pytest.raises(dspa.MapError, match="A tensor of the map is changed"):
            use()
            pytest.fail(f"{name} took a changed map")
    steering.detach()


def test_the_callers_tensor_counts_as_the_maps(sae_in, sae_out, cdmap) -> None:
    values = cdmap.values.clone()
    made = with_tensors(cdmap, values=values)
    values.zero_()
    with pytest.raises(dspa.MapError, match=r"changed \(values\)"):
        dspa.Steering(sae_in, sae_out, made)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda cdmap: pickle.loads(pickle.dumps(cdmap))])
def test_a_copy_is_a_map_of_its_own(sae_in, sae_out, cdmap, copied) -> None:
    other = copied(cdmap)
    assert all(torch.equal(getattr(other, name), getattr(cdmap, name)) for name in TENSORS)
    assert other.meta == cdmap.meta and dspa.Steering(sae_in, sae_out, other).cdmap is other
