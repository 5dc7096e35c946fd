"""Which tokens are steered, and by which row of the plan.

A token is gated by its position alone, never by a guess at what a call of the model is: positions survive padding,
chunks, caches and compilation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dspa.errors import ModelError, refusal
from dspa.models.prompts import Prompts, token_mask, token_positions
from dspa.models.reading import cache_in

# Position that no token has.
NEVER = torch.iinfo(torch.int64).max


def first_steered(last_prompt: Tensor, positions: str) -> Tensor:
    """Return the first steered position of each row [B].

    Args:
        last_prompt: position of the last token of each prompt [B].
        positions: `SteeringConfig.positions`.
    """
    if positions == "all":
        return torch.zeros_like(last_prompt)
    return last_prompt if positions == "response" else last_prompt + 1


def token_gate(
    position_ids: Tensor, start: Tensor | None, rows: Tensor | None, opened: Tensor | None = None
) -> dict[str, Tensor]:
    """Return the gate of `dspa_kernels.steer` for the tokens of one pass, flattened to [B * T].

    Args:
        position_ids: [B, T].
        start: first steered position of each row [B], where `rows` is None.
        rows: plan row of each token [B, T], -1 where it is not steered.
        opened: tokens that may be steered [B, T] bool; None for all.
    """
    if rows is not None:
        rows = rows if opened is None else rows.where(opened.to(rows.device), -1)
        return {"rows": rows.to(position_ids.device).flatten()}
    assert start is not None
    start = start.to(position_ids.device)
    if position_ids.shape[1] == 1:
        # Decoding: every row has its own plan row, and nothing is computed here except the edit itself.
        if opened is not None:
            start = start.where(opened.flatten(), NEVER)
        return {"positions": position_ids.flatten().long().contiguous(), "start": start}
    steered = position_ids >= start[:, None]
    # Padding on the left repeats position 0 until the first token.
    steered[:, :-1] &= position_ids[:, 1:] > 0
    if opened is not None:
        steered &= opened
    return {"rows": _plan_rows(steered).flatten()}


def response_columns(starts: Sequence[int] | Tensor) -> Tensor:
    """Return the column of each row's first response token as a tensor.

    Raises:
        ModelError: anything but whole numbers.
    """
    accepted = "whole numbers, the column of each first response token"
    try:
        columns = torch.as_tensor(starts)
    except (TypeError, ValueError, RuntimeError) as error:
        raise refusal(ModelError, "`starts`", repr(starts), accepted) from error
    if columns.is_floating_point() or columns.is_complex() or columns.dtype == torch.bool:
        raise refusal(ModelError, "`starts`", columns.tolist(), accepted)
    return columns


def whole_sequences(
    args: tuple[Any, ...], kwargs: dict[str, Any], starts: Tensor, positions: str
) -> tuple[Prompts, Tensor, Tensor]:
    """Return the prompts of a pass over whole sequences, its plan rows, and the numbers of the tokens predicted.

    The plan row of a token [B, T] is -1 if it is not steered. The number in the response of the token after it [B, T]
    is below 0 in the prompt, and -1 at padding.

    Args:
        args: positional arguments of the call of the model.
        kwargs: its keywords.
        starts: column of each row's first response token [B].
        positions: `SteeringConfig.positions`.

    Raises:
        ModelError: a call with a cache or without tokens.
        ModelError: `starts` that do not fit the sequences, or a row without a prompt token.
    """
    name = "inputs_embeds" if kwargs.get("inputs_embeds") is not None else "input_ids"
    whole = kwargs.get(name, args[0] if args else None)
    cache = cache_in(kwargs)
    if whole is None or (cache is not None and cache.get_seq_length()):
        raise ModelError("responses() steers whole sequences: pass input_ids and no cache.")
    shape, device = whole.shape[:2], whole.device
    start = starts.to(device)
    if start.shape != shape[:1] or bool(((start < 1) | (start > shape[1])).any()):
        accepted = f"{shape[0]} columns, one per row, from 1 to {shape[1]}"
        raise refusal(ModelError, "`starts`", start.tolist(), accepted)
    mask, position_ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
    mask = torch.ones(shape, dtype=torch.bool, device=device) if mask is None else token_mask(mask.to(device))
    if mask.shape != shape:
        raise refusal(ModelError, "`attention_mask`", f"of shape {list(mask.shape)}", f"shape {list(shape)}")
    column = torch.arange(shape[1], device=device)
    in_prompt = mask & (column < start[:, None])
    if not bool(in_prompt.any(dim=1).all()):
        raise ModelError("A row has no prompt token before its response. Steering selects from a prompt.")
    length = int(start.max())
    # Without position_ids, transformers counts columns.
    position_ids = column[None].expand(shape) if position_ids is None else token_positions(position_ids, mask)
    prompts = Prompts({name: whole[:, :length]}, in_prompt[:, :length], position_ids[:, :length])
    index = (column - (start - 1)[:, None]).where(mask, -1)
    return prompts, _plan_rows(mask & (column >= first_steered(start - 1, positions)[:, None])), index


def _plan_rows(steered: Tensor) -> Tensor:
    """Return each token's plan row [B, T] int32, its own row of the batch, or -1 where it is not steered."""
    row = torch.arange(len(steered), device=steered.device, dtype=torch.int32)[:, None]
    return torch.where(steered, row, -1).to(torch.int32)
