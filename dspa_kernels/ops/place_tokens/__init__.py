"""`place_tokens`: whose the tokens of a step are, of a batch that holds parts of several sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dspa_kernels.backends import choose, define_op
from dspa_kernels.checks import check_buffers


@dataclass(frozen=True, eq=False)
class PromptRows:
    """The prompts of R rows.

    Attributes:
        n_counted: [R] int64, the number of tokens, from the first, that are counted for the row's plan; 0 for none.
        groups: [R, G] bool, the groups that it is planned with.
        planned: [R] bool, True once the prompt was due.
    """

    n_counted: Tensor
    groups: Tensor
    planned: Tensor


@dataclass(frozen=True, eq=False)
class PlacedTokens:
    """The N tokens of a step, padding included, and the prompts that are due in it.

    Attributes:
        row: [N] int32, the row of each token, -1 for padding.
        position: [N] int64, its position in its sequence; that of padding is not written.
        slot: [N] int64, the slot in which a counted token is kept, -1 for others.
        due: [G, R] int32, by group the rows whose counted tokens are all computed with this step, -1 elsewhere.
    """

    row: Tensor
    position: Tensor
    slot: Tensor
    due: Tensor


def place_tokens(
    rows: Tensor,
    starts: Tensor,
    positions: Tensor,
    slots: Tensor,
    prompts: PromptRows,
    out: PlacedTokens,
    *,
    backend: str = "auto",
) -> PlacedTokens:
    """Say for each token of a step which row it belongs to, and which prompts end in it.

    A server computes a step for parts of B sequences, each with a row of R. Tokens from `starts[B]` on are padding.
    Nothing is read on the host, so that a step can be prepared while the last one runs, and all results have fixed
    addresses, so that a captured graph can read them. Kernels check neither rows nor starts, and write other memory if
    one is out of range.

    Args:
        rows: [B] int64, the row of each sequence, below R, none twice; B may be 0.
        starts: [B + 1] int32, its first token in the step; the last is the number of tokens, at most N.
        positions: [n] int64, the position of each token in its sequence, for the tokens of the step at least.
        slots: [n] int64, the slot in which it is kept, for the tokens of the step at least.
        prompts: what is known of the rows; `planned` is written.
        out: the results, overwritten.
        backend: "auto", "reference" or "triton".

    Returns:
        out, with for each token its row and position; its slot, if it is counted; and the rows whose prompts are due.

    Raises:
        InputError: an invalid shape, dtype or device.
        BackendError: the named backend cannot run.
    """
    n_rows, n_groups, n_tokens = len(prompts.n_counted), len(out.due), len(out.row)
    buffers: dict[str, tuple[Tensor, torch.dtype, Sequence[int | str]]] = {
        "rows": (rows, torch.int64, ("B",)),
        "starts": (starts, torch.int32, (len(rows) + 1,)),
        "positions": (positions, torch.int64, ("n",)),
        "slots": (slots, torch.int64, ("n",)),
        "prompts.n_counted": (prompts.n_counted, torch.int64, ("R",)),
        "prompts.groups": (prompts.groups, torch.bool, (n_rows, n_groups)),
        "prompts.planned": (prompts.planned, torch.bool, (n_rows,)),
        "out.row": (out.row, torch.int32, ("N",)),
        "out.position": (out.position, torch.int64, (n_tokens,)),
        "out.slot": (out.slot, torch.int64, (n_tokens,)),
        "out.due": (out.due, torch.int32, (n_groups, n_rows)),
    }
    check_buffers(buffers, rows, "rows")
    _place_tokens(
        rows=rows,
        starts=starts,
        positions=positions,
        slots=slots,
        n_counted=prompts.n_counted,
        groups=prompts.groups,
        planned=prompts.planned,
        row=out.row,
        position=out.position,
        slot=out.slot,
        due=out.due,
        backend=choose("place_tokens", rows.device, backend),
    )
    return out


def _fake(**_: object) -> None:
    return None


_place_tokens = define_op(
    "place_tokens",
    "(Tensor rows, Tensor starts, Tensor positions, Tensor slots, Tensor n_counted, Tensor groups, Tensor(a!) planned,"
    " Tensor(b!) row, Tensor(c!) position, Tensor(d!) slot, Tensor(e!) due) -> ()",
    _fake,
    mutates=("planned", "row", "position", "slot", "due"),
)
