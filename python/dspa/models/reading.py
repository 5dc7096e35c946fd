"""Residuals read at the outputs of layers, in one forward pass."""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from dspa.errors import ModelError, refusal
from dspa.models.layers import CausalLM, base_model, device_of, find_layers, hidden_size, in_training

# What models call a key/value cache: since transformers 5.24, and before.
CACHE_NAMES = ("cache", "past_key_values")
# Keyword by which a pass that only reads marks itself to the layers, so that it is not steered.
READING = "dspa_reading"
# Keywords that a layer has to get where its residual is edited by position and plan.
KEYWORDS = {READING: "keywords of a call", "position_ids": "keyword `position_ids`"}


class _Stop(Exception):
    """Ends a forward pass once the last wanted layer has run."""


def hidden(output: Any, width: int) -> Tensor:
    """Return the residual [B, T, width] in the output of a decoder layer.

    Raises:
        ModelError: the layer returns something else, such as several residual streams.
    """
    h = output[0] if isinstance(output, tuple) else output
    if not isinstance(h, Tensor) or h.dim() != 3 or h.shape[-1] != width:
        raise refusal(
            ModelError,
            "The output of a decoder layer",
            f"of shape {list(h.shape)}" if isinstance(h, Tensor) else f"a {type(h).__name__}",
            f"one residual stream, [B, T, {width}]",
            "A model whose layers return several streams, as Gemma-3n's and DeepSeek-V4's do, can be neither read nor "
            "steered.",
        )
    return h


def check_residual(model: nn.Module, layer: int, layers: str | None = None, *, keywords: bool = False) -> None:
    """Check a decoder layer by one token through it. Does nothing in training mode, where a pass draws random numbers.

    Args:
        model: as for `read_layers`.
        layer: which decoder layer, from 0.
        layers: as for `read_layers`.
        keywords: check too that keywords of the model and `position_ids` reach the layer.

    Raises:
        ModelError: the layer does not run, returns no single residual stream, or gets no keywords.
    """
    inner = base_model(model)
    if in_training(inner):
        return
    token, names = torch.zeros(1, 1, dtype=torch.long, device=device_of(inner.get_input_embeddings())), set[str]()
    handle = find_layers(inner, layers)[layer].register_forward_pre_hook(
        lambda _module, _args, kwargs: names.update(kwargs), with_kwargs=True
    )
    inputs: dict[str, Any] = {"input_ids": token}
    if "position_ids" in _parameters(inner):
        inputs["position_ids"] = token
    try:
        read_layers(inner, [layer], layers, **inputs)
    finally:
        handle.remove()
    if keywords and (kept := [text for name, text in KEYWORDS.items() if name not in names]):
        got = f"a model whose layers get no {' and no '.join(kept)}"
        accepted, advice = "models that pass them on", "FSRL adapters need no keywords."
        raise refusal(ModelError, type(inner).__name__, got, accepted, advice)


@torch.no_grad()
def read_layers(
    model: nn.Module, indices: Iterable[int], layers: str | None = None, cache: Cache | None = None, **inputs: Any
) -> dict[int, Tensor]:
    """Return what `layer_outputs` does, without gradients."""
    return layer_outputs(model, indices, layers, cache, **inputs)


def layer_outputs(
    model: nn.Module, indices: Iterable[int], layers: str | None = None, cache: Cache | None = None, **inputs: Any
) -> dict[int, Tensor]:
    """Return the residuals [B, T, d_in] at the outputs of the decoder layers `indices`, by one forward pass.

    Nothing above the last of them runs: no further layer, no final norm, no language-model head.

    Args:
        model: a transformers model, or one in a PEFT wrapper.
        indices: which decoder layers, from 0.
        layers: dotted path of the list of decoder layers, for an unknown architecture.
        cache: key/value cache that the pass continues and extends.
        inputs: keywords of the forward pass.

    Raises:
        ModelError: the hooks of the last layer did not run, or a layer returns no residual of this shape.
    """
    inner, wanted = base_model(model), sorted(set(indices))
    stack, width, read = find_layers(model, layers), hidden_size(model), {}

    # Another thread may be in the same layers: only the pass of this one is read.
    thread = threading.get_ident()

    def keep(index: int, _module: nn.Module, _args: Any, output: Tensor | tuple[Tensor, ...]) -> None:
        if threading.get_ident() != thread:
            return
        read[index] = hidden(output, width)
        if index == wanted[-1]:
            raise _Stop

    handles = [stack[i].register_forward_hook(functools.partial(keep, i), prepend=True) for i in wanted]
    try:
        inner.base_model(**inputs, **_cached(inner, cache), **_marked(inner))
    except _Stop:
        return read
    finally:
        for handle in handles:
            handle.remove()
    raise ModelError(
        f"Layer {wanted[-1]} of {type(inner).__name__} did not run its hooks. A model or layer that was compiled "
        "before cannot be read: call torch.compiler.reset(), or compile it afterwards. Nor can a layer that the model "
        "skips for text, as one of cross-attention to images: take an SAE of another layer."
    )


def last_hidden(model: nn.Module, cache: Cache | None = None, **inputs: Any) -> Tensor:
    """Return the last hidden state [B, T, d_in], after the final norm, of a pass that only reads.

    Args:
        model: as for `layer_outputs`.
        cache: key/value cache that the pass continues and extends.
        inputs: keywords of the forward pass.

    Raises:
        ModelError: a model without a decoder of its own.
    """
    inner = base_model(model)
    output = inner.base_model(**inputs, **_cached(inner, cache), **_marked(inner))
    state: Tensor | None = getattr(output, "last_hidden_state", None)
    if state is None:
        got, accepted = "without a decoder of its own", "a causal language model with one"
        raise refusal(ModelError, type(inner).__name__, got, accepted)
    return state


def takes_cache(model: CausalLM) -> bool:
    """Return True if a forward pass of the model takes a cache of transformers."""
    return any(name in _parameters(model) for name in CACHE_NAMES)


def _cached(model: CausalLM, cache: Cache | None) -> dict[str, Any]:
    """Return the keywords by which a forward pass takes `cache`, or uses none."""
    if cache is None:
        return {"use_cache": False}
    return {"use_cache": True, next(name for name in CACHE_NAMES if name in _parameters(model)): cache}


def _marked(model: CausalLM) -> dict[str, bool]:
    """Return the mark of a pass that only reads. A model without room for it cannot be steered either."""
    kinds = {parameter.kind for parameter in _parameters(model).values()}
    return {READING: True} if inspect.Parameter.VAR_KEYWORD in kinds else {}


def _parameters(model: CausalLM) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(model.base_model.forward).parameters


def cache_in(kwargs: Mapping[str, Any]) -> Any:
    """Return the key/value cache among the keywords of a model, or None."""
    return next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)


def forget_graphs() -> None:
    """Discard all compiled graphs, which do not see that a hook was added or removed."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
