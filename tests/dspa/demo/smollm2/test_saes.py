"""An SAE ships as it was trained, in bf16 and with the name of its model."""

from __future__ import annotations

import json

import torch

from dspa.demo.load import World
from dspa.demo.smollm2.saes import MODEL_NAME, ship
from dspa.saes.frozen import FrozenSAE


def test_an_sae_is_shipped_in_bf16_with_the_name_of_its_model(tmp_path):
    trained = World().sae_out
    trained.save(tmp_path / "trained")
    # A training writes none: what it says is for one rounding of the weights.
    config = json.loads((tmp_path / "trained" / "cfg.json").read_text())
    del config["metadata"]["dspa"]
    (tmp_path / "trained" / "cfg.json").write_text(json.dumps(config))
    ship(tmp_path / "trained", tmp_path / "shipped")
    shipped = FrozenSAE.load(tmp_path / "shipped")
    assert shipped.model_name == MODEL_NAME
    assert torch.equal(shipped.W_dec, trained.W_dec.to(torch.bfloat16).to(shipped.W_dec.dtype))
    assert torch.equal(shipped.b_enc, trained.b_enc) and torch.equal(shipped.threshold, trained.threshold)
