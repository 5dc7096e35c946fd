"""Permutations among things that are alike, for controls that change one thing only."""

import torch
from torch import Tensor

# Number of neighbours, by rank, that are permuted among each other.
BLOCK = 8


def matched_permutation(values: Tensor, seed: int) -> Tensor:
    """Return a permutation that replaces each item by another of a similar value.

    Items are ranked by value, ties at random. Each run of BLOCK neighbours is permuted in one random cycle, so that no
    item stays (unless it is the only one).

    Args:
        values: value of each item, [n].
        seed: of the draws.

    Returns:
        index of the item that replaces each item, [n] int64.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(values), generator=generator)
    ranked = shuffled[values.cpu()[shuffled].argsort(stable=True)]
    replacement = torch.empty_like(ranked)
    start = 0
    while start < len(ranked):
        # A single item at the end belongs to the run before it.
        stop = start + BLOCK if start + BLOCK < len(ranked) - 1 else len(ranked)
        cycle = ranked[start:stop][torch.randperm(stop - start, generator=generator)]
        replacement[cycle] = cycle.roll(1)
        start = stop
    return replacement
