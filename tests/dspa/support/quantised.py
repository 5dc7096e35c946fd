"""A model with 8-bit weights, as transformers and its quantisers leave one, without their packages."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel


class Int8Weight(Tensor):
    """Weights as int8 with a scale per row. It has no `.numpy()`, and any operation is one on dequantised weights."""

    @staticmethod
    def __new__(cls, values: Tensor, scale: Tensor) -> Int8Weight:
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype, device=values.device)

    def __init__(self, values: Tensor, scale: Tensor) -> None:
        self.values, self.scale = values, scale

    @classmethod
    def of(cls, weight: Tensor) -> Int8Weight:
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    def dequantised(self) -> Tensor:
        return self.values * self.scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return cls(args[0].values, args[0].scale)
        args, kwargs = tree_map(lambda x: x.dequantised() if isinstance(x, cls) else x, (args, kwargs or {}))
        return func(*args, **kwargs)


def quantise(model: PreTrainedModel) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Quantise the linear layers of a model except its output layer; also a plain model of the same weights."""
    plain = type(model)(model.config).eval()
    plain.load_state_dict(model.state_dict())
    for layer, twin in zip(linear_layers(model), linear_layers(plain), strict=True):
        weight = Int8Weight.of(layer.weight.detach())
        layer.weight = nn.Parameter(weight, requires_grad=False)
        twin.weight.data.copy_(weight.dequantised())
    model.hf_quantizer, model.is_quantized = SimpleNamespace(is_trainable=True), True
    model.quantization_method, model.is_loaded_in_4bit = "bitsandbytes", True
    return model, plain


def linear_layers(model: PreTrainedModel) -> list[nn.Linear]:
    """Linear layers of a model except its output layer."""
    return [module for module in model.base_model.modules() if isinstance(module, nn.Linear)]
