"""Attaching and detaching; nothing is left behind."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

import dspa

PROMPT = torch.tensor([[1, 5, 9, 33, 20, 7]])


def test_attach_twice(gemma, steering, sae_in, sae_out, cdmap):
    steering.attach(gemma)
    with pytest.raises(dspa.ModelError, match=r"attached to a Gemma2ForCausalLM already: detach\(\) it first"):
        steering.attach(gemma)
    with pytest.raises(dspa.ModelError, match="Layer 2 of this model is steered already"):
        dspa.Steering(sae_in, sae_out, cdmap).attach(gemma)
    steering.detach()
    steering.detach()
    with steering.attach(gemma):
        gemma.generate(PROMPT, max_new_tokens=1)


def test_detach_while_generating(gemma, steering):
    class Detach(StoppingCriteria):
        def __call__(self, *_: object, **__: object) -> torch.Tensor:
            steering.detach()
            return torch.tensor([False])

    steering.attach(gemma)
    with pytest.raises(dspa.ModelError, match="detached while generate"):
        gemma.generate(PROMPT, max_new_tokens=4, stopping_criteria=StoppingCriteriaList([Detach()]))


def test_failed_generation_leaves_the_model_clean(gemma, steering):
    before = dict(gemma.__dict__)
    with steering.attach(gemma), pytest.raises(ValueError, match="nonsense"):
        gemma.generate(PROMPT, nonsense=1)
    assert gemma.__dict__ == before


def test_a_copy_of_a_steered_model(gemma, steering):
    with steering.attach(gemma), pytest.raises(dspa.ModelError, match="cannot be copied"):
        copy.deepcopy(gemma)
    copy.deepcopy(gemma)


def test_detach_without_the_steering(gemma, sae_in, sae_out, cdmap):
    before = dict(gemma.__dict__)
    dspa.Steering(sae_in, sae_out, cdmap).attach(gemma)
    dspa.detach(gemma)
    dspa.detach(gemma)
    assert gemma.__dict__ == before
    gemma(PROMPT)
