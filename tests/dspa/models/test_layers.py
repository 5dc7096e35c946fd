"""Models that can be steered: which are, where their layers are, and what they are called."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

import dspa
from dspa.models.layers import decoder_layers, same_model
from dspa.testing import make_model

PROMPT = torch.tensor([[1, 5, 9, 33, 20, 7]])


def test_names_of_the_same_model():
    assert same_model("google/gemma-2-2b-it", "gemma-2-2b")
    assert same_model("Qwen3-8B", "/models/qwen3-8b/")
    assert not same_model("gemma-2-2b", "google/gemma-2-27b")
    assert not same_model("gemma-2-2b", "gemma-2-2b2")


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
