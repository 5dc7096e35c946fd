"""The tokens of a step: tensors at fixed addresses, so that a CUDA graph can read them."""

from __future__ import annotations

import torch
from torch import Tensor


class Batch:
    """The request and the position of each token of a step.

    Args:
        n_requests: requests that can run at once, R. Each has a row.
        n_tokens: tokens of a step at most.
        device: device of the residuals.
        dtype: dtype of the residuals.

    Attributes:
        row: [n_tokens] int32, the row of each token's request, -1 for padding.
        position: [n_tokens] int64, its position in its sequence.
    """

    def __init__(self, n_requests: int, n_tokens: int, device: torch.device, dtype: torch.dtype) -> None:
        self.n_requests, self.dtype = n_requests, dtype
        self.row = torch.full((n_tokens,), -1, dtype=torch.int32, device=device)
        self.position = torch.zeros(n_tokens, dtype=torch.int64, device=device)

    def tokens(self, n: int) -> tuple[Tensor, Tensor]:
        """Return rows and positions of the first `n` tokens."""
        return self.row[:n], self.position[:n]

    def place(self, rows: Tensor, starts: Tensor, positions: Tensor) -> None:
        """Say which request each token of a step belongs to.

        Args:
            rows: [B] row of each sequence of the batch.
            starts: [B + 1] its first token in the step; the last is the number of tokens.
            positions: [n_tokens] position of each token in its sequence.
        """
        n_tokens = len(positions)
        self.row.fill_(-1)
        if not n_tokens:
            return
        token = torch.arange(n_tokens, device=self.row.device)
        sequence = torch.searchsorted(starts[1:].long().contiguous(), token, right=True).clamp(max=len(rows) - 1)
        self.row[:n_tokens] = rows[sequence]
        self.position[:n_tokens] = positions

    def place_nothing(self) -> None:
        """Leave all tokens of a step alone."""
        self.row.fill_(-1)


def put_rows(rows: Tensor, h: Tensor, hidden: Tensor, residual: Tensor | None) -> None:
    """Set `hidden + residual`, [n_tokens, d_in], to h in `rows` [n_tokens] bool, where the residual becomes 0."""
    hidden.copy_(torch.where(rows[:, None], h, hidden))
    if residual is not None:
        residual.masked_fill_(rows[:, None], 0)
