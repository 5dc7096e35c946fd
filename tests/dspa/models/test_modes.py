"""A model of which any module is in training mode is refused, wherever it is read or steered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import dspa
from dspa.evaluate.scores import score_triples
from dspa.fsrl import FSRLAdapter, held_out, latent_usage, responses_of
from dspa.testing import L_IN, L_OUT, make_map, make_model, make_sae, word_tokenizer

from ..support.adapters import TRIPLES

PROMPT = torch.tensor([[1, 5, 9, 33, 20, 7]])


def with_lora_dropout(model: PreTrainedModel) -> Any:
    """As `get_peft_model` makes it: the model keeps its mode, and the LoRA's modules are new."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_dropout=0.5, init_lora_weights=False, target_modules=["q_proj"])
    return peft.get_peft_model(model, config)


def with_a_layer_in_training(model: PreTrainedModel) -> PreTrainedModel:
    model.model.layers[0].self_attn.attention_dropout = 0.5
    model.model.layers[0].train()
    return model


def with_a_new_dropout(model: PreTrainedModel) -> PreTrainedModel:
    model.model.layers[0].mlp.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.5))
    return model


class Jitter(nn.Module):
    """Noise in the way of routers of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.input_jitter_noise = 0.1

    def forward(self, h: Tensor) -> Tensor:
        spread = self.input_jitter_noise if self.training else 0.0
        return h * torch.empty_like(h).uniform_(1 - spread, 1 + spread)


def with_jitter(model: PreTrainedModel) -> PreTrainedModel:
    model.model.layers[0].mlp.act_fn = nn.Sequential(nn.SiLU(), Jitter())
    return model


PARTS: dict[str, tuple[Callable[[PreTrainedModel], Any], str]] = {
    "PEFT's dropout": (with_lora_dropout, r"model\.layers\.0\.self_attn\.q_proj\.lora_dropout\.default"),
    "a layer": (with_a_layer_in_training, r"model\.layers\.0\.self_attn\)"),
    "a new module": (with_a_new_dropout, r"model\.layers\.0\.mlp\.act_fn\.1"),
    "noise": (with_jitter, r"model\.layers\.0\.mlp\.act_fn\.1"),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_in_training_mode_changes_residuals(part: str) -> None:
    """Which makes it worth refusing."""
    model = PARTS[part][0](make_model("gemma2", attn_implementation="eager"))
    one, other = (model(input_ids=PROMPT).logits for _ in range(2))
    assert not torch.equal(one, other)


def steer(model: Any) -> None:
    sae_in, sae_out = make_sae(L_IN, 64), make_sae(L_OUT, 64)
    with dspa.Steering(sae_in, sae_out, make_map(sae_in, sae_out)).attach(model):
        model.generate(input_ids=PROMPT, max_new_tokens=2)


def steer_responses(model: Any) -> None:
    sae_in, sae_out = make_sae(L_IN, 64), make_sae(L_OUT, 64)
    steering = dspa.Steering(sae_in, sae_out, make_map(sae_in, sae_out)).attach(model)
    with steering, steering.responses([3]):
        model(PROMPT)


def adapt(model: Any) -> None:
    with FSRLAdapter(make_sae(L_OUT, 64)).attach(model):
        model.generate(input_ids=PROMPT, max_new_tokens=2)


def collect(model: Any) -> None:
    dspa.collect(model, word_tokenizer(), TRIPLES, make_sae(L_IN, 64), make_sae(L_OUT, 64), progress=False)


def usage(model: Any) -> None:
    adapter = FSRLAdapter(make_sae(L_OUT, 64))
    latent_usage(model, adapter, responses_of(model, word_tokenizer(), TRIPLES), progress=False)


DOORS: dict[str, Callable[[Any], object]] = {
    "generate with a Steering": steer,
    "a pass with a Steering": steer_responses,
    "generate with an adapter": adapt,
    "collect": collect,
    "latent_usage": usage,
    "score_triples": lambda model: score_triples(model, word_tokenizer(), TRIPLES, progress=False),
    "held_out": lambda model: held_out(model, word_tokenizer(), TRIPLES, progress=False),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("part", PARTS)
def test_a_part_in_training_mode_is_named(door: str, part: str) -> None:
    change, name = PARTS[part]
    with pytest.raises(dspa.ModelError, match=rf"training mode in part \({name}.*call model\.eval\(\) first"):
        DOORS[door](change(make_model("gemma2")))


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("part", PARTS)
def test_all_of_it_in_evaluation_mode_is_not(door: str, part: str) -> None:
    DOORS[door](PARTS[part][0](make_model("gemma2")).eval())


@pytest.mark.parametrize("door", DOORS)
def test_parts_that_draw_nothing_may_be_in_either_mode(door: str) -> None:
    """As the layers that PEFT, or a package that quantises, puts into a model in evaluation mode."""
    peft = pytest.importorskip("peft")
    model = make_model("gemma2")
    model.model.layers[0].mlp.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.0))
    DOORS[door](peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])))


def test_attaching_to_a_part_in_training_mode_draws_no_numbers() -> None:
    """No pass is run to look at the residual, which would move the generator of a training."""
    model = with_lora_dropout(make_model("gemma2"))
    adapter = FSRLAdapter(make_sae(L_OUT, 64))
    state = torch.get_rng_state()
    with adapter.attach(model):
        assert torch.equal(torch.get_rng_state(), state)
