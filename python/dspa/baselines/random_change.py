"""Control "random change": weights that were changed as much as by tuning, in random directions."""

from __future__ import annotations

import torch
from torch import Tensor


def random_change(change: Tensor, generator: torch.Generator) -> Tensor:
    """Return the change of a weight with its rows and its columns in another order, and with random signs.

    Both are orthogonal, so that a matrix keeps its singular values, its norm and its rank. Only the directions that it
    reads and writes are others. A vector, such as a norm's weights, keeps its norm.

    Args:
        change: difference of the tuned weight and the weight before.
        generator: of the draw, on the CPU.
    """
    drawn = change
    for dim, size in enumerate(change.shape):
        order = torch.randperm(size, generator=generator).to(change.device)
        signs = torch.randint(2, (size,), generator=generator).to(change) * 2 - 1
        drawn = drawn.index_select(dim, order) * signs.view([-1 if d == dim else 1 for d in range(change.dim())])
    return drawn
