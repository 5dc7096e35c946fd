"""Ablations: scores with a fraction of v kept, and with sets of latents masked."""

from __future__ import annotations

import math

import pytest
import torch

from dspa.errors import ModelError
from dspa.fsrl import (
    Scores,
    Usage,
    ablations,
    compare_texts,
    fraction_curve,
    mask_effect,
    score_responses,
)
from dspa.fsrl.ablations import MaskEffect
from dspa.testing import D_SAE_OUT, make_model

from ..support.adapters import UNUSED, acting_adapter


@pytest.fixture(scope="module")
def model():
    return make_model("gemma2")


# Fractions


def test_fraction_0_is_the_base_model_and_1_the_adapter(model, adapter, responses):
    curve = fraction_curve(model, adapter, responses, fractions=(0.0, 0.1, 1.0), progress=False)
    nothing, some, whole = curve.scores
    with adapter.disabled():
        base = score_responses(model, responses, progress=False)
    assert torch.equal(nothing.margins, base.margins) and torch.equal(curve.base.margins, base.margins)
    assert torch.equal(whole.margins, score_responses(model, responses, progress=False).margins)
    assert float((some.margins - base.margins).abs().mean()) > 1e-4
    assert float((some.margins - whole.margins).abs().mean()) > 1e-4
    rows = curve.rows()
    assert [row["fraction"] for row in rows] == ["", 0.0, 0.1, 1.0]
    assert (rows[0]["win_rate"], rows[1]["win_rate"]) == (0.5, 0.5)
    assert rows[2]["loss"] == some.loss and rows[2]["win_rate"] == some.win_rate(base)


def test_mask_and_fraction_come_back_after_an_error(model, adapter, responses, used, monkeypatch):
    mask = torch.arange(D_SAE_OUT) < 100
    adapter.mask, adapter.fraction = mask, 0.7
    calls = []

    def failing(*_args, **_settings):
        calls.append((adapter.mask, adapter.fraction))
        if len(calls) % 4 == 0:
            raise RuntimeError("stopped")
        return Scores(torch.zeros(14), torch.zeros(14))

    monkeypatch.setattr(ablations, "score_responses", failing)
    with pytest.raises(RuntimeError, match="stopped"):
        fraction_curve(model, adapter, responses, progress=False)
    assert calls[-1][1] != 0.7 and torch.equal(adapter.mask, mask) and adapter.fraction == 0.7
    with pytest.raises(RuntimeError, match="stopped"):
        mask_effect(model, adapter, responses, [0, 1], used, progress=False)
    assert not torch.equal(calls[-1][0], mask) and torch.equal(adapter.mask, mask)


@pytest.mark.parametrize("fractions", [(), (0.5, 1.1), (-0.1,), (math.nan,)])
def test_invalid_fractions(model, adapter, responses, fractions):
    with pytest.raises(ValueError, match="accepted: one or more numbers from 0 to 1"):
        fraction_curve(model, adapter, responses, fractions=fractions, progress=False)


def test_an_adapter_has_to_be_attached(model, tokenizer, responses):
    loose = acting_adapter(model, responses)
    usage = Usage(torch.ones(D_SAE_OUT, dtype=torch.int64), torch.ones(D_SAE_OUT), 1)
    with pytest.raises(ModelError, match="not attached"):
        fraction_curve(model, loose, responses, progress=False)
    with pytest.raises(ModelError, match="not attached"):
        mask_effect(model, loose, responses, [1], usage, progress=False)
    with pytest.raises(ModelError, match="not attached"):
        compare_texts(model, tokenizer, loose, [[1, 5], [1, 6]], progress=False)


# Masks


def test_all_latents_masked_are_the_base_model(model, adapter, responses, used):
    effect = mask_effect(model, adapter, responses, range(D_SAE_OUT), used, n_random=2, progress=False)
    assert effect.n_given == D_SAE_OUT and len(effect.latents) == D_SAE_OUT - UNUSED
    for masked in (effect.given, *effect.random):
        assert torch.equal(masked.margins, effect.base.margins)
    assert not torch.equal(effect.whole.margins, effect.base.margins)


def test_random_sets_are_as_large_and_of_latents_that_are_used(model, adapter, responses, used, monkeypatch):
    own = torch.ones(D_SAE_OUT, dtype=torch.bool)
    own[3] = False
    adapter.mask = own
    masks = []

    def record_mask(*_args, **_settings):
        masks.append(adapter.mask)
        return Scores(torch.rand(14), torch.rand(14))

    monkeypatch.setattr(ablations, "score_responses", record_mask)

    def drawn(seed: int) -> list[list[int]]:
        masks.clear()
        given = [0, 5, 5, 40, D_SAE_OUT - 1]  # one of them twice, and one that is never moved
        mask_effect(model, adapter, responses, given, used, n_random=30, seed=seed, progress=False)
        base, whole, *rest = masks
        assert torch.equal(base, own) and torch.equal(whole, own)
        assert not any(bool(mask[3]) for mask in rest)
        return [[n for n in range(D_SAE_OUT) if n != 3 and not mask[n]] for mask in rest]

    given, *random = drawn(0)
    assert given == [0, 5, 40]
    # Latent 3, which may be drawn, is masked anyway.
    assert {len(latents) for latents in random} <= {2, 3}
    assert {n for latents in random for n in latents} <= set(used.ranked.tolist())
    assert len({tuple(latents) for latents in random}) > 25
    assert drawn(0)[1:] == random != drawn(1)[1:]


def effect_of(losses: list[float], given: float) -> MaskEffect:
    """An effect with these losses of the random sets, and this of the given one."""

    def scores(loss: float) -> Scores:
        return Scores(torch.tensor([0.5 - math.log(math.expm1(loss))], dtype=torch.float64), torch.zeros(1), beta=1.0)

    return MaskEffect(scores(1.0), scores(1.0), scores(given), tuple(map(scores, losses)), torch.tensor([0]), 1)


def test_a_set_compared_with_random_ones_by_hand():
    # Of 1, 2, 3: mean 2, standard error 1 / sqrt 3, and t is 4.302653 at 97.5 % with two degrees of freedom.
    comparison = effect_of([1.0, 2.0, 3.0], 2.5).compare("loss")
    t = 4.302652729749464  # of Student's distribution with 2 degrees of freedom, at 0.975
    assert (comparison.mean, comparison.low, comparison.high) == pytest.approx((2, 2 - t / 3**0.5, 2 + t / 3**0.5))
    assert (comparison.given, comparison.percentile) == pytest.approx((2.5, 200 / 3))
    same = effect_of([2.0, 2.0], 2.0).compare("loss")
    assert (same.mean, same.low, same.high, same.percentile) == pytest.approx((2, 2, 2, 50))


def test_sets_that_cannot_be_masked(model, adapter, responses, used):
    for latents, settings, message in (
        ([], {}, "`latents` is empty; accepted: one or more numbers from 0 to 127"),
        ([4, 128, -1], {}, r"Part of `latents` is \[128, -1\]"),
        ([D_SAE_OUT - 1], {}, "None of the 1 given latents is moved"),
        ([4], {"n_random": 1}, "`n_random` is 1; accepted: 2 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            mask_effect(model, adapter, responses, latents, used, progress=False, **settings)
