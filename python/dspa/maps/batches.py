"""Batches of prompts and responses: how many rows run together, and their padded tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# A batch of at least one SMALL_BATCH-th of the budget has at most MOST_PADDED times as many places as tokens.
MOST_PADDED, SMALL_BATCH = 1.1, 8


@dataclass(frozen=True)
class Group:
    """Responses that run together, longest first: rows in the batch, token ids, and which of these are text."""

    rows: list[int]
    ids: list[list[int]]
    text: list[list[bool]]


@dataclass(frozen=True)
class Rows:
    """N padded rows of token ids.

    Attributes:
        tokens: ids [N, T] int64.
        mask: 1 for tokens and 0 for padding, [N, T] int64.
        special: True for special tokens, [N, T] bool.
    """

    tokens: Tensor
    mask: Tensor
    special: Tensor

    @classmethod
    def padded(cls, rows: Sequence[list[int]], text: Sequence[list[bool]], *, left: bool = False) -> Rows:
        """Pad rows of ids to one length.

        Args:
            rows: ids of each row.
            text: for each id, True where it is not a special token.
            left: pad on the left, not on the right.
        """
        width = max(map(len, rows))
        tokens, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
        special = torch.zeros(len(rows), width, dtype=torch.bool)
        for n, (ids, is_text) in enumerate(zip(rows, text, strict=True)):
            columns = slice(width - len(ids), width) if left else slice(len(ids))
            tokens[n, columns], mask[n, columns], special[n, columns] = torch.tensor(ids), 1, ~torch.tensor(is_text)
        return cls(tokens, mask, special)

    @property
    def lengths(self) -> Tensor:
        """Numbers of tokens, and of special tokens, per row, [2, N]."""
        return torch.stack((self.mask.sum(dim=1), self.special.sum(dim=1)))


def batch_size(lengths: Sequence[int], before: int, budget: int) -> int:
    """Return how many of the first texts make a batch, at least one.

    A batch fits the budget. Once it is large enough to be worth a pass, it also has little padding.

    Args:
        lengths: tokens of the texts, longest first.
        before: tokens in the cache before each text.
        budget: tokens per batch, padding included.
    """
    n, tokens = 1, lengths[0]
    while n < len(lengths):
        tokens += lengths[n]
        padding = (n + 1) * lengths[0] > MOST_PADDED * tokens
        if (n + 1) * (before + lengths[0]) > budget or (padding and tokens - lengths[n] >= budget // SMALL_BATCH):
            break
        n += 1
    return n
