"""Residuals read at the outputs of layers, in one forward pass."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from dspa.errors import ModelError
from dspa.models.layers import base_model, decoder_layers

# What models call a key/value cache: since transformers 5.24, and before.
CACHE_NAMES = ("cache", "past_key_values")
# Told to the layers by a pass that only reads: steering stays out of it.
READING = "dspa_reading"


class _Stop(Exception):
    """Ends a forward pass once the last layer that is wanted has run."""


def hidden(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The residual `[B, T, d_in]` in what a decoder layer returned."""
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def read_layers(
    model: nn.Module, indices: Iterable[int], layers: str | None = None, cache: Cache | None = None, **inputs: Any
) -> dict[int, Tensor]:
    """Residuals `[B, T, d_in]` at the outputs of the decoder layers `indices`, for one forward pass.

    Runs nothing above the last of them: no further layer, no final norm, no language-model head. `inputs` go to the
    model, which goes on from `cache` and adds to it.
    """
    inner, wanted = base_model(model), sorted(set(indices))
    stack, read = decoder_layers(model, layers), {}

    # Another thread may be in the same layers: only this pass carries this mark.
    mark = object()

    def keep(
        index: int, _module: nn.Module, _args: Any, kwargs: dict[str, Any], output: Tensor | tuple[Tensor, ...]
    ) -> None:
        if kwargs.get(READING) is not mark:
            return
        read[index] = hidden(output)
        if index == wanted[-1]:
            raise _Stop

    handles = [
        stack[i].register_forward_hook(functools.partial(keep, i), prepend=True, with_kwargs=True) for i in wanted
    ]
    try:
        inner.base_model(**inputs, **_cached(inner.base_model, cache), **{READING: mark})
    except _Stop:
        return read
    finally:
        for handle in handles:
            handle.remove()
    raise ModelError(
        f"Layer {wanted[-1]} of {type(inner).__name__} did not run its hooks. A model or layer that was compiled "
        "before cannot be read: torch.compiler.reset(), or compile it afterwards. Nor can an architecture that keeps "
        "the model's keywords from its layers."
    )


def _cached(model: nn.Module, cache: Cache | None) -> dict[str, Any]:
    """Keywords by which a forward pass takes a cache, or none."""
    if cache is None:
        return {"use_cache": False}
    takes = inspect.signature(model.forward).parameters
    return {"use_cache": True, next(name for name in CACHE_NAMES if name in takes): cache}


def cache_in(kwargs: Mapping[str, Any]) -> Any:
    """The key/value cache among the keywords of a model; None where there is none."""
    return next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)


def forget_graphs() -> None:
    """Have everything that was compiled compiled anew: such graphs do not see that a hook came or went."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
