"""The two ops of a steered layer, opaque to torch.compile: they find the state of their engine by its name."""

from __future__ import annotations

import torch
from torch import Tensor

from dspa.serving.state import STATES

# `order` is written by the one and read by the other, so that a compiler keeps them in this order.


@torch.library.custom_op("dspa_serving::read", mutates_args=("order",))
def read(hidden: Tensor, residual: Tensor | None, order: Tensor, engine: str, layer: int) -> None:
    """Read `h = hidden + residual`, [n_tokens, d_in], after a layer."""
    STATES[engine].read(layer, hidden if residual is None else hidden + residual)


@read.register_fake
def _(hidden: Tensor, residual: Tensor | None, order: Tensor, engine: str, layer: int) -> None:
    return None


@torch.library.custom_op("dspa_serving::write", mutates_args=("hidden", "residual"))
def write(hidden: Tensor, residual: Tensor | None, order: Tensor, engine: str, layer: int) -> None:
    """Edit `h = hidden + residual`. A row that changes becomes h' and 0, and any other stays as it is, bit for bit."""
    STATES[engine].write(layer, hidden, residual)


@write.register_fake
def _(hidden: Tensor, residual: Tensor | None, order: Tensor, engine: str, layer: int) -> None:
    return None
