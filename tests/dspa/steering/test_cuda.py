"""Steering with the CUDA backend, in the library that emulates a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import dspa
from dspa.testing import D_IN, make_model
from dspa_kernels.cuda_library import EMULATED

from ...rounding import PASS, rounding

pytestmark = pytest.mark.skipif(not EMULATED, reason="with a CUDA device, test_gpu.py steers on it")
# The fields of an edit that may differ by rounding.
NUMBERS: dict[str, Any] = {"maximum": 0, "before": [], "after": []}
PROMPTS = torch.tensor([[1, 5, 9, 33, 20, 7], [0, 0, 1, 12, 40, 3]])


@pytest.fixture(autouse=True)
def runs_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accept the emulated backend, which `Steering` refuses since users cannot run it."""
    monkeypatch.setattr("dspa.steering.dspa._check_backend", lambda backend: None)


@pytest.mark.parametrize("screen", ["none", "int5"])
@pytest.mark.parametrize("family", ["gemma2", "qwen3"])
def test_the_tokens_of_the_reference(family, screen, sae_in, sae_out, calibrated):
    model = make_model(family, dtype=torch.bfloat16)
    sae_in, sae_out = (sae.to(dtype=torch.bfloat16) for sae in (sae_in, sae_out))
    config = dspa.SteeringConfig(alpha=0.6, k_diff=8, mode="both")
    tokens, tallies = [], []
    for backend in ("reference", "cuda"):
        steering = dspa.Steering(sae_in, sae_out, calibrated, config, backend=backend, screen=screen)
        with steering.attach(model):
            settings = {"attention_mask": (PROMPTS > 0).long(), "max_new_tokens": 8, "do_sample": False}
            tokens.append(model.generate(PROMPTS, **settings))
        tallies.append({name: n for name, n in steering.paths.items() if name != "encoder_rows_read"})
    assert torch.equal(*tokens) and tallies[0] == tallies[1]
    assert sum(tallies[0].values()) > tallies[0]["unsteered"] > 0


def test_a_trace_is_that_of_the_reference(sae_in, sae_out, calibrated):
    model = make_model("gemma2", dtype=torch.bfloat16)
    sae_in, sae_out = (sae.to(dtype=torch.bfloat16) for sae in (sae_in, sae_out))
    traces = []
    for backend in ("reference", "cuda"):
        steering = dspa.Steering(sae_in, sae_out, calibrated, backend=backend, record=True)
        with steering.attach(model):
            model.generate(PROMPTS[:1], max_new_tokens=8, do_sample=False)
        traces.append(steering.trace)
    assert len(traces[0]) == len(traces[1]) > 0
    for ours, theirs in zip(*traces, strict=True):
        assert replace(ours, **NUMBERS) == replace(theirs, **NUMBERS)
        # A latent is a sum of D_IN terms of either sign, and what is left of it a difference to a part of the maximum.
        apart = rounding(PASS, D_IN**0.5 * theirs.maximum)
        for name in NUMBERS:
            assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=0, abs=apart)
