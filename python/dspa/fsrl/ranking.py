"""PRO, preference ranking optimization (arXiv 2306.17492): the loss of a ranking, and how well a model orders one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

# As in the published code.
EPSILON = 1e-10


def pro_loss(scores: Tensor, rewards: Tensor, *, plain: bool = False) -> Tensor:
    """Return PRO's loss of one ranking of n responses, a scalar in the dtype of `scores`.

        L = sum_{k < n} log(epsilon + e^{r_k T_k^k} + sum_{i > k} e^{r_i T_k^i}) - r_k T_k^k
        T_k^i = R_k - R_i,  T_k^k = max_{i > k} T_k^i,  R_1 >= ... >= R_n

    as the published code computes it. Equal rewards have T = 0, and such a pair adds the constant e^0 to a sum. For
    n > 2 a shift of all scores changes the loss, because the scores within a sum have different T. Exponents below
    log(epsilon), about -23, vanish in epsilon, where the loss no longer depends on the worse responses.

    Args:
        scores: r, the mean log-probability per token of each response, [n].
        rewards: R, the reward of each response, [n] fp64.
        plain: compute with T = 1, and 0 for equal rewards.
    """
    order = rewards.argsort(descending=True, stable=True)
    r, R = scores[order], rewards[order]
    T = R[:-1, None] - R  # [n - 1, n]
    T = torch.where(torch.eye(*T.shape, dtype=torch.bool, device=T.device), T[:, -1:], T)
    exponents = r * (T.sign() if plain else T).to(r)
    better = torch.ones_like(T, dtype=torch.bool).tril(-1)
    epsilon = exponents.new_full((len(T), 1), math.log(EPSILON))
    terms = torch.cat([epsilon, exponents.masked_fill(better, -math.inf)], dim=1)
    return (terms.logsumexp(dim=1) - exponents.diagonal()).sum()


def sft_loss(log_probabilities: Tensor, rewards: Tensor, weight: float) -> Tensor:
    """Return PRO's SFT term of one ranking, `-weight (n - 1)^2 log p`, where p is the probability of the best response.

    Args:
        log_probabilities: log-probability of each response, summed over its tokens, [n].
        rewards: reward of each response, [n]. Of equal ones the first is the best.
        weight: weight of the term.
    """
    return -weight * (len(rewards) - 1) ** 2 * log_probabilities[rewards.argmax()]


@dataclass(frozen=True)
class Order:
    """How a model orders the responses of one ranking.

    Attributes:
        best: 1 where the likeliest response per token has the highest reward, else 0.
        pairs: share of the pairs of different rewards whose better response is likelier per token.
        margin: log-probability per token of the best response, less the mean over the others.
    """

    best: float
    pairs: float
    margin: float


def order_of(scores: Tensor, rewards: Tensor) -> Order:
    """Return how a model with these scores orders a ranking; the arguments are those of `pro_loss`."""
    scores, best = scores.double(), int(rewards.argmax())
    r, R = scores.tolist(), rewards.tolist()
    pairs = [(r[a] - r[b]) * (R[a] - R[b]) > 0 for a, b in combinations(range(len(r)), 2) if R[a] != R[b]]
    return Order(
        best=float(R[int(scores.argmax())] == R[best]),
        pairs=sum(pairs) / len(pairs),
        margin=r[best] - (sum(r) - r[best]) / (len(r) - 1),
    )
