"""Where the package meets a Hugging Face model: find its decoder layers, read the residual at their outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dspa.errors import ModelError

# A PreTrainedModel that generates; its methods come from a mixin that its type does not tell.
CausalLM: TypeAlias = Any
# Llama, Mistral, Gemma, Gemma-2, Gemma-3 text, Qwen-2, Qwen-3; Gemma-3 with images; GPT-2; GPT-NeoX.
LAYER_PATHS = ("model.layers", "model.language_model.layers", "transformer.h", "gpt_neox.layers")
NOT_FINITE = "Check the model's weights and dtype (fp16 overflows in Gemma models: use bfloat16)."


def base_model(model: nn.Module) -> CausalLM:
    """The transformers model itself, out of a PEFT wrapper if it is in one."""
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if not isinstance(inner, PreTrainedModel):
        raise ModelError(
            f"`model` is a {type(model).__name__}; accepted: a transformers causal language model, or one in a "
            "PEFT wrapper."
        )
    if not inner.can_generate():
        raise ModelError(f"{type(inner).__name__} does not generate; accepted: the whole model, ...ForCausalLM.")
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ModelError("A PEFT model with learned prompts has no tokens to select from; accepted: LoRA and the like.")
    if inner.config.is_encoder_decoder:
        raise ModelError(f"{type(inner).__name__} is an encoder-decoder; accepted: decoder-only models.")
    return inner


def decoder_layers(model: nn.Module, path: str | None = None) -> nn.ModuleList:
    """The list of decoder layers of `model`, at the dotted `path` if its architecture is not a known one."""
    inner = base_model(model)
    for each in (path,) if path else LAYER_PATHS:
        found: Any = inner
        for name in each.split("."):
            found = getattr(found, name, None)
        if isinstance(found, nn.ModuleList):
            return found
    lists = [f"{name!r} ({len(m)})" for name, m in inner.named_modules() if isinstance(m, nn.ModuleList)]
    raise ModelError(
        f"No decoder layers at {path or ' or '.join(LAYER_PATHS)} in {type(inner).__name__}. Name them by hand: "
        f"layers='path.to.layers'. Module lists of this model (and their lengths): {', '.join(lists) or 'none'}."
    )


def device_of(module: nn.Module) -> torch.device:
    """Where a module of a model computes."""
    device = next(module.parameters()).device
    if device.type != "meta":
        return device
    # Offloaded weights are away until their module runs; accelerate knows where that will be.
    hooks = (getattr(each, "_hf_hook", None) for each in module.modules())
    return torch.device(next(hook.execution_device for hook in hooks if hook is not None))


def hidden_size(model: nn.Module) -> int:
    """Width of the residual stream."""
    return int(base_model(model).config.get_text_config().hidden_size)


def loaded_name(model: nn.Module) -> str:
    """Return the name by which `model` was loaded.

    It is the last part of a local folder's path, and empty for a model made from a configuration.
    """
    name = str(base_model(model).config.name_or_path or "")
    return Path(name).resolve().name if name and Path(name).is_dir() else name


def same_model(one: str, other: str) -> bool:
    """Whether two names can mean the same model: "google/gemma-2-2b-it" and "gemma-2-2b" can, since an SAE of
    a base model is used with the models tuned from it."""
    a, b = sorted((name.rstrip("/").rsplit("/", 1)[-1].lower() for name in (one, other)), key=len)
    return b == a or b.startswith(f"{a}-")


def check_eval(model: CausalLM) -> None:
    """Raise if dropout would change which latents are active."""
    if model.training:
        raise ModelError("The model is in training mode, where dropout blurs what is read: call model.eval() first.")


def check_finite(h: Tensor, layer: int, what: str = "Hidden states") -> None:
    """Raise unless all of `h`, residuals at the output of `layer`, is finite."""
    if not bool(h.isfinite().all()):
        raise ModelError(f"{what} at layer {layer} are NaN or infinite. {NOT_FINITE}")


def check_model_name(made: str, name: str, mine: str) -> None:
    """Raise if something `made` "... for" the model `name` is used with the model `mine`; empty is unknown."""
    if name and mine and not same_model(name, mine):
        raise ModelError(
            f"{made} {name!r} and the model is {mine!r}. If they are the same, say so: model_name={name!r}."
        )


def context_length(model: CausalLM) -> int | None:
    """Positions that the model has, None where it has no bound."""
    limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit


def check_context(model: CausalLM, length: int) -> None:
    """Raise if `length` tokens are more than the model has positions for."""
    limit = context_length(model)
    if limit is not None and length > limit:
        raise ModelError(
            f"The prompt has {length} tokens and {type(model).__name__} has {limit} positions. Shorten the prompt."
        )
