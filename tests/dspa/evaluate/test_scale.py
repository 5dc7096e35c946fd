"""The search of a scale, on curves that are known and with methods of every kind on a small model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import dspa
from dspa.errors import ModelError
from dspa.evaluate import scale as module
from dspa.evaluate.scale import find_scale
from dspa.models.layers import decoder_layers
from dspa.testing import D_IN, L_OUT, make_model

MODEL: Any = make_model("qwen3")
# What the model itself writes, so that it becomes less likely whatever is added.
TEXTS = [
    MODEL.generate(torch.tensor([[n]]), max_new_tokens=length, do_sample=False)[0].tolist()
    for n, length in ((3, 6), (10, 2), (20, 4))
]


@pytest.fixture(scope="module")
def model() -> Any:
    return MODEL


@pytest.fixture(scope="module")
def vector() -> dspa.SteeringVector:
    return dspa.SteeringVector(torch.randn(D_IN, generator=torch.Generator().manual_seed(0)), L_OUT, 77.0)


def plain_cross_entropy(model: Any, added: torch.Tensor, skipped: int = 1) -> float:
    def add(_module: Any, _args: Any, output: Any) -> Any:
        return (output[0] + added, *output[1:]) if isinstance(output, tuple) else output + added

    handle = decoder_layers(model)[L_OUT].register_forward_hook(add)
    losses = []
    for ids in TEXTS:
        if len(ids) > skipped:
            logits = model(torch.tensor([ids])).logits[0, skipped - 1 : -1]
            losses += nn.functional.cross_entropy(logits, torch.tensor(ids[skipped:]), reduction="none").tolist()
    handle.remove()
    return sum(losses) / len(losses)


def test_cross_entropy_is_that_of_plain_passes(model: Any, vector: dspa.SteeringVector) -> None:
    found = find_scale(model, vector, TEXTS, delta=0.3)
    assert found.base == pytest.approx(plain_cross_entropy(model, torch.zeros(D_IN)), abs=1e-5)
    for tried in (found.below, found.above):
        wanted = plain_cross_entropy(model, tried.scale * vector.vector)
        assert tried.cross_entropy == pytest.approx(wanted, abs=1e-4)
    assert found.below.scale < found.scale <= found.above.scale <= found.below.scale / 0.95 + 1e-9
    assert found.below.cross_entropy < found.base + 0.3 <= found.above.cross_entropy
    assert plain_cross_entropy(model, found.scale * vector.vector) == pytest.approx(found.base + 0.3, abs=0.03)
    assert found.n_tokens == 6 + 2 + 4


def test_texts_begin_after_their_prompts(model: Any, vector: dspa.SteeringVector) -> None:
    found = find_scale(model, vector, TEXTS, delta=0.3, prompt_tokens=4)
    assert found.base == pytest.approx(plain_cross_entropy(model, torch.zeros(D_IN), 4), abs=1e-5)
    assert found.n_tokens == 3 + 1


def curve(monkeypatch: pytest.MonkeyPatch, model: Any, rise: Callable[[float], float]) -> list[float]:
    """Let the cross-entropy be a given one of the scale; returns the scales tried."""
    tried: list[float] = []

    def measured(_model: Any, _texts: Any, _batch_tokens: int) -> float:
        attached = model.__dict__.get("_dspa_attachment")
        scale = attached.attached[0].scale if attached else 0.0
        tried.append(scale)
        return 2.0 + rise(scale)

    monkeypatch.setattr(module, "cross_entropy", measured)
    return tried


def test_a_line_is_interpolated_exactly(
    monkeypatch: pytest.MonkeyPatch, model: Any, vector: dspa.SteeringVector
) -> None:
    tried = curve(monkeypatch, model, lambda scale: 0.01 * scale)
    found = find_scale(model, vector, TEXTS)
    assert found.scale == pytest.approx(50) and found.base == 2
    assert tried[:8] == [0, 1, 2, 4, 8, 16, 32, 64] and len(tried) < 16


@pytest.mark.parametrize("rise", [lambda s: 1e-4 * s**2, lambda s: 0.0 if s < 41 else 5.0, lambda s: s / 30 * (s > 30)])
def test_other_curves(monkeypatch: pytest.MonkeyPatch, model: Any, vector: Any, rise: Callable[[float], float]) -> None:
    curve(monkeypatch, model, rise)
    found = find_scale(model, vector, TEXTS)
    assert rise(found.below.scale) < 0.5 <= rise(found.above.scale)
    assert found.above.scale - found.below.scale <= 0.05 * found.above.scale


def test_what_overflows_is_above(monkeypatch: pytest.MonkeyPatch, model: Any, vector: dspa.SteeringVector) -> None:
    curve(monkeypatch, model, lambda scale: 0.01 * scale if scale < 20 else float("inf"))
    found = find_scale(model, vector, TEXTS)
    assert 19 <= found.scale == found.below.scale < 20


def test_the_first_scale_may_be_too_large(monkeypatch: pytest.MonkeyPatch, model: Any, vector: Any) -> None:
    tried = curve(monkeypatch, model, lambda scale: 100 * scale)
    assert find_scale(model, vector, TEXTS, start=4.0).scale == pytest.approx(0.005)
    assert max(tried) == 4


def test_not_reached(monkeypatch: pytest.MonkeyPatch, model: Any, vector: dspa.SteeringVector) -> None:
    tried = curve(monkeypatch, model, lambda scale: 0.01 * scale)
    message = r"rise of the cross-entropy is \+0\.3 at 30, the largest scale; accepted: 0\.5 .* Raise `maximum`"
    with pytest.raises(ValueError, match=message):
        find_scale(model, vector, TEXTS, maximum=30)
    assert tried[-1] == 30 and "_dspa_attachment" not in model.__dict__


def test_a_method_that_plans_per_prompt(sae_in: Any, sae_out: Any, cdmap: Any) -> None:
    config = dspa.SteeringConfig(mode="both")
    prompts = torch.arange(3, 60)[torch.randint(57, (9, 20), generator=torch.Generator().manual_seed(0))]
    texts = MODEL.generate(prompts, max_new_tokens=18, do_sample=False).tolist()

    def at(alpha: float) -> dspa.Steering:
        return dspa.Steering(sae_in, sae_out, cdmap, replace(config, alpha=alpha))

    found = find_scale(MODEL, at, texts, delta=0.02, start=0.1, prompt_tokens=20)
    assert found.below.cross_entropy < found.base + 0.02 <= found.above.cross_entropy
    assert found.n_tokens == 9 * 18


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texts": []}, "`texts` is without one that is long enough; accepted: 2 tokens or more"),
        ({"prompt_tokens": 9}, "accepted: 10 tokens or more"),
        ({"delta": 0}, "`delta` is 0"),
        ({"start": -1}, "`start` is -1"),
        ({"maximum": float("inf")}, "`maximum` is inf"),
        ({"maximum": 0.5}, "`maximum` is 0.5; accepted: `start` \\(1\\) or more"),
        ({"batch_tokens": 0}, "`batch_tokens` is 0"),
    ],
)
def test_bad_settings(model: Any, vector: dspa.SteeringVector, change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_scale(model, vector, **({"texts": TEXTS} | change))


def test_a_vector_of_another_model(model: Any) -> None:
    with pytest.raises(ModelError, match="was made with another model"):
        find_scale(model, dspa.SteeringVector(torch.ones(D_IN + 1), L_OUT), TEXTS)
