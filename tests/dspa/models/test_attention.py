"""Implementations of attention that leave out what a model asks for are refused wherever a model is taken."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, GptOssConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

import dspa
from dspa.fsrl import FSRLAdapter, FSRLConfig
from dspa.models.attention import attention_extras, attention_fault, attention_implementation, use_same_function
from dspa.models.layers import decoder_layers
from dspa.testing import COMMON, make_model, word_tokenizer

from ...rounding import PASS, rounding

PROMPT = torch.tensor([[1, 5, 9, 33, 20, 7]])
PLAIN = "plain"


def plain_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """Softmax attention that leaves a cap and sinks among the keywords that it does not know, as sdpa did."""
    kwargs = {name: value for name, value in kwargs.items() if name not in ("softcap", "s_aux")}
    return sdpa_attention_forward(*args, **kwargs)


@pytest.fixture(scope="module", autouse=True)
def plain() -> Iterator[None]:
    AttentionInterface.register(PLAIN, plain_attention)
    AttentionMaskInterface.register(PLAIN, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    yield
    del AttentionInterface._global_mapping[PLAIN], AttentionMaskInterface._global_mapping[PLAIN]


def sinks_model() -> PreTrainedModel:
    """Return a model with attention sinks, large enough to matter."""
    torch.manual_seed(0)
    config = GptOssConfig(**COMMON, num_local_experts=2, num_experts_per_tok=1, sliding_window=16)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for layer in decoder_layers(model):
        torch.nn.init.constant_(layer.self_attn.sinks, 3.0)
    return model.eval()


MODELS = {"gemma2": lambda: make_model("gemma2"), "qwen3": lambda: make_model("qwen3"), "gpt_oss": sinks_model}
ASKS = {"gemma2": ["attn_logit_softcapping"], "qwen3": [], "gpt_oss": ["sinks"]}


def with_attention(family: str, name: str) -> PreTrainedModel:
    model = MODELS[family]()
    model.set_attn_implementation(name)
    assert attention_implementation(model) == name
    return model


@pytest.mark.parametrize("family", MODELS)
@torch.no_grad()
def test_what_is_left_out_shows_in_the_logits(family: str) -> None:
    """An implementation with a fault gives other logits than the model's own code, and one without gives the same."""
    model = with_attention(family, "eager")
    own = model(PROMPT, use_cache=False).logits
    assert attention_extras(model) == ASKS[family]
    model.set_attn_implementation(PLAIN)
    apart = (model(PROMPT, use_cache=False).logits - own).abs().max()
    assert (apart > rounding(PASS, float(own.abs().max()))) == bool(attention_fault(PLAIN, model))


FAULTS = {
    "eager": "",
    "flex_attention": "",
    "sdpa": "leaves out .* and .*sinks",
    PLAIN: "leaves out .*attn_logit_softcapping.* and .*sinks",
    "flash_attention_2": r"leaves out the attention sinks \(sinks\)$",
    "paged|eager": "attends to the tokens after",
    "paged|sdpa": "attends to the tokens after",
    "kernels-community/of-elsewhere": "",
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_by_the_names_of_implementations(name: str) -> None:
    """The cases are an attention module with a cap and sinks, and one without."""
    module = torch.nn.Module()
    for asks in (False, True):
        got = attention_fault(name, torch.nn.Sequential(module))
        wanted = FAULTS[name] if asks or "after" in FAULTS[name] else ""
        assert re.search(wanted, got) and bool(got) == bool(wanted)
        module.attn_logit_softcapping, module.sinks = 50.0, torch.nn.Parameter(torch.zeros(4))


def collect(model: PreTrainedModel, steering: dspa.Steering) -> None:
    rows = [{"prompt": "the cat", "chosen": "is red", "rejected": "is old"}]
    dspa.collect(model, word_tokenizer(), rows, steering.sae_in, steering.sae_out, progress=False)


TAKERS = {
    "attach": lambda model, steering: steering.attach(model),
    "adapter": lambda model, steering: FSRLAdapter(steering.sae_out, FSRLConfig()).attach(model),
    "collect": collect,
    "layers": lambda model, steering: decoder_layers(model),
}


@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_refused_wherever_a_model_is_taken(family: str, taker: str, steering: dspa.Steering) -> None:
    model = with_attention(family, PLAIN)
    with pytest.raises(dspa.ModelError, match=rf"{PLAIN!r}, which leaves out .*{ASKS[family][0]}.*set_attn_impl"):
        TAKERS[taker](model, steering)
    assert not model._forward_pre_hooks and "generate" not in model.__dict__
    use_same_function(model)
    assert attention_implementation(model) == "eager"
    decoder_layers(model)


@pytest.mark.parametrize("kind", ["steering", "adapter"])
def test_refused_where_it_is_changed_after_attach(kind: str, steering: dspa.Steering) -> None:
    model = with_attention("gemma2", "eager")
    attachable = steering if kind == "steering" else FSRLAdapter(steering.sae_out, FSRLConfig())
    with attachable.attach(model):
        model.set_attn_implementation(PLAIN)
        with pytest.raises(dspa.ModelError, match=rf"{PLAIN!r}, which leaves out"):
            model.generate(PROMPT, max_new_tokens=2)
        model.set_attn_implementation("eager")
        model.generate(PROMPT, max_new_tokens=2)


def test_a_cap_of_some_layers(steering: dspa.Steering) -> None:
    """The modules decide, layer by layer, whatever the configuration says of all of them."""
    model = with_attention("gemma2", PLAIN)
    for layer in list(model.model.layers)[1:]:
        layer.self_attn.attn_logit_softcapping = None
    with pytest.raises(dspa.ModelError, match="leaves out"):
        steering.attach(model)
    model.model.layers[0].self_attn.attn_logit_softcapping = None
    steering.attach(model)


@pytest.mark.parametrize("name", ["sdpa", "eager", PLAIN])
def test_models_that_ask_for_nothing_take_any(name: str, steering: dspa.Steering) -> None:
    model = with_attention("qwen3", name)
    use_same_function(model)
    assert attention_implementation(model) == name
    with steering.attach(model):
        model.generate(PROMPT, max_new_tokens=2)
