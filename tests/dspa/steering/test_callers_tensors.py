"""Tensors of a caller are checked: positions, masks, starts, caches, counts; and so is what an edit makes."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import dspa
from dspa.testing import D_SAE_IN, D_SAE_OUT, L_IN, L_OUT, cache_names, make_map, make_model, make_sae, with_tensors

PROMPT = torch.tensor([[1, 5, 9, 33, 20, 7]])
SEQUENCE = torch.tensor([[1, 5, 9, 33, 20, 7, 44, 12, 31]])
SETTINGS = {"max_new_tokens": 3, "do_sample": False}
RISING = torch.arange(9)[None]


def call(model: Any, steering: dspa.Steering, how: str, **inputs: Tensor) -> None:
    """Generate from `PROMPT`, or teacher-force `SEQUENCE`, with inputs for the columns that it has."""
    if how == "generate":
        inputs = {name: value[:, :6] for name, value in inputs.items()}
        model.generate(PROMPT, **{"attention_mask": torch.ones_like(PROMPT), **inputs}, **SETTINGS)
        return
    with steering.responses([6]):
        model(SEQUENCE, **inputs)


@pytest.mark.parametrize("how", ["generate", "responses"])
@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (RISING.flip(1), "numbers that fall"),
        (torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5]]), "start again"),
        (torch.tensor([[0, 1, 2, 2, 3, 4, 5, 6, 7]]), "stay"),
        (RISING - 3, "numbers >= 0"),
        (RISING.float(), r"torch\.float32 \[1, [69]\]"),
    ],
    ids=["descending", "resetting", "repeated", "negative", "float"],
)
def test_positions(gemma, steering, how, positions, message):
    with steering.attach(gemma), pytest.raises(dspa.ModelError, match=f"`position_ids`.*{message}"):
        call(gemma, steering, how, position_ids=positions)


def test_positions_of_another_shape(gemma, steering):
    mask = torch.ones_like(PROMPT)
    with steering.attach(gemma):
        for positions in (RISING[:, :5], RISING[0, :6], RISING[None, :, :6].expand(3, 1, 6)):
            with pytest.raises(dspa.ModelError, match=r"`position_ids` is .*whole numbers of shape \[1, 6\]"):
                gemma.generate(PROMPT, attention_mask=mask, position_ids=positions, **SETTINGS)


@pytest.mark.parametrize("at_padding", [0, 1])
def test_positions_of_padding_are_the_callers_affair(gemma, sae_in, sae_out, cdmap, at_padding):
    """Both conventions give a short prompt's own edits, and none to its padding."""
    config = dspa.SteeringConfig(alpha=0.6, mode="both", positions="all")
    prompt = torch.tensor([[1, 5]])
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), prompt], dim=1)
    mask = torch.tensor([[0, 0, 0, 1, 1]])
    positions = (mask.cumsum(dim=1) - 1).masked_fill(mask == 0, at_padding)
    with dspa.Steering(sae_in, sae_out, cdmap, config, record=True).attach(gemma) as steering:
        with steering.recording() as alone:
            wanted = gemma.generate(prompt, attention_mask=torch.ones_like(prompt), **SETTINGS)
        with steering.recording() as trace:
            got = gemma.generate(padded, attention_mask=mask, position_ids=positions, **SETTINGS)
    assert torch.equal(got[:, 5:], wanted[:, 2:])
    assert [(e.position, e.latents) for e in trace] == [(e.position, e.latents) for e in alone]


def test_positions_with_a_gap(gemma, steering):
    """They rise, so that there is no doubt about what is steered."""
    with steering.attach(gemma):
        gemma.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), position_ids=RISING[:, :6] * 2 + 3, **SETTINGS)


@pytest.mark.parametrize("how", ["generate", "responses"])
@pytest.mark.parametrize("wrong", [2, float("nan"), -1, 0.5])
def test_masks(gemma, steering, wrong, how):
    mask = torch.ones(1, 9)
    mask[0, 0] = wrong
    with (
        steering.attach(gemma),
        pytest.raises(dspa.ModelError, match=f"A number of `attention_mask` is {wrong:.1f}; accepted: 1 at a token"),
    ):
        call(gemma, steering, how, attention_mask=mask)


def test_a_mask_of_another_shape(gemma, steering):
    with (
        steering.attach(gemma),
        pytest.raises(dspa.ModelError, match=r"`attention_mask` is of shape \[1, 6\]; accepted: shape \[1, 9\]"),
        steering.responses([6]),
    ):
        gemma(SEQUENCE, attention_mask=torch.ones(1, 6))


@pytest.mark.parametrize(
    "starts", [[3.7], [6.0], [float("nan")], [True], torch.tensor([5.5]), np.array([3.7]), ["6"], None, [10**30]]
)
def test_starts_that_are_no_whole_numbers(gemma, steering, starts):
    with (
        steering.attach(gemma),
        pytest.raises(dspa.ModelError, match=r"`starts` is .*; accepted: whole numbers"),
        steering.responses(starts),
    ):
        gemma(SEQUENCE)


