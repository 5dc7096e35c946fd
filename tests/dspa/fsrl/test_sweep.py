"""Sweeps over layers and settings."""

from __future__ import annotations

import csv
from dataclasses import replace
from typing import Any

import pytest

from dspa.errors import ModelError, TrainingError
from dspa.fsrl import FSRLAdapter, FSRLConfig, held_out, train_sweep
from dspa.testing import D_SAE_OUT, L_OUT, make_model, make_sae, word_tokenizer

from ..support.trainings import ADAPTER, HELD_OUT, TINY, TRIPLES, Stopped

pytest.importorskip("trl")


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture
def model():
    return make_model("qwen3")


def test_a_sweep(model, tokenizer, tmp_path, monkeypatch):
    """It is stopped after its first adapter, which is not trained again."""
    saes = [make_sae(layer, D_SAE_OUT, seed=2) for layer in (0, L_OUT)]
    settings = [FSRLConfig(l1=l1) for l1 in (0.0, 5.0)]
    out = tmp_path / "sweep"

    def sweep() -> Any:
        config = replace(TINY, max_steps=10)
        return train_sweep(
            model, tokenizer, TRIPLES, saes, settings, out, eval_triples=HELD_OUT, config=config, progress=False
        )

    from dspa.fsrl import sweep as module

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        train_one = module.train

        def second(*args: Any, **kwargs: Any) -> Any:
            if (out / "layer-0-soft_threshold-0").exists():
                raise Stopped
            return train_one(*args, **kwargs)

        patch.setattr(module, "train", second)
        sweep()
    before = (out / "layer-0-soft_threshold-0" / "adapter.safetensors").stat().st_mtime_ns
    trained = sweep()
    assert (out / "layer-0-soft_threshold-0" / "adapter.safetensors").stat().st_mtime_ns == before
    assert [(adapter.layer, adapter.l1) for adapter in trained.adapters] == [
        (0, 0.0),
        (0, 5.0),
        (L_OUT, 0.0),
        (L_OUT, 5.0),
    ]
    assert trained.adapters[1].held_out.l0 < trained.adapters[0].held_out.l0
    assert trained.base == held_out(model, tokenizer, HELD_OUT, max_length=64, progress=False)
    with (out / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"] for row in rows] == ["", "0", "0", "2", "2"]
    for row, result in zip(rows[1:], trained.adapters, strict=True):
        assert (row["activation"], float(row["lambda"])) == (result.activation, result.l1)
        figures = {name: float(row[name]) for name in vars(result.held_out)}
        assert figures == vars(result.held_out)
        adapter = FSRLAdapter.load(result.folder, saes[0] if result.layer == 0 else saes[1])
        with adapter.attach(model):
            assert held_out(model, tokenizer, HELD_OUT, adapter, max_length=64, progress=False) == result.held_out
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_refused_sweeps(model, tokenizer, tmp_path):
    def sweep(saes, settings, out=tmp_path / "sweep"):
        train_sweep(model, tokenizer, TRIPLES, saes, settings, out, eval_triples=HELD_OUT, config=TINY)

    sae = make_sae(L_OUT, D_SAE_OUT)
    with pytest.raises(TrainingError, match="2 SAEs and 1 settings make 1 different adapters"):
        sweep([sae, make_sae(L_OUT, D_SAE_OUT, seed=3)], [ADAPTER])
    with pytest.raises(ModelError, match="sits at layer 7; accepted: 0 to 3"):
        sweep([sae, make_sae(7, D_SAE_OUT)], [ADAPTER])
    with pytest.raises(TrainingError, match="accepted: a folder in one that exists"):
        sweep([sae], [ADAPTER], tmp_path / "no" / "sweep")
    assert not (tmp_path / "sweep").exists()
