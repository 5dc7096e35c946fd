"""`dspa.models.sources`: the digest of a model's weights, and the place it came from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dspa.models.sources import model_digest, model_source
from dspa.testing import make_model

from ..support.quantisers import KINDS, quantised


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    make_model("gemma2").save_pretrained(path)
    return path


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_loaded_in_any_dtype_has_the_digest_of_what_was_saved(family, dtype, tmp_path):
    model = make_model(family)
    model.save_pretrained(tmp_path)
    assert model_digest(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)) == model_digest(model)


def test_other_weights_have_another_digest():
    model = make_model("gemma2")
    before = model_digest(model)
    assert model_digest(make_model("gemma2", seed=1)) != before
    # One step of training on one matrix, as much as bf16 can show.
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.02)
    assert model_digest(model) != before


def test_a_lora_is_another_model():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    assert model_digest(peft.get_peft_model(make_model("gemma2"), config)) != model_digest(make_model("gemma2"))


def test_a_source_is_an_absolute_path(saved, monkeypatch):
    monkeypatch.chdir(saved.parent)
    source = model_source(AutoModelForCausalLM.from_pretrained("tiny"))
    assert source is not None and source.path == str(saved)


def test_a_model_that_was_not_loaded_has_no_source():
    assert model_source(make_model("gemma2")) is None


def test_offloaded_weights_have_no_source(saved):
    model = AutoModelForCausalLM.from_pretrained(saved)
    model.model.layers[3].to("meta")
    assert model_source(model) is None


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_weights_take_part(kind, tmp_path):
    """In the layout too that bitsandbytes gives its weights in a pass."""
    model = quantised(kind, tmp_path)
    digest = model_digest(model)
    with torch.no_grad():
        model(torch.tensor([[1, 5, 9]]))
    assert model_digest(model) == digest != model_digest(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert model_digest(quantised(kind, tmp_path, scale=1.1)) != digest
