"""How far apart two computations of one number may be: what the tests' tolerances are made of."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

Terms = TypeVar("Terms", float, Tensor)

# Sums in a row in a pass of `dspa.testing.make_model`: in each of 4 layers up to 4 norms, the projections into and out
# of attention and of the MLP, the scores, their softmax and the mix; then a norm, the logits and their log-softmax.
PASS = 4 * 11 + 3


def rounding(n: int, terms: Terms, dtype: torch.dtype = torch.float32) -> Terms:
    """Return how far two computations may be apart that each round n times in a row, where they add numbers of a size.

    A rounding moves a number by at most u = eps / 2 of its size, and by u / sqrt(3) or less in the mean square. Errors
    of n roundings are independent enough to grow with sqrt(n): 4 sqrt(n) u is more than six standard deviations. Two
    computations may err in opposite directions.

    Args:
        n: roundings in a row of numbers as large as `terms`. A sum whose terms have either sign counts once, since
            its partial sums are small, and a sum of terms of one sign counts once per term.
        terms: the size of what is added, not of the result: a difference of two numbers near 1 has terms of 2.
        dtype: what is rounded to.
    """
    return terms * (4 * n**0.5 * torch.finfo(dtype).eps)


def assert_same_logits(actual: Tensor, expected: Tensor) -> None:
    """Raise unless two passes of a tiny model gave these logits."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=rounding(PASS, float(expected.abs().max())))
