"""The quality of an SAE, against formulas written out here."""

from __future__ import annotations

import pytest
import torch

from dspa.saes.quality import evaluate_sae
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


@pytest.mark.parametrize("rows", [torch.zeros(0, D_IN), torch.ones(1, D_IN), torch.ones(3, D_IN)])
def test_rows_without_variance(rows):
    with pytest.raises(
        ValueError, match=rf"sample to report on is {len(rows)} tokens without variance.*held_out_tokens"
    ):
        evaluate_sae(make_sae(2, 96), rows)
