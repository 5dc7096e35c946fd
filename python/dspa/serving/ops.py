"""The two ops of a steered layer, opaque to torch.compile: they find the state of their engine by its name."""

from __future__ import annotations

import torch
from torch import Tensor

from dspa.serving.state import STATES

# `counts` is written by the one and read by the other, so that a compiler keeps them in this order.


@torch.library.custom_op("dspa_serving::count", mutates_args=("counts",))
def count(hidden: Tensor, residual: Tensor | None, counts: Tensor, engine: str) -> None:
    """Count the latents of prompt tokens in `h = hidden + residual`, [n_tokens, d_in]."""
    STATES[engine].count(hidden if residual is None else hidden + residual)


@count.register_fake
def _(hidden: Tensor, residual: Tensor | None, counts: Tensor, engine: str) -> None:
    return None


@torch.library.custom_op("dspa_serving::edit", mutates_args=("hidden", "residual"))
def edit(hidden: Tensor, residual: Tensor | None, counts: Tensor, engine: str) -> None:
    """Edit `h = hidden + residual`. A row that changes becomes h' and 0, and any other stays as it is, bit for bit."""
    h = hidden if residual is None else hidden + residual
    edited = STATES[engine].edit(h)
    changed = (edited != h).any(dim=1, keepdim=True)
    hidden.copy_(torch.where(changed, edited, hidden))
    if residual is not None:
        residual.masked_fill_(changed, 0)


@edit.register_fake
def _(hidden: Tensor, residual: Tensor | None, counts: Tensor, engine: str) -> None:
    return None
