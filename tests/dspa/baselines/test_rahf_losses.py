"""RAHF's losses against figures that were worked out by hand, and its code's loss step by step."""

from __future__ import annotations

import math

import pytest
import torch

from dspa.baselines.rahf.losses import (
    IGNORED,
    alignment_loss,
    clean_loss,
    code_loss,
    contrast,
    paper_loss,
    token_losses,
)


def test_the_contrast_of_means():
    one, two = torch.tensor([1.2]), torch.tensor([2.0])
    assert float(contrast(one, two, 0.2)) == pytest.approx(0.531101, abs=1e-6)
    for epsilon in (0.0, 0.2, 0.7):
        assert float(contrast(one, one, epsilon)) == pytest.approx(math.log(2), abs=1e-6)


def test_the_loss_of_the_paper():
    assert float(paper_loss(torch.tensor([[5.0, 7.0]]), torch.tensor([[20.0, 0.0]]))) == pytest.approx(12.000335)
    assert float(paper_loss(torch.tensor([[12.0]]), torch.tensor([[12.0]]))) == pytest.approx(12.693147)


def test_the_clean_loss_counts_response_tokens_alone():
    """Two responses of 2 and 3 tokens: the mean over 5 tokens, and contrasts of the means 1.2 and 2 over each."""
    own = torch.tensor([[0.0, 1.0, 1.4, 0.0], [1.2, 1.2, 1.2, 0.0]])
    opposite = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 1.0, 2.0, 3.0]])
    loss = clean_loss(own, opposite, torch.tensor([2, 3]), 0.2)
    assert float(loss) == pytest.approx(1.2 + 0.531101, abs=1e-6)


def test_the_loss_of_the_code():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 5, 7, generator=g, dtype=torch.float64)
    labels = torch.tensor([[IGNORED, IGNORED, 3, 4, IGNORED], [IGNORED, 2, 5, 1, 6]])
    logp = logits.log_softmax(dim=-1)
    shifted = [-float(logp[b, t - 1, labels[b, t]]) for b in range(2) for t in range(1, 5) if labels[b, t] != IGNORED]
    terms = []
    for b in range(2):
        own, opposite = (
            math.exp(sum(float(logp[row, t, labels[b, t]]) for t in range(5) if labels[b, t] != IGNORED) / 5)
            for row in (b, b + 2)
        )
        share = own / (own + opposite)
        terms.append(0.8 * -math.log(share + 1e-8) + 0.2 * -math.log(1 - share + 1e-8))
    expected = sum(shifted) / len(shifted) + sum(terms) / 2
    assert float(code_loss(logits, labels, 0.2)) == pytest.approx(expected, abs=1e-5)


def test_token_losses_are_0_where_nothing_counts():
    logits = torch.zeros(1, 3, 4)
    losses = token_losses(logits, torch.tensor([[IGNORED, 1, IGNORED]]))
    assert losses.tolist() == [[0.0, pytest.approx(math.log(4)), 0.0]]


def test_the_distance_of_residuals():
    """One layer, two places of which one is padding: the LoRA at (0, 0), good (1, 0), bad (0, 1), alpha 5."""
    h, target = torch.zeros(1, 1, 2), torch.tensor([[[5.0, -5.0]]])
    expected = {"norm": 7.071068, "rahf_code_compat": 3.535534, "squared": 50.0}
    for kind, value in expected.items():
        assert float(alignment_loss(h, target, kind, n_places=2)) == pytest.approx(value, abs=1e-6)
    two = torch.cat([target, 2 * target])
    assert float(alignment_loss(torch.zeros(2, 1, 2), two, "squared", 1)) == pytest.approx(250.0)
    assert float(alignment_loss(torch.zeros(2, 1, 2), two, "norm", 1)) == pytest.approx(1.5 * 7.071068, abs=1e-5)
