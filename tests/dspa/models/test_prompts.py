"""Prompts that cannot be read with certainty are refused."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

import dspa
from dspa.testing import make_model

PROMPT = torch.tensor([[1, 5, 9, 33, 20, 7]])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "prompt is empty"),
        ({"input_ids": PROMPT, "attention_mask": torch.zeros_like(PROMPT)}, "Prompt 0 of the batch is empty"),
        ({"input_ids": PROMPT, "attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]])}, "padding_side = 'left'"),
        ({"input_ids": torch.tensor([[0, 0, 5, 9]])}, "no attention_mask"),
        ({"input_ids": torch.ones(1, 200, dtype=torch.long)}, "200 tokens and Gemma2ForCausalLM has 128 positions"),
    ],
    ids=["empty", "all padding", "right padding", "padding without a mask", "too long"],
)
def test_prompts(gemma, steering, inputs, message):
    with steering.attach(gemma), pytest.raises(dspa.ModelError, match=message):
        gemma.generate(**inputs, max_new_tokens=2)


@pytest.mark.parametrize("how", ["keyword", "configuration", "positional", "model"])
def test_padding_that_generate_would_infer(sae_in, sae_out, cdmap, how):
    """Without a mask, transformers takes the padding token for padding, wherever its id came from."""
    model = make_model("gemma2")
    model.generation_config.pad_token_id = 0 if how == "model" else None
    config = GenerationConfig(pad_token_id=0, max_new_tokens=2)
    args = (config,) if how == "positional" else ()
    kwargs = {"keyword": {"pad_token_id": 0}, "configuration": {"generation_config": config}}.get(how, {})
    with dspa.Steering(sae_in, sae_out, cdmap).attach(model):
        for tokens in ([[0, 0, 5, 9]], [[1, 5, 0, 9]]):
            with pytest.raises(dspa.ModelError, match="no attention_mask"):
                model.generate(torch.tensor(tokens), *args, **kwargs)


def test_images_are_refused(gemma, steering):
    with steering.attach(gemma), pytest.raises(dspa.ModelError, match="pixel_values"):
        gemma.generate(PROMPT, pixel_values=torch.zeros(1, 3, 8, 8))
