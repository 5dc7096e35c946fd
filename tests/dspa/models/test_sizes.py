"""Sizes of models, against what PyTorch counts and against sums written out here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from dspa import ModelError
from dspa.models.sizes import empty_model, sizes_of
from dspa.testing import FAMILIES, make_model


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_those_of_the_products_that_pytorch_counts(family: str) -> None:
    """One token attends to itself: two operations per weight, and two products of the width of all heads."""
    model = make_model(family, attn_implementation="eager")
    sizes = sizes_of(model)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.tensor([[5]]), use_cache=False)
    counted = 2 * sizes.weights + 4 * sizes.d_attention * len(sizes.layers)
    # Some versions of transformers compute the angles of rotary embeddings by a product of negligible size.
    assert counter.get_total_flops() == pytest.approx(counted, rel=1e-3)
    assert sizes.weights_to(1) == 2 * sizes.layers[0] and sizes.d_model == 48


def test_a_token_uses_some_of_the_experts() -> None:
    config = CONFIG_MAPPING["mixtral"](
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=11,
        num_local_experts=8,
        num_experts_per_tok=2,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    attention, router, expert = 2 * 16 * 16 + 2 * 16 * 8, 16 * 8, 3 * 16 * 32
    assert sizes_of(model, "bfloat16").layers == (attention + router + 2 * expert,) * 2


def test_a_configuration_is_enough(tmp_path: Path) -> None:
    model = make_model("gemma2", dtype=torch.bfloat16)
    model.config.save_pretrained(tmp_path / "tiny")
    empty = empty_model(str(tmp_path / "tiny"))
    assert all(parameter.is_meta for parameter in empty.parameters())
    sizes = sizes_of(empty)
    assert sizes == replace(sizes_of(model), name="tiny") and sizes.dtype == torch.bfloat16
    assert sizes_of(empty, "float32", "model.layers") == replace(sizes, dtype=torch.float32)


def test_a_configuration_without_a_dtype() -> None:
    model = make_model("gemma2")
    model.config.dtype = None
    with pytest.raises(
        ModelError, match="`dtype` is auto, and the configuration of the model names none; accepted: bf"
    ):
        sizes_of(model)
