"""The tokens of a step: tensors at fixed addresses, so that a CUDA graph can read them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dspa_kernels import PlacedTokens, PromptRows, place_tokens


class Batch:
    """The request, position and slot of each token of a step.

    Args:
        n_requests: requests that can run at once, R. Each has a row.
        n_tokens: tokens of a step at most.
        n_groups: groups of requests that are planned apart. A request can be in several.
        device: device of the residuals.
        dtype: dtype of the residuals.

    Attributes:
        prompts: what is known of the prompts of requests, by row.
        placed: the tokens of the step.
    """

    def __init__(self, n_requests: int, n_tokens: int, n_groups: int, device: torch.device, dtype: torch.dtype) -> None:
        self.n_requests, self.device, self.dtype = n_requests, device, dtype
        self.prompts = PromptRows(
            n_counted=torch.zeros(n_requests, dtype=torch.int64, device=device),
            groups=torch.zeros(n_requests, n_groups, dtype=torch.bool, device=device),
            planned=torch.zeros(n_requests, dtype=torch.bool, device=device),
        )
        token = torch.full((n_tokens,), -1, device=device)
        due = torch.full((n_groups, n_requests), -1, dtype=torch.int32, device=device)
        self.placed = PlacedTokens(row=token.int(), position=token.clone(), slot=token.clone(), due=due)

    def tokens(self, n: int) -> tuple[Tensor, Tensor]:
        """Return row and position of the first `n` tokens, row -1 for padding."""
        return self.placed.row[:n], self.placed.position[:n]

    def begin(self, row: int, n_counted: int = 0, groups: Sequence[int] = ()) -> None:
        """Give a row to a request.

        Args:
            row: the row.
            n_counted: number of tokens, from the first, of which its plans are made, 0 for none.
            groups: groups that it is planned with.
        """
        self.prompts.n_counted[row], self.prompts.planned[row] = n_counted, False
        self.prompts.groups[row] = False
        for number in groups:
            self.prompts.groups[row, number] = True

    def place(self, rows: Tensor, starts: Tensor, positions: Tensor, slots: Tensor | None = None) -> None:
        """Say which request each token of a step belongs to, see `dspa_kernels.place_tokens`.

        Args:
            rows: [B] int64, row of each sequence of the batch.
            starts: [B + 1] int32, its first token in the step; the last is the number of tokens.
            positions: [n_tokens] int64, position of each token in its sequence.
            slots: [n_tokens] int64, its slot in the key/value cache, None where no request has a plan.
        """
        place_tokens(rows, starts, positions, positions if slots is None else slots, self.prompts, self.placed)

    def place_nothing(self) -> None:
        """Leave all tokens of a step alone."""
        self.placed.row.fill_(-1)
        self.placed.slot.fill_(-1)
        self.placed.due.fill_(-1)


def put_rows(rows: Tensor, h: Tensor, hidden: Tensor, residual: Tensor | None) -> None:
    """Set `hidden + residual`, [n_tokens, d_in], to h in `rows` [n_tokens] bool, where the residual becomes 0."""
    hidden.copy_(torch.where(rows[:, None], h, hidden))
    if residual is not None:
        residual.masked_fill_(rows[:, None], 0)
