"""The FSRL demo reaches what it claims, with the same code that trains any adapter: here with fewer of them."""

from __future__ import annotations

import functools
import json
from dataclasses import replace

import pytest

from dspa.demo import fsrl
from dspa.demo.load import World
from dspa.fsrl import FSRLConfig

pytest.importorskip("trl")

ADAPTERS = (*(FSRLConfig(l1=l1) for l1 in (0.005, 0.02, 0.05)), FSRLConfig(activation="relu"))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "sweep"
    config = replace(fsrl.TRAINING, max_steps=50)
    return fsrl.measure(World(), out, adapters=ADAPTERS, config=config, progress=False)


def test_every_adapter_prefers_better_than_the_base_model(outcomes):
    base, *adapters = outcomes
    assert base.activation is None and len(adapters) == 4
    for adapter in adapters:
        assert adapter.held_out.simpo_loss < base.held_out.simpo_loss
        assert adapter.held_out.accuracy > base.held_out.accuracy
        assert adapter.share > base.share


def test_the_effect_is_no_chance(outcomes):
    """It shows on 100 triples, at lambdas up to the published one, after fewer steps than the demo's."""
    base, *adapters = outcomes
    assert base.held_out.accuracy < 0.6 and adapters[0].held_out.accuracy > 0.9
    for adapter in adapters[:2]:
        assert adapter.held_out.accuracy > 0.7
        assert adapter.share - base.share > 0.05


def test_a_larger_lambda_moves_less(outcomes):
    l0 = [outcome.held_out.l0 for outcome in outcomes[1:4]]
    assert l0[0] > 1.1 * l0[1] > 1.1**2 * l0[2] > 0


def test_the_command(tmp_path, monkeypatch):
    """It writes and prints the outcome of one adapter, trained for one step."""
    few = {"adapters": ADAPTERS[:1], "config": replace(fsrl.TRAINING, max_steps=1)}
    monkeypatch.setattr(fsrl, "measure", functools.partial(fsrl.measure, **few))
    outcomes = fsrl.run(tmp_path / "demo.json", progress=False)
    record = json.loads((tmp_path / "demo.json").read_text())
    assert [outcome["activation"] for outcome in record["outcomes"]] == [None, "soft_threshold"]
    assert record["outcomes"][1]["share"] == outcomes[1].share and record["settings"]["n_train"] == 300
