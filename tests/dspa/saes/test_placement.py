"""SAEs that do not fit a model, its layers or each other are refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM

import dspa
from dspa.testing import D_IN, L_IN, L_OUT, make_map, make_model, make_sae

PROMPT = torch.tensor([[1, 5, 9, 33, 20, 7]])


def test_width_of_another_model(gemma, sae_in):
    narrow = make_sae(L_OUT, 64, d_in=D_IN // 2)
    steering = dspa.Steering(sae_in, narrow, make_map(sae_in, narrow))
    with pytest.raises(dspa.ModelError, match="`sae_out` reads 24 dimensions and the model's hidden size is 48"):
        steering.attach(gemma)


def test_layer_out_of_range(gemma, sae_in):
    high = make_sae(9, 64)
    steering = dspa.Steering(sae_in, high, make_map(sae_in, high))
    with pytest.raises(dspa.ModelError, match="`sae_out` sits at layer 9; accepted: 0 to 3"):
        steering.attach(gemma)


def test_input_layer_not_below_output_layer(gemma, sae_out):
    late = make_sae(3, 96, seed=4)
    steering = dspa.Steering(late, sae_out, make_map(late, sae_out))
    with pytest.raises(dspa.ModelError, match="layer 3 and the output SAE at layer 2"):
        steering.attach(gemma)


def test_sae_without_a_layer(gemma, sae_in):
    nowhere = make_sae(None, 64)
    with pytest.raises(dspa.ModelError, match="does not say its layer"):
        dspa.Steering(sae_in, nowhere, make_map(sae_in, nowhere)).attach(gemma)


def test_sae_of_another_model(sae_in):
    model = make_model("gemma2")
    model.config.name_or_path = "google/gemma-2-9b"
    named = make_sae(L_OUT, 64, model_name="gemma-2-2b")
    steering = dspa.Steering(sae_in, named, make_map(sae_in, named))
    with pytest.raises(dspa.ModelError, match="made for 'gemma-2-2b' and the model is 'google/gemma-2-9b'"):
        steering.attach(model)
    with steering.attach(model, model_name="gemma-2-2b"):
        model.generate(PROMPT, max_new_tokens=1)


def test_the_name_of_a_folder_is_no_evidence(tmp_path):
    """A model in a folder fits an SAE of any name, unless the caller or the hub's cache names the model."""
    sae_in = make_sae(L_IN, 64, model_name="google/gemma-2-2b")
    sae_out = make_sae(L_OUT, 64, model_name="/data/gemma/2b")
    cdmap = make_map(sae_in, sae_out)
    cdmap.meta = dataclasses.replace(cdmap.meta, model_name="google/gemma-2-2b")
    steering = dspa.Steering(sae_in, sae_out, cdmap)
    for folder in ("model", "models--google--gemma-2-2b/snapshots/1a", "c5ebcd40d208330abc697524c919956e692655cf"):
        make_model("gemma2").save_pretrained(tmp_path / folder)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        steering.attach(model).detach()
        with pytest.raises(dspa.ModelError, match="made for 'google/gemma-2-2b' and the model is 'qwen3'"):
            steering.attach(model, model_name="qwen3")
    other = tmp_path / "models--google--gemma-2-9b/snapshots/1a"
    make_model("gemma2").save_pretrained(other)
    with pytest.raises(dspa.ModelError, match="made for 'google/gemma-2-2b' and the model is 'google/gemma-2-9b'"):
        steering.attach(AutoModelForCausalLM.from_pretrained(other))
    narrow = make_model("gemma2", hidden_size=24, head_dim=6)
    narrow.save_pretrained(tmp_path / "narrow")
    with pytest.raises(dspa.ModelError, match="`sae_in` reads 48 dimensions"):
        steering.attach(AutoModelForCausalLM.from_pretrained(tmp_path / "narrow"))
