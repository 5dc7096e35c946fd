"""`dspa.maps.passes`: models whose responses cannot continue from a cache are counted in whole passes."""

from __future__ import annotations

import pytest

from dspa import ModelError
from dspa.maps.passes import shares_prompts
from dspa.testing import FAMILIES, RECURRENT, make_model

from ..support.counts import Case, check_plain, check_same, make_case, make_ids

# Seeds of data in which no pre-activation is near its threshold.
SEEDS = dict.fromkeys(RECURRENT, 1) | {"recurrent_gemma": 2}


@pytest.fixture(params=RECURRENT)
def recurrent(request: pytest.FixtureRequest) -> Case:
    case = make_case(request.param, make_ids(SEEDS[request.param]))
    if request.param == "mamba":
        # It has no embeddings among its hidden states.
        case.layers, case.first_state = "backbone.layers", 0
    return case


@pytest.mark.filterwarnings("ignore:.*keeps more of a prompt")
def test_counts_are_those_of_plain_passes(recurrent: Case) -> None:
    """Row by row, without padding, by transformers alone."""
    if shares_prompts(recurrent.model):
        # Earlier versions of transformers keep the state of RecurrentGemma in its layers, and know of no other cache.
        with pytest.raises(ModelError, match=r"keeps no key/value cache of a prompt.*Update transformers"):
            recurrent.collect()
        return
    check_plain(recurrent, recurrent.collect(batch_tokens=300), recurrent.ids)


def test_which_models_share_a_prompt() -> None:
    assert all(shares_prompts(make_model(family)) for family in FAMILIES)
    assert not any(shares_prompts(make_model(family)) for family in RECURRENT if family != "recurrent_gemma")


def test_both_ways_count_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case("gemma2")
    shared = case.collect()
    monkeypatch.setattr("dspa.maps.counting.shares_prompts", lambda _model: False)
    with pytest.warns(UserWarning, match="in a whole pass with its prompt"):
        check_same(case.collect(), shared, batched_alike=False)
