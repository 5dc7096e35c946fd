"""Models that can be steered: which are, where their layers are, and what they are called."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

import dspa
from dspa.models.layers import decoder_layers, has_layer_norm, is_model_name, loaded_name, same_model
from dspa.testing import COMMON, make_model

PROMPT = torch.tensor([[1, 5, 9, 33, 20, 7]])


def test_names_of_the_same_model():
    assert same_model("google/gemma-2-2b-it", "gemma-2-2b")
    assert same_model("Qwen3-8B", "qwen/qwen3-8b")
    assert not same_model("gemma-2-2b", "google/gemma-2-27b")
    assert not same_model("gemma-2-2b", "gemma-2-2b2")
    assert same_model("meta-llama/Meta-Llama-3.1-8B", "meta-llama/Llama-3.1-8B")
    assert not same_model("llama3.1-8b", "meta-llama/Llama-3.1-70B")
    assert not same_model("llama3.1-8b-it", "meta-llama/Llama-3.1-8B-Base")


def test_names_of_neuronpedia():
    """SAELens' catalogue has both: the name of the model on the Hub, and the one that Neuronpedia has for it."""
    directory = pytest.importorskip("sae_lens.loading.pretrained_saes_directory").get_pretrained_saes_directory()
    names = {
        (release.model, place.partition("/")[0])
        for release in directory.values()
        for place in release.neuronpedia_id.values()
        if place
    }
    assert ("meta-llama/Llama-3.1-8B", "llama3.1-8b") in names
    assert [pair for pair in names if not same_model(*pair)] == []


@pytest.mark.parametrize(
    "name",
    ["", "./model", "/models/qwen", "~/model", "out/model/", "a/b/c", r"C:\model", "c5ebcd40d208330abc" + 22 * "0"],
)
def test_what_names_no_model(name):
    assert not is_model_name(name) and same_model(name, "gemma-2-2b") and same_model("gemma-2-2b", name)


REPOSITORY = "models--google--gemma-2-2b/snapshots/c5ebcd40d208330abc697524c919956e692655cf"


@pytest.mark.parametrize(
    ("folder", "recorded", "name"),
    [
        ("model", None, "./model"),
        ("model", "google/gemma-2-2b", "google/gemma-2-2b"),
        ("gemma-2-9b", "gpt2", "gpt2"),
        ("model", "/scratch/run/7", "./model"),
        ("model", 5, "./model"),
        (f"hub/{REPOSITORY}", None, "google/gemma-2-2b"),
        (f"hub/{REPOSITORY}", "other", "google/gemma-2-2b"),
    ],
)
def test_name_of_a_local_folder(tmp_path, monkeypatch, folder, recorded, name):
    """Earlier versions of transformers recorded the name in config.json, which this one leaves as it is."""
    path = tmp_path / folder
    make_model("gemma2").save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | ({"_name_or_path": recorded} if recorded else {})))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(path)
    for given in (path, f"{path}/", folder, f"./{folder}"):
        assert loaded_name(AutoModelForCausalLM.from_pretrained(given)) == name
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in ("link", "~/link"):
        model = make_model("gemma2")
        model.config.name_or_path = given
        assert loaded_name(model) == name


def test_name_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = make_model("gemma2")
    assert loaded_name(model) == ""
    for name in ("google/gemma-2-2b", "/gone/gemma-2-2b"):
        model.config.name_or_path = name
        assert loaded_name(model) == name


def test_layer_norm_of_the_decoder():
    """The vision tower of Gemma-3 has LayerNorm, and its decoder has RMSNorm."""
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    images = Gemma3ForConditionalGeneration(Gemma3Config(text_config=COMMON, vision_config=vision))
    assert any(isinstance(module, nn.LayerNorm) for module in images.modules()) and not has_layer_norm(images)
    norms = {family: has_layer_norm(make_model(family)) for family in ("gpt2", "gpt_neox", "gemma2", "llama")}
    assert norms == {"gpt2": True, "gpt_neox": True, "gemma2": False, "llama": False}


def test_unknown_architecture(steering):
    class Odd(type(make_model("llama"))):
        pass

    model = make_model("llama")
    model.__class__ = Odd
    model.trunk = model.model
    model.model = nn.Identity()
    with pytest.raises(dspa.ModelError, match=r"Pass their dotted path as `layers`.*'trunk.layers' \(4\)"):
        decoder_layers(model)
    assert len(decoder_layers(model, "trunk.layers")) == 4


@pytest.mark.parametrize("model", [nn.Linear(2, 2), "a model"], ids=["module", "text"])
def test_not_a_language_model(steering, model):
    with pytest.raises(dspa.ModelError, match="accepted: a transformers causal language model"):
        steering.attach(model)


def test_a_model_without_a_head(gemma, steering):
    with pytest.raises(dspa.ModelError, match="does not generate"):
        steering.attach(gemma.model, layers="layers")
    gemma.model(PROMPT)


def test_learned_prompts(steering):
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    wrapped = peft.get_peft_model(make_model("gemma2"), config)
    with pytest.raises(dspa.ModelError, match="learned prompts"):
        steering.attach(wrapped)


def test_encoder_decoder(steering):
    model = T5ForConditionalGeneration(T5Config(vocab_size=61, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8))
    with pytest.raises(dspa.ModelError, match="encoder-decoder; accepted: decoder-only"):
        steering.attach(model)
