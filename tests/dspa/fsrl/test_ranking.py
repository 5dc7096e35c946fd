"""PRO's loss of one ranking: worked examples, a plain loop, ties, the plain form, and how a ranking is ordered."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch

from dspa.fsrl.ranking import order_of, pro_loss, sft_loss


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def by_hand(r: list[float], R: list[float], plain: bool = False) -> float:
    """The published loop, in Python's floats: candidates sorted by reward, one term per k."""
    order, total = sorted(range(len(r)), key=lambda i: -R[i]), 0.0
    for k, best in enumerate(order[:-1]):
        gaps = {i: R[best] - R[i] for i in order[k + 1 :]}
        T = {i: float(gap > 0) if plain else gap for i, gap in gaps.items()}
        own = r[best] * max(T.values())
        total += math.log(1e-10 + math.exp(own) + sum(math.exp(r[i] * T[i]) for i in T)) - own
    return total


def test_worked_examples():
    three = pro_loss(doubles(-1, -1.5, -3), doubles(2, 1, -1))
    second = pro_loss(doubles(-1.5, -3), doubles(1, -1))
    assert float(second) == pytest.approx(0.048587, abs=5e-7)
    assert float(three - second) == pytest.approx(1.701865, abs=5e-7)
    assert float(three) == pytest.approx(1.750453, abs=1e-6)
    assert float(pro_loss(doubles(-1, -1.5), doubles(1, 0))) == pytest.approx(0.474077, abs=5e-7)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_the_published_loop(seed, plain):
    g = torch.Generator().manual_seed(seed)
    n = 2 + seed
    scores = -4 * torch.rand(n, generator=g, dtype=torch.float64)
    # Some are equal.
    rewards = torch.randint(4, (n,), generator=g).double() / 2 + (torch.arange(n) == 0)
    expected = by_hand(scores.tolist(), rewards.tolist(), plain)
    assert float(pro_loss(scores, rewards, plain=plain)) == pytest.approx(expected, rel=1e-12)
    single = pro_loss(scores.float(), rewards, plain=plain)
    # Exponents are up to 4 * 2.5, and each term is the difference of two numbers of that size.
    assert single.dtype == torch.float32 and float(single) == pytest.approx(expected, abs=n * 4 * 10 * 2**-23)


def test_the_order_in_which_responses_are_given_does_not_matter():
    r, R = (-1.0, -2.5, -0.5, -3.0), (0.5, 2.0, -1.0, 1.0)
    losses = {
        round(float(pro_loss(doubles(*(r[i] for i in order)), doubles(*(R[i] for i in order)))), 12)
        for order in permutations(range(4))
    }
    assert len(losses) == 1


def test_exponents_that_no_float_holds():
    """e^-6000 is 0: what is left of a term is log(epsilon) minus the exponent, whose gradient is that of the best."""
    scores = torch.tensor([-200.0, -300.0], requires_grad=True)
    loss = pro_loss(scores, doubles(30, 0))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(math.log(1e-10) + 6000, rel=1e-6)
    assert scores.grad is not None and scores.grad.tolist() == [-30, 0]


def test_a_shift_of_all_scores():
    """Two responses are compared by their difference; of three, scores with different factors stand in one sum."""
    pair, three = (doubles(-1, -1.5), doubles(1, 0)), (doubles(-1, -1.5, -3), doubles(2, 1, -1))
    assert float(pro_loss(pair[0] - 1, pair[1])) == pytest.approx(float(pro_loss(*pair)), abs=1e-8)
    assert float(pro_loss(three[0] - 1, three[1])) > float(pro_loss(*three)) + 1


def test_equal_rewards_prefer_nothing():
    """The two best have T = 0 with each other, so each stands in the other's sum as a constant."""
    scores = doubles(-1, -2, -3).requires_grad_()
    pro_loss(scores, doubles(1, 1, 0)).backward()
    assert scores.grad is not None
    first = math.exp(-1) / (math.exp(-1) + 1 + math.exp(-3)) - 1
    assert float(scores.grad[0]) == pytest.approx(first, rel=1e-9)
    assert float(pro_loss(doubles(-2, -3), doubles(0, 0))) == pytest.approx(math.log(2))


def test_the_plain_form_is_the_likelihood_of_the_order():
    """Plackett and Luce's: each response is chosen from those that are left."""
    scores = doubles(-1, -0.5, -2, -1.7)
    expected = -sum(scores[k:].log_softmax(dim=0)[0] for k in range(3))
    assert float(pro_loss(scores, doubles(9, 5, 4.5, 0), plain=True)) == pytest.approx(float(expected), abs=1e-8)


def test_the_sft_term():
    assert float(sft_loss(doubles(-30, -20, -10), doubles(0, 2, 1), 0.05)) == pytest.approx(0.05 * 4 * 20)
    assert float(sft_loss(doubles(-30, -20), doubles(1, 1), 0.05)) == pytest.approx(0.05 * 30)


def test_how_a_ranking_is_ordered():
    order = order_of(doubles(-1, -2, -3, -4), doubles(3, 1, 2, 1))
    # Of the five pairs of different rewards, only the second and the third response are in the wrong order.
    assert (order.best, order.pairs, order.margin) == (1, pytest.approx(4 / 5), pytest.approx(2))
    wrong = order_of(doubles(-2, -1), doubles(1, 0))
    assert (wrong.best, wrong.pairs, wrong.margin) == (0, 0, -1)
    assert order_of(doubles(-2, -1, -3), doubles(1, 1, 0)).best == 1