@pytest.mark.parametrize("name", cache_names())
def test_a_cache_of_prompt_tokens_that_were_not_steered(gemma, sae_in, sae_out, cdmap, name):
    longer = SEQUENCE[:, :8]
    for positions in ("all", "response"):
        cache = {name: DynamicCache(config=gemma.config)}
        with torch.no_grad():
            gemma(PROMPT, **cache)
        steering = dspa.Steering(sae_in, sae_out, cdmap, dspa.SteeringConfig(positions=positions))
        with steering.attach(gemma):
            if positions == "response":
                gemma.generate(longer, attention_mask=torch.ones_like(longer), **cache, **SETTINGS)
                continue
            with pytest.raises(dspa.ModelError, match=r"cache is of 6 tokens of the prompt; accepted: an empty one"):
                gemma.generate(longer, attention_mask=torch.ones_like(longer), **cache, **SETTINGS)
            with steering.disabled():
                gemma.generate(longer, attention_mask=torch.ones_like(longer), **cache, **SETTINGS)


def test_plans_that_are_all_empty_warn_once(gemma, sae_in, sae_out, cdmap):
    """The map has nothing to weaken."""
    upwards = with_tensors(cdmap, values=cdmap.values.abs())
    base = gemma.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), **SETTINGS)
    with dspa.Steering(sae_in, sae_out, upwards).attach(gemma):
        with pytest.warns(UserWarning, match="No prompt of this call selects a latent to edit"):
            text = gemma.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), **SETTINGS)
        assert torch.equal(text, base)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            gemma.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), **SETTINGS)


@pytest.mark.parametrize("scoring", ["raw", "demixed", "whitened", "confident"])
@pytest.mark.parametrize(
    "counts",
    [
        torch.ones(2, D_SAE_IN - 1, dtype=torch.int32),
        torch.ones(2, D_SAE_IN + 1, dtype=torch.int32),
        torch.ones(2, D_SAE_IN),
        torch.ones(D_SAE_IN, dtype=torch.int32),
        torch.ones(2, D_SAE_IN, dtype=torch.int64),
        [[1] * D_SAE_IN],
    ],
    ids=["narrow", "wide", "float", "one row", "int64", "list"],
)
def test_counts(cdmap, scoring, counts):
    with pytest.raises(ValueError, match=rf"`counts` is .*; accepted: torch\.int32 \[B, {D_SAE_IN}\]"):
        cdmap.select(counts, dspa.SteeringConfig(scoring=scoring))


@pytest.mark.parametrize("scoring", ["raw", "demixed"])
@pytest.mark.parametrize(("name", "width"), [("k_prompt", D_SAE_IN), ("k_diff", D_SAE_OUT)])
def test_k_above_the_width(cdmap, name, width, scoring):
    """A plan of 10**9 slots would take gigabytes."""
    counts = torch.ones(2, D_SAE_IN, dtype=torch.int32)
    for k in (width + 1, 10**9):
        with pytest.raises(ValueError, match=f"`{name}` is {k}; accepted: 1 to the .*, {width}"):
            cdmap.select(counts, dspa.SteeringConfig(scoring=scoring, **{name: k}))


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize(
    ("dtype", "alpha"),
    [(torch.float16, 3e4), (torch.float32, 1e38), (torch.bfloat16, 1e38), (torch.float32, 1e30)],
    ids=str,
)
def test_edits_that_overflow(dtype, alpha, record):
    """Residuals of 1e30 are finite, but the next norm takes them for 0, and all logits are 0."""
    model = make_model("gemma2", dtype=dtype)
    sae_in, sae_out = (make_sae(*place, seed=3).to(dtype=dtype) for place in ((L_IN, D_SAE_IN), (L_OUT, D_SAE_OUT)))
    config = dspa.SteeringConfig(alpha=alpha, mode="augment")
    steering = dspa.Steering(sae_in, sae_out, make_map(sae_in, sae_out), config, record=record)
    mask = torch.ones_like(SEQUENCE)
    with steering.attach(model):
        with pytest.raises(dspa.ModelError, match=r"NaN or infinite, as they came or by their edit \(alpha="):
            model.generate(PROMPT, attention_mask=mask[:, :6], **SETTINGS)
        assert steering.paths["not_finite"] > 0
        with pytest.raises(dspa.ModelError, match="Or lower alpha"), steering.responses([6]), torch.no_grad():
            model(SEQUENCE)


@pytest.mark.parametrize("name", ["input_ids", "inputs_embeds"])
@pytest.mark.parametrize("prompt", [[[1, 5, 9]], np.array([[1, 5, 9]])], ids=["list", "numpy"])
def test_prompts_that_are_no_tensors(gemma, steering, name, prompt):
    with (
        steering.attach(gemma),
        pytest.raises(dspa.ModelError, match=f"`{name}` is a .*; accepted: a tensor"),
    ):
        gemma.generate(**{name: prompt}, **SETTINGS)


def test_a_path_of_layers_that_is_no_text(gemma, steering):
    with pytest.raises(dspa.ModelError, match="`layers` is 3; accepted: text"):
        steering.attach(gemma, layers=3)
