"""The bounds of `rounding` hold, and are not so wide that they show nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dspa.testing import VOCAB, make_model

from .rounding import PASS, assert_same_logits, rounding


@pytest.mark.parametrize("family", ["gemma2", "qwen3", "gpt2"])
def test_a_pass_in_fp32(family: str) -> None:
    """One computation against the exact one may use half of what two may."""
    model, g = make_model(family), torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCAB, (4, 30), generator=g)
    with torch.no_grad():
        logits = model(ids).logits
        exact = model.double()(ids).logits
    bound = rounding(PASS, float(exact.abs().max())) / 2
    assert bound / 50 < (logits - exact).abs().max() < bound
    with pytest.raises(AssertionError):
        assert_same_logits(logits + 3 * bound, logits)


@pytest.mark.parametrize("n", [10, 1000, 100_000])
def test_a_sum_of_one_sign(n: int) -> None:
    """numpy's cumulative sum adds one term after the other, in fp32."""
    terms = np.random.default_rng(n).random(n, dtype=np.float32)
    exact = float(terms.astype(np.float64).sum())
    bound = rounding(n, exact) / 2
    assert bound / 100 < abs(float(terms.cumsum()[-1]) - exact) < bound
