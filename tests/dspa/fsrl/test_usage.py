"""Usage of latents by rank, and the fitted decay."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dspa.errors import ModelError
from dspa.fsrl import FSRLAdapter, Usage, fit_decay, latent_usage
from dspa.testing import D_SAE_OUT, L_OUT, make_model, make_sae

from ...rounding import PASS, rounding
from ..support.adapters import UNUSED, hidden_states


@pytest.fixture(scope="module")
def model():
    return make_model("gemma2")


def test_usage_counts_the_tokens_of_responses(model, adapter, responses):
    with adapter.disabled():
        h = hidden_states(model, responses)
    u = h @ adapter.W_a.T
    v = u.sign() * (u.abs() - adapter.threshold).clamp(min=0)
    terms = h.abs() @ adapter.W_a.abs().T
    for batch_tokens in (1, 100, 8192):
        usage = latent_usage(model, adapter, responses, batch_tokens=batch_tokens, progress=False)
        assert usage.n_tokens == len(h) == sum(len(response.ids) for response in responses)
        # A value at its threshold falls on either side by rounding.
        near = ((u.abs() - adapter.threshold).abs() < rounding(PASS, terms)).sum(dim=0)
        assert ((usage.active - (v != 0).sum(dim=0)).abs() <= near).all()
        assert ((usage.mass - v.abs().double().sum(dim=0)).abs() <= rounding(PASS, terms.double().sum(dim=0))).all()
    assert usage.moved.tolist() == list(range(D_SAE_OUT - UNUSED))


def test_ranks_are_by_mean_movement():
    """Where all latents are moved on all tokens, nothing else tells them apart; exact ties go by index."""
    usage = Usage(torch.tensor([2, 0, 5, 2]), torch.tensor([1.0, 0.0, 2.0, 4.0]).double(), 10)
    assert usage.ranked.tolist() == [3, 2, 0]
    assert usage.rows() == [(1, 3, 0.2, 0.4), (2, 2, 0.5, 0.2), (3, 0, 0.2, 0.1)]
    assert usage.falling_shares.tolist() == [0.5, 0.2, 0.2] and usage.moved.tolist() == [0, 2, 3]
    dense = Usage(torch.full((4,), 10), torch.tensor([1.0, 3.0, 9.0, 3.0]).double(), 10)
    assert dense.ranked.tolist() == [2, 1, 3, 0]


def test_masked_latents_are_not_used(model, adapter, used, responses):
    adapter.mask = torch.arange(D_SAE_OUT) >= 50
    masked = latent_usage(model, adapter, responses, progress=False)
    assert not masked.active[:50].any() and not masked.mass[:50].any()
    assert torch.equal(masked.active[50:], used.active[50:])


def test_a_decay_is_found_again():
    n_tokens = 10**9
    ranks = torch.arange(1, 41)
    exact = (0.6 * torch.exp(-ranks.double() / 12) * n_tokens).round().long()
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    active = torch.zeros(60, dtype=torch.int64).index_copy(0, order[:40], exact)
    decay = fit_decay(Usage(active, active.double(), n_tokens))
    # The counts are rounded by less than 3e-8 of their size, and curve_fit stops at changes of 1.5e-8.
    assert (decay.a, decay.tau, decay.r2) == pytest.approx((0.6, 12, 1))
    assert (decay.first, decay.last) == (1, 40)


def test_a_fit_is_the_best_in_squares_and_says_how_good(used):
    decay = fit_decay(used)
    share = np.sort(used.share.numpy()[used.active.numpy() > 0])[::-1]
    ranks = np.arange(1, len(share) + 1)

    def residual(a: float, tau: float) -> float:
        return float(((share - a * np.exp(-ranks / tau)) ** 2).sum())

    best = residual(decay.a, decay.tau)
    assert decay.r2 == pytest.approx(1 - best / float(((share - share.mean()) ** 2).sum()))
    assert 0.9 < decay.r2 < 1
    for a, tau in ((0.99, 1), (1.01, 1), (1, 0.99), (1, 1.01)):
        assert residual(decay.a * a, decay.tau * tau) > best


def test_refused_fits():
    with pytest.raises(ValueError, match="that the adapter moves is 3 on 10 tokens; accepted: 8 or more for a fit"):
        fit_decay(Usage(torch.tensor([1, 2, 3, 0]), torch.zeros(4), 10))
    with pytest.raises(ValueError, match=r"Each of 9 latents is moved on 50\.0% of the tokens"):
        fit_decay(Usage(torch.full((9,), 5), torch.zeros(9), 10))


def test_an_sae_of_another_model_is_refused(tokenizer, responses):
    narrow = FSRLAdapter(make_sae(L_OUT, 32, d_in=24))
    with pytest.raises(ModelError, match="reads 24 dimensions"):
        latent_usage(make_model("gemma2"), narrow, responses, progress=False)
