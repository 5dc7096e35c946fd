"""Models that can be steered: which are, where their layers are, and what they are called."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, T5Config, T5ForConditionalGeneration

import dspa
from dspa.models.layers import decoder_layers, has_layer_norm, same_model
from dspa.testing import COMMON, make_model

PROMPT = torch.tensor([[1, 5, 9, 33, 20, 7]])


def test_names_of_the_same_model():
    assert same_model("google/gemma-2-2b-it", "gemma-2-2b")
    assert same_model("Qwen3-8B", "/models/qwen3-8b/")
    assert not same_model("gemma-2-2b", "google/gemma-2-27b")
    assert not same_model("gemma-2-2b", "gemma-2-2b2")


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
    with pytest.raises(dspa.ModelError, match=r"layers='path.to.layers'.*'trunk.layers' \(4\)"):
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
