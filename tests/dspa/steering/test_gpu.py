"""Steering on a CUDA device."""

from __future__ import annotations

import pytest
import torch

import dspa
from dspa.fsrl.config import ACTIVATIONS
from dspa.testing import make_model

from ..support.adapters import make_adapter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch finds none"),
]
PROMPT = torch.tensor([[1, 5, 9, 33, 20, 7]])


@pytest.mark.parametrize("screen", ["none", "int5"])
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("family", ["gemma2", "qwen3"])
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_the_tokens_of_the_cpu(backend, family, cache, screen, sae_in, sae_out, calibrated):
    """The SAEs and their stream go to the model's device. A static cache decodes in compiled steps."""
    dtype = torch.bfloat16 if backend == "cuda" else torch.float32
    model = make_model(family, dtype=dtype)
    sae_in, sae_out = (sae.to(dtype=dtype) for sae in (sae_in, sae_out))
    config = dspa.SteeringConfig(alpha=0.6, k_diff=8, mode="both")
    settings = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache}
    with dspa.Steering(sae_in, sae_out, calibrated, config).attach(model):
        wanted = model.generate(PROMPT, max_new_tokens=8, do_sample=False)
    model.cuda()
    with dspa.Steering(sae_in, sae_out, calibrated, config, backend=backend, screen=screen).attach(model):
        assert torch.equal(model.generate(PROMPT.cuda(), **settings).cpu(), wanted)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("family", ["gemma2", "qwen3"])
def test_an_adapter_gives_the_tokens_and_gradients_of_the_cpu(family, cache, activation, sae_out):
    model, adapter = make_model(family).requires_grad_(False), make_adapter(sae_out, activation)
    settings = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache}
    with adapter.attach(model):
        wanted, gradients = model.generate(PROMPT, max_new_tokens=8, do_sample=False), gradients_of(adapter, model)
    model.cuda()
    with adapter.attach(model):
        assert torch.equal(model.generate(PROMPT.cuda(), **settings).cpu(), wanted)
        for ours, theirs in zip(gradients_of(adapter, model), gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


def gradients_of(adapter, model):
    """Gradients of a loss with its penalty, moved to the CPU. There are many rows, as in training."""
    ids = PROMPT.repeat(20, 1).to(model.device)
    adapter.requires_grad_()
    with adapter.recording() as moves:
        loss = model(ids, labels=ids).loss + 1e-2 * moves.l1[0].mean()
    gradients = torch.autograd.grad(loss, list(adapter.parameters()))
    adapter.requires_grad_(False)
    return [gradient.cpu() for gradient in gradients]


@pytest.mark.parametrize("family", ["gemma2", "qwen3", "gpt2"])
def test_the_counts_of_the_cpu(family):
    """In fp32, whose rounding is less than the data's distance from every threshold."""
    pytest.importorskip("scipy", reason="scipy is not installed")
    from ..support.counts import make_case, tables

    case = make_case(family)
    wanted = tables(case.collect())
    case.model.cuda()
    for name, (counts, lengths) in tables(case.collect()).items():
        assert torch.equal(counts, wanted[name][0]) and torch.equal(lengths, wanted[name][1]), name
