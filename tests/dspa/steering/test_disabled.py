"""`Steering.disabled()`: the base model within it, and steering as before after it."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

import dspa
from dspa.testing import make_map, make_sae

from ...rounding import assert_same_logits
from .test_generate import PROMPTS, compiled_decoding, new_tokens, padded

SEQUENCE = torch.tensor([[1, 5, 9, 33, 20, 7, 44, 12, 31]])
SETTINGS = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture
def attached(gemma, steering):
    return steering.attach(gemma)


def generated(model) -> torch.Tensor:
    return model.generate(**padded(PROMPTS), **SETTINGS)


def test_generate(gemma, steering):
    base = generated(gemma)
    with steering.attach(gemma):
        with steering.disabled():
            assert torch.equal(generated(gemma), base)
            assert steering.plan is None and not any(steering.paths.values())
        steered = generated(gemma)
        assert not torch.equal(steered, base)
        with steering.disabled():
            assert torch.equal(generated(gemma), base)
        assert torch.equal(generated(gemma), steered)
    with steering.disabled(), steering.attach(gemma):
        assert torch.equal(generated(gemma), base)


def test_prompts_that_steering_refuses(gemma, attached):
    """The base model accepts them."""
    right_padded = {"input_ids": torch.tensor([[1, 5, 9, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    with attached.disabled():
        gemma.generate(**right_padded, max_new_tokens=1)
    with pytest.raises(dspa.ModelError, match="padded on the right"):
        gemma.generate(**right_padded, max_new_tokens=1)


@torch.no_grad()
def test_forward(gemma, steering):
    base, last = gemma(SEQUENCE).logits, gemma.model(SEQUENCE).last_hidden_state
    with steering.attach(gemma):
        with steering.disabled():
            assert torch.equal(gemma(SEQUENCE).logits, base)
            assert torch.equal(gemma.model(SEQUENCE).last_hidden_state, last)
        with pytest.raises(dspa.ModelError, match=r"responses\(starts\)"):
            gemma(SEQUENCE)
        with steering.responses([5]):
            steered = gemma(SEQUENCE).logits
            with steering.disabled():
                assert torch.equal(gemma(SEQUENCE).logits, base)
            assert torch.equal(gemma(SEQUENCE).logits, steered)
        assert not torch.equal(steered, base)


@torch.no_grad()
def test_responses_of_the_base_model(gemma, steering):
    """Code that scores responses works for both models."""
    base = gemma(SEQUENCE).logits
    with steering.attach(gemma), steering.disabled(), steering.responses([5]):
        assert torch.equal(gemma(SEQUENCE).logits, base)


def test_nested(gemma, attached):
    with attached.disabled():
        with attached.disabled():
            gemma(SEQUENCE)
        gemma(SEQUENCE)
    with pytest.raises(dspa.ModelError, match="outside of generate"):
        gemma(SEQUENCE)


def test_exceptions(gemma, attached):
    steered = generated(gemma)
    with pytest.raises(ZeroDivisionError), attached.disabled():
        _ = 1 / 0
    with attached.disabled(), pytest.raises(ValueError, match="nonsense"):
        gemma.generate(SEQUENCE, nonsense=1)
    assert torch.equal(generated(gemma), steered)


def test_detached_while_disabled(gemma, attached):
    with attached.disabled():
        attached.detach()
        gemma(SEQUENCE)
    with attached.attach(gemma), pytest.raises(dspa.ModelError, match="outside of generate"):
        gemma(SEQUENCE)


def test_while_generating(gemma, attached):
    """Text with an unsteered end is an error."""

    blocks = ExitStack()

    class Disable(StoppingCriteria):
        def __call__(self, *_: object, **__: object) -> torch.Tensor:
            blocks.enter_context(attached.disabled())
            return torch.tensor([False])

    with blocks, pytest.raises(dspa.ModelError, match="Steering was detached or disabled while generate"):
        gemma.generate(SEQUENCE, max_new_tokens=4, stopping_criteria=StoppingCriteriaList([Disable()]))


def test_one_of_two(gemma, sae_in, steering):
    late = make_sae(3, 80, seed=7)
    other = dspa.Steering(sae_in, late, make_map(sae_in, late, seed=8), steering.config)
    with other.attach(gemma):
        alone = generated(gemma)
        with steering.attach(gemma):
            assert not torch.equal(generated(gemma), alone)
            with steering.disabled():
                assert torch.equal(generated(gemma), alone)


def test_compiled_decoding(gemma, steering):
    """One graph per step, without a break, with steering and without it."""
    config = compiled_decoding()
    base = new_tokens(generated(gemma))
    torch.compiler.reset()
    with steering.attach(gemma):
        steered = new_tokens(generated(gemma))
        assert steered != base
        for _ in range(2):
            assert new_tokens(gemma.generate(**padded(PROMPTS), generation_config=config)) == steered
            with steering.disabled():
                assert new_tokens(gemma.generate(**padded(PROMPTS), generation_config=config)) == base
    torch.compiler.reset()


@torch.no_grad()
def test_compiled_forward(gemma, steering):
    torch.compiler.reset()
    base = gemma(SEQUENCE).logits
    with steering.attach(gemma):
        compiled = torch.compile(gemma, backend="eager")
        with steering.responses([5]):
            steered = gemma(SEQUENCE).logits
        for _ in range(2):
            with steering.disabled():
                assert_same_logits(compiled(SEQUENCE).logits, base)
            with steering.responses([5]):
                assert_same_logits(compiled(SEQUENCE).logits, steered)
            with pytest.raises(dspa.ModelError, match="outside of generate"):
                compiled(SEQUENCE)
    torch.compiler.reset()
