"""`place_tokens` in Triton: one program per sequence, and one for all that is left."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit(
    do_not_specialize=["n_sequences", "n_all", "n_groups", "n_rows"],
    do_not_specialize_on_alignment=["p_rows", "p_starts", "p_positions", "p_slots"],
)
def place_kernel(
    p_rows,
    p_starts,
    p_positions,
    p_slots,
    p_n_counted,
    p_groups,
    p_planned,
    p_row,
    p_position,
    p_slot,
    p_due,
    n_sequences,
    n_all,
    n_groups,
    n_rows,
    BLOCK: tl.constexpr,
):
    """row_t = r, position_t = p_t, slot_t = slots_t if p_t < n_counted_r else -1, for the tokens of the sequence of r.

    due_gb = r for a sequence b whose last token is at n_counted_r - 1 or later, n_counted_r > 0, if groups_rg and r is
    not planned yet, and -1 otherwise. The last program writes the -1 of padding and of sequences that are not there.
    """
    i_sequence = tl.program_id(0)
    o_token = tl.arange(0, BLOCK)
    b_start = tl.load(p_starts + i_sequence)
    if i_sequence == n_sequences:
        for i in range(b_start, n_all, BLOCK):
            tl.store(p_row + i + o_token, -1, mask=o_token < n_all - i)
            tl.store(p_slot + i + o_token, -1, mask=o_token < n_all - i)
        for i_group in range(n_groups):
            for i in range(n_sequences, n_rows, BLOCK):
                tl.store(p_due + i_group * n_rows + i + o_token, -1, mask=o_token < n_rows - i)
    else:
        b_end = tl.load(p_starts + i_sequence + 1)
        i_row = tl.load(p_rows + i_sequence)
        b_n_counted = tl.load(p_n_counted + i_row)
        for i in range(b_start, b_end, BLOCK):
            m_token = o_token < b_end - i
            b_position = tl.load(p_positions + i + o_token, mask=m_token, other=0)
            b_slot = tl.load(p_slots + i + o_token, mask=m_token, other=-1)
            tl.store(p_row + i + o_token, i_row, mask=m_token)
            tl.store(p_position + i + o_token, b_position, mask=m_token)
            tl.store(p_slot + i + o_token, tl.where(b_position < b_n_counted, b_slot, -1), mask=m_token)
        b_last = tl.load(p_positions + b_end - 1, mask=b_end > b_start, other=-1)
        b_planned = tl.load(p_planned + i_row)
        m_due = (b_n_counted > 0) & (b_planned == 0) & (b_last >= b_n_counted - 1)
        for i_group in range(n_groups):
            b_group = tl.load(p_groups + i_row * n_groups + i_group)
            tl.store(p_due + i_group * n_rows + i_sequence, tl.where(m_due & (b_group != 0), i_row, -1))
        tl.store(p_planned + i_row, b_planned | m_due.to(tl.uint8))


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
    """Write row, position and slot of each token, and the rows due of each group."""
    place_kernel[(len(rows) + 1,)](
        rows,
        starts,
        positions,
        slots,
        n_counted,
        groups.view(torch.uint8),
        planned.view(torch.uint8),
        row,
        position,
        slot,
        due,
        len(rows),
        len(row),
        *due.shape,
        BLOCK=BLOCK,
        num_warps=4,
    )
