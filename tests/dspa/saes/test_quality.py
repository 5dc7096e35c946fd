"""The quality of an SAE, against formulas written out here."""

from __future__ import annotations

import pytest
import torch

from dspa.saes.quality import evaluate_sae, weaknesses
from dspa.testing import D_IN, make_sae


def test_evaluate():
    start = make_sae(2, 96, seed=5)
    start.weights.threshold[:5] = torch.inf
    h = torch.randn(50, D_IN, generator=torch.Generator().manual_seed(0))
    f = start.encode(h)
    error = (start.decode(f).double() - h).square().sum().item()
    total = (h.double() - h.double().mean(0)).square().sum().item()
    quality = evaluate_sae(start, h)
    assert quality.explained_variance == pytest.approx(1 - error / total)
    assert quality.l0 == pytest.approx((f > 0).sum().item() / 50)
    assert 0 < quality.dead == ((f > 0).sum(0) == 0).sum().item()
    assert quality.mse == pytest.approx(error / 50)


def test_variance_of_the_tokens_farthest_away():
    h = torch.randn(300, D_IN, generator=torch.Generator().manual_seed(0))
    h[[7, 100, 250]] *= 3
    squares = (h.double() - h.double().mean(0)).square().sum(1)
    quality = evaluate_sae(make_sae(2, 96, seed=5), h)
    assert quality.n_left_out == 0
    assert quality.top_variance == pytest.approx((squares[[7, 100, 250]].sum() / squares.sum()).item())


GOOD = {
    "explained_variance": 0.85,
    "explained_variance_before": 0.1,
    "explained_variance_all": -40.0,
    "top_variance": 0.08,
    "l0": 47.0,
    "k": 48,
    "dead": 300,
    "n_tokens": 16_384,
    "dead_training": 60,
    "dead_window_tokens": 250_000,
    "d_sae": 2048,
    "n_uses": 5000.0,
}


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        ({}, ()),
        ({"dead_training": 205}, ("10% of the latents are dead: 205 of 2048 were not active on 250,000 tokens",)),
        # The training's last window is shorter than the held-out text.
        ({"dead_window_tokens": 7000}, ("15% of the latents are dead: 300 of 2048 were not active on 16,384 tokens",)),
        ({"explained_variance": 0.69}, ("The explained variance is 0.690",)),
        (
            {"explained_variance_before": 0.9},
            ("The training made the SAE worse: its explained variance fell from 0.9",),
        ),
        ({"l0": 61.0}, ("At inference 61.0 latents are active per token, in training 48 were",)),
        ({"l0": 35.0}, ("At inference 35.0 latents are active per token, in training 48 were",)),
        ({"explained_variance_all": 0.99}, ("the explained variance is 0.990 with them and 0.850 without",)),
        ({"top_variance": 0.3}, ("1 % of the tokens hold 30% of the variance",)),
        ({"n_uses": 999.0}, ("A latent was active on 999 tokens of the training on average",)),
        ({"explained_variance": 0.2, "n_uses": 90}, ("The explained variance is 0.200", "was active on 90 tokens")),
    ],
)
def test_weaknesses(changed, wanted):
    reported = weaknesses({**GOOD, **changed})
    assert len(reported) == len(wanted) and all(part in text for part, text in zip(wanted, reported, strict=True))


def test_what_is_not_recorded_is_not_judged():
    assert weaknesses({}) == weaknesses({"dead": 90, "d_sae": 100}) == weaknesses({"l0": 5.0, "d_sae": 100}) == []


@pytest.mark.parametrize("rows", [torch.zeros(0, D_IN), torch.ones(1, D_IN), torch.ones(3, D_IN)])
def test_rows_without_variance(rows):
    with pytest.raises(
        ValueError, match=rf"sample to report on is {len(rows)} tokens without variance.*held_out_tokens"
    ):
        evaluate_sae(make_sae(2, 96), rows)
