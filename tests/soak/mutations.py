"""Strategies that damage a valid file: its bytes, the JSON in it, or its tensors, which are then sealed again.

A damaged file draws one to three changes. Files are small, so that all of a reader's decisions are near each other.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

NUMBERS = st.sampled_from([0, 1, -1, 2**31, 2**63, 10**30, -(10**9), 0.5, 1e308, float("nan"), float("inf"), True])
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=6), st.sampled_from(["", "0", "false", "/x]"]))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
)
DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.uint8,
    torch.int32,
    torch.int64,
)


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Return the bytes cut off, with a bit turned, a slice removed, doubled, or replaced by other bytes."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        stop = min(len(content), start + draw(st.integers(0, 40)))
        slices = {
            "cut off": content[:start],
            "removed": content[:start] + content[stop:],
            "doubled": content[:stop] + content[start:],
            "replaced": content[:start] + draw(st.binary(max_size=20)) + content[stop:],
            "turned": content[:start] + bytes(b ^ 1 << draw(st.integers(0, 7)) for b in content[start:stop][:1])
            + content[start + 1 :],
        }  # fmt: skip
        content = slices[draw(st.sampled_from(sorted(slices)))]
    return content


@st.composite
def damaged_json(draw: st.DrawFn, value: Any) -> Any:
    """Return JSON in which values are replaced, removed, added, or put under another key."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        holder = _holder(draw, value)
        if holder is None:
            return draw(VALUES)
        keys = sorted(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key: Any = draw(st.sampled_from(keys))
        match draw(st.sampled_from(["replace", "remove", "add", "nest"])):
            case "replace":
                holder[key] = draw(VALUES)
            case "remove":
                del holder[key]
            case "nest":
                holder[key] = [holder[key]]
            case "add" if isinstance(holder, dict):
                holder[draw(st.text(max_size=6))] = draw(VALUES)
            case _:
                holder.append(draw(VALUES))
    return value


def _holder(draw: st.DrawFn, value: Any) -> Any:
    """Return one of the objects and lists in a JSON value that are not empty; None if there is none."""
    holders = []
    waiting = [value]
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, dict | list) and inner:
            holders.append(inner)
            waiting += inner.values() if isinstance(inner, dict) else inner
    return draw(st.sampled_from(holders)) if holders else None


@st.composite
def damaged_tensors(draw: st.DrawFn, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of which some have other values, another shape or dtype, or are not there."""
    tensors = dict(tensors)
    for _ in range(draw(st.integers(1, 3))):
        if not tensors:
            break
        name = draw(st.sampled_from(sorted(tensors)))
        tensor = tensors[name]
        match draw(st.sampled_from(["value", "value", "shape", "dtype", "remove", "rename"])):
            case "value" if tensor.numel():
                tensors[name] = _with_value(draw, tensor)
            case "shape" if tensor.dim() and tensor.numel():
                tensors[name] = draw(st.sampled_from([tensor[None], tensor[:-1], tensor[:0], tensor.flatten()]))
            case "dtype":
                tensors[name] = tensor.to(draw(st.sampled_from(DTYPES)))
            case "remove":
                del tensors[name]
            case _:
                tensors[draw(st.text("abcW_.", min_size=1, max_size=6))] = tensors.pop(name)
    return tensors


def _with_value(draw: st.DrawFn, tensor: Tensor) -> Tensor:
    """Return a tensor in which one value is an extreme one, or that of a neighbour."""
    tensor = tensor.clone()
    flat = tensor.view(-1)
    i = draw(st.integers(0, len(flat) - 1))
    if tensor.is_floating_point():
        extreme = st.sampled_from([0.0, -1.0, 1e30, float("nan"), float("inf"), float("-inf")])
    else:
        extreme = st.sampled_from([0, 1, -1, torch.iinfo(tensor.dtype).min, torch.iinfo(tensor.dtype).max])
    flat[i] = draw(st.one_of(extreme, st.just(flat[i - 1].item())))
    return tensor


def damaged_lines(rows: list[Any]) -> st.SearchStrategy[bytes]:
    """Return JSON Lines with damaged rows, or with damaged bytes."""
    written = "".join(json.dumps(row) + "\n" for row in rows).encode()
    lines = damaged_json(rows).map(
        lambda value: "".join(
            json.dumps(row) + "\n" for row in (value if isinstance(value, list) else [value])
        ).encode()
    )
    return st.one_of(lines, damaged_bytes(written))
