"""`dspa.models.reading`: what the decoder layers of a model have to return."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MllamaForCausalLM, MllamaTextConfig, PreTrainedModel

import dspa
from dspa.errors import ModelError
from dspa.fsrl import FSRLAdapter, FSRLConfig
from dspa.models.layers import decoder_layers
from dspa.models.reading import hidden, read_layers
from dspa.testing import COMMON, D_IN, L_IN, L_OUT, RECURRENT, make_map, make_model, make_sae, word_tokenizer

PROMPT = torch.tensor([[1, 5, 9, 33, 20, 7]])


class Streams:
    """A decoder layer that returns its residual in another form, made by `turn`, and takes it back."""

    turn: Callable[[Tensor], Any]
    back: Callable[[Any], Tensor]

    def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        h = hidden_states if isinstance(hidden_states, Tensor) and hidden_states.dim() == 3 else None
        h = h if h is not None and h.shape[-1] == D_IN else type(self).back(hidden_states)
        return type(self).turn(super().forward(h, *args, **kwargs))  # type: ignore[misc]


FORMS: dict[str, tuple[Callable, Callable, str]] = {
    "streams first": (lambda h: torch.stack([h, 0 * h]), lambda s: s[0], rf"of shape \[2, 1, \d, {D_IN}\]"),
    "streams within": (lambda h: torch.stack([h, h], dim=2), lambda s: s[:, :, 0], rf"of shape \[1, \d, 2, {D_IN}\]"),
    "streams side by side": (lambda h: torch.cat([h, h], dim=2), lambda s: s[..., :D_IN], rf"\[1, \d, {2 * D_IN}\]"),
    "packed": (lambda h: h.flatten(0, 1), lambda s: s[None], rf"of shape \[\d, {D_IN}\]"),
    "an object": (lambda h: SimpleNamespace(h=h), lambda s: s.h, "a SimpleNamespace"),
}


def with_form(form: str) -> PreTrainedModel:
    model = make_model("qwen3")
    turn, back, _ = FORMS[form]
    for layer in decoder_layers(model):
        members = {"turn": staticmethod(turn), "back": staticmethod(back)}
        layer.__class__ = type("Layer", (Streams, type(layer)), members)
    model.model.norm = nn.Sequential(Unturned(back), model.model.norm)
    return model


class Unturned(nn.Module):
    def __init__(self, back: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.back = back

    def forward(self, hidden_states: Any) -> Tensor:
        return self.back(hidden_states)


def collect(model: PreTrainedModel, steering: dspa.Steering) -> None:
    rows = [{"prompt": "the cat", "chosen": "is red", "rejected": "is old"}]
    dspa.collect(model, word_tokenizer(), rows, steering.sae_in, steering.sae_out, progress=False)


TAKERS = {
    "attach": lambda model, steering: steering.attach(model),
    "adapter": lambda model, steering: FSRLAdapter(steering.sae_out).attach(model),
    "collect": collect,
    "read": lambda model, steering: read_layers(model, [L_OUT], input_ids=PROMPT),
}


@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize("form", FORMS)
def test_what_is_no_residual_is_refused(form: str, taker: str, steering: dspa.Steering) -> None:
    model = with_form(form)
    assert torch.equal(model(PROMPT).logits, make_model("qwen3")(PROMPT).logits)
    with pytest.raises(dspa.ModelError, match=FORMS[form][2] + rf"; accepted: one .*\[B, T, {D_IN}\]"):
        TAKERS[taker](model, steering)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("taker", TAKERS)
def test_a_layer_that_text_skips_is_refused(taker: str, steering: dspa.Steering) -> None:
    """A layer of cross-attention to images does not run where there are none."""
    sizes = {name: size for name, size in COMMON.items() if name != "head_dim"}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = MllamaTextConfig(**sizes, cross_attention_layers=[L_OUT], rope_parameters=rope)
    with pytest.raises(dspa.ModelError, match=f"Layer {L_OUT} .*did not run.* skips for text"):
        TAKERS[taker](MllamaForCausalLM(config).eval(), steering)


@pytest.mark.parametrize("form", FORMS)
def test_a_hook_refuses_what_attach_could_not_see(form: str, sae_out: dspa.FrozenSAE) -> None:
    model = with_form(form)
    with FSRLAdapter(sae_out).attach(model.train()), pytest.raises(dspa.ModelError, match=FORMS[form][2]):
        model(PROMPT)


def test_attach_draws_no_random_numbers(steering: dspa.Steering) -> None:
    model = make_model("gpt2").train()
    before = torch.get_rng_state()
    steering.attach(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_tuple_of_an_earlier_version() -> None:
    h = torch.zeros(2, 3, D_IN)
    assert hidden((h, None), D_IN) is h and hidden(h, D_IN) is h


def test_layers_that_get_no_keywords_can_be_read() -> None:
    model = make_model("mamba")
    states = model(PROMPT, output_hidden_states=True).hidden_states
    read = read_layers(model, [0, 2], "backbone.layers", input_ids=PROMPT)
    # Mamba's hidden states begin after the first block.
    assert torch.equal(read[0], states[0]) and torch.equal(read[2], states[2])


@pytest.mark.parametrize(("family", "layers"), [("mamba", "backbone.layers"), ("recurrent_gemma", None)])
def test_layers_that_get_no_keywords_cannot_be_steered(family: str, layers: str | None) -> None:
    """It is known before a map is used, and nothing stays attached. An adapter needs no keywords."""
    model = make_model(family)
    sae_in, sae_out = make_sae(L_IN, 96, seed=1), make_sae(L_OUT, 128, seed=2)
    steering = dspa.Steering(sae_in, sae_out, make_map(sae_in, sae_out))
    with pytest.raises(ModelError, match=r"whose layers get no .*`position_ids`"):
        steering.attach(model, layers=layers)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with FSRLAdapter(sae_out, FSRLConfig()).attach(model, layers=layers) as adapter, adapter.recording() as moves:
        model(PROMPT)
    assert len(moves.l0) == 1


def test_recurrent_families_are_read_as_plain_passes_read_them() -> None:
    for family in set(RECURRENT) - {"mamba"}:
        model = make_model(family)
        states = model(PROMPT, output_hidden_states=True).hidden_states
        assert torch.equal(read_layers(model, [L_OUT], input_ids=PROMPT)[L_OUT], states[L_OUT + 1]), family
