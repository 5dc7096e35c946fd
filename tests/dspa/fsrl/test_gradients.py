"""Trainings on quantised base models, and on those whose output layer is not what DPO takes it for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from dspa.errors import ModelError
from dspa.testing import make_model, word_tokenizer

from ..support.quantised import Int8Weight, linear_layers, quantise
from ..support.trainings import TINY, run, same_weights

pytest.importorskip("trl")


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def unread():
    raise AssertionError("triples were read")
    yield


@pytest.mark.parametrize(("loss", "checkpointing"), [("simpo", False), ("dpo", True)])
def test_a_quantised_base_is_a_base_of_the_dequantised_weights(tokenizer, tmp_path, loss, checkpointing):
    """No number differs, the adapter stays in fp32, and the weights stay quantised."""
    config = replace(TINY, loss=loss, gradient_checkpointing=checkpointing)
    quantised, plain = quantise(make_model("qwen3"))
    before = sorted(vars(quantised))
    adapter, record = run(quantised, tokenizer, tmp_path / "quantised", config)
    expected, plain_record = run(plain, tokenizer, tmp_path / "plain", config)
    assert same_weights(adapter, expected) and all(p.dtype == torch.float32 for p in adapter.parameters())
    assert record["history"] == plain_record["history"] and record["held_out"] == plain_record["held_out"]
    assert all(isinstance(layer.weight, Int8Weight) for layer in linear_layers(quantised))
    assert sorted(vars(quantised)) == before and "_hf_peft_config_loaded" not in before


def test_peft_on_a_quantised_base(tokenizer, tmp_path):
    adapters = []
    for name, model in zip(("quantised", "plain"), quantise(make_model("qwen3")), strict=True):
        torch.manual_seed(1)
        wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)).eval()
        adapters.append(run(wrapped, tokenizer, tmp_path / name, replace(TINY, loss="dpo", max_steps=2))[0])
    assert same_weights(*adapters)


class ForInference(nn.Module):
    """A kernel without a backward pass. Autograd is told that there is one, and gets nothing from it."""

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, h: Tensor, weight: Tensor) -> Tensor:
            return h @ weight.T

        @staticmethod
        def backward(ctx, gradient: Tensor) -> tuple[None, None]:
            return None, None

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, h: Tensor) -> Tensor:
        return self.Product.apply(h, self.weight)


def test_layers_without_gradients_are_refused(tokenizer, tmp_path):
    """The residual stream would carry gradients around them: wrong ones, with no error."""
    model, _ = quantise(make_model("qwen3"))
    layer = model.model.layers[3].mlp
    layer.up_proj = ForInference(layer.up_proj.weight.dequantised())
    message = r"lets no gradient pass 1 of its layers \(model\.layers\.3\.mlp\.up_proj\).*Load the model anew"
    with pytest.raises(ModelError, match=message):
        run(model, tokenizer, tmp_path / "out", triples=unread())
    assert not any(module._forward_hooks for module in model.modules()) and not (tmp_path / "out").exists()


def test_output_layers_that_dpo_would_misread_are_refused(tokenizer, tmp_path):
    quantised, _ = quantise(make_model("qwen3"))
    quantised.lm_head.weight = nn.Parameter(Int8Weight.of(quantised.lm_head.weight.detach()), requires_grad=False)
    adapted = get_peft_model(make_model("qwen3"), LoraConfig(target_modules=["lm_head"])).eval()
    for model, kind in ((quantised, r"torch\..*\.Linear of a .*Int8Weight"), (adapted, r"peft\..*Linear of a .*")):
        with pytest.raises(
            ModelError, match=f"output layer, in a training with DPO, is a {kind}; accepted: a plain .*`loss`"
        ):
            run(model, tokenizer, tmp_path / "out", replace(TINY, loss="dpo"), triples=unread())
        run(model, tokenizer, tmp_path / kind[:4], replace(TINY, max_steps=1))
