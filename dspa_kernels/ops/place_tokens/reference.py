"""The specification of `place_tokens`, in plain PyTorch."""

import torch
from torch import Tensor


def place_tokens(
    rows: Tensor,
    starts: Tensor,
    positions: Tensor,
    slots: Tensor,
    n_counted: Tensor,
    groups: Tensor,
    planned: Tensor,
    row: Tensor,
    position: Tensor,
    slot: Tensor,
    due: Tensor,
) -> None:
    """Write row, position and slot of each token, and the rows due of each group.

    Token t with starts[b] <= t < starts[b + 1] has row r = rows[b] and position p = positions[t]. It has slot slots[t]
    if p < n_counted[r], and -1 otherwise. Other tokens have -1. due[g, b] is r if groups[r, g], n_counted[r] > 0, not
    planned[r], and the last token of the sequence in the step is at n_counted[r] - 1 or later; and -1 otherwise. These
    rows are planned from then on.
    """
    row.fill_(-1)
    slot.fill_(-1)
    due.fill_(-1)
    lengths = starts.diff().long()
    n_tokens = int(lengths.sum())
    of_token = rows.repeat_interleave(lengths)
    row[:n_tokens] = of_token.int()
    position[:n_tokens] = positions[:n_tokens]
    slot[:n_tokens] = torch.where(positions[:n_tokens] < n_counted[of_token], slots[:n_tokens], -1)
    at = rows[lengths > 0]
    last = positions[starts[1:].long()[lengths > 0] - 1]
    ends = (n_counted[at] > 0) & ~planned[at] & (last >= n_counted[at] - 1)
    sequence = (lengths > 0).nonzero().flatten()
    due[:, sequence[ends]] = torch.where(groups[at[ends]].T, at[ends].int(), -1)
    planned[at[ends]] = True
