"""Checks that gradients pass through a base model whose layers are quantised, or have adapters of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dspa.errors import ModelError, refusal
from dspa.models.layers import CausalLM, device_of


def check_gradients(model: CausalLM) -> None:
    """Check that the layers of a quantised model pass gradients on, as kernels for inference alone do not.

    Autograd does not notice: the residual stream carries gradients around such a layer, and they are wrong.

    Raises:
        ModelError: a layer that passes none.
    """
    if getattr(model, "hf_quantizer", None) is None:
        return
    closed: list[str] = []

    def check(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        is_layer = args and isinstance(args[0], Tensor) and args[0].is_floating_point() and isinstance(output, Tensor)
        if is_layer and not _passes_gradients(module, *args, **kwargs):
            closed.append(name)

    handles = [
        module.register_forward_hook(lambda *call, name=name: check(name, *call), with_kwargs=True)
        for name, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    ]
    ids = torch.zeros(1, 2, dtype=torch.int64, device=device_of(model.get_input_embeddings()))
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if closed:
        raise refusal(
            ModelError,
            "`model`",
            f"quantised in a way that lets no gradient pass {len(closed)} of its layers ({', '.join(closed[:3])})",
            "layers with a backward pass, such as those of bitsandbytes, torchao and quanto",
            "Load the model anew: on CPUs, bitsandbytes' 4-bit layers lose their backward pass once they have run "
            "without gradients. For other layers, use another quantization or none.",
        )


def _passes_gradients(module: nn.Module, h: Tensor, *args: Any, **kwargs: Any) -> bool:
    """Return True if the output of `module` has a gradient with respect to its input `h`."""
    with torch.enable_grad():
        h = h.detach().requires_grad_()
        try:
            output = module.forward(h, *args, **kwargs)
            return torch.autograd.grad(output.sum(), h, allow_unused=True)[0] is not None
        # What autograd and kernels say of an operation without a backward pass.
        except RuntimeError:
            return False


def check_output_layer(model: CausalLM, otherwise: str = "") -> None:
    """Check that the output layer is what TRL's DPO takes it for: a product with its weights.

    Args:
        model: the model.
        otherwise: what else the advice of the error should say.

    Raises:
        ModelError: a quantised output layer, or one with an adapter of its own.
    """
    head = model.get_output_embeddings()
    kinds = type(head), type(head.weight)
    if kinds != (nn.Linear, nn.Parameter):
        got = " of a ".join(f"{kind.__module__}.{kind.__name__}" for kind in kinds)
        advice = f"Use a model whose output layer is neither quantised nor adapted{otherwise}."
        raise refusal(ModelError, "The output layer, in a training with DPO,", f"a {got}", "a plain Linear", advice)
