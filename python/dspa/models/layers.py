"""Where the package meets a Hugging Face model: find its decoder layers, read the residual at their outputs."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from dspa.errors import ModelError
from dspa.saes.frozen import FrozenSAE

# A PreTrainedModel that generates; its methods come from a mixin that its type does not tell.
CausalLM: TypeAlias = Any
# Llama, Mistral, Gemma, Gemma-2, Gemma-3 text, Qwen-2, Qwen-3; Gemma-3 with images; GPT-2; GPT-NeoX.
LAYER_PATHS = ("model.layers", "model.language_model.layers", "transformer.h", "gpt_neox.layers")
# What models call a key/value cache: since transformers 5.24, and before.
CACHE_NAMES = ("cache", "past_key_values")
# Told to the layers by a pass that only reads: steering stays out of it.
READING = "dspa_reading"
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


def model_name(model: nn.Module) -> str:
    """The name that `model` was loaded by, of a local folder its last part; empty for a model made from a
    configuration."""
    name = str(base_model(model).config.name_or_path or "")
    return Path(name).resolve().name if name and Path(name).is_dir() else name


def same_model(one: str, other: str) -> bool:
    """Whether two names can mean the same model: "google/gemma-2-2b-it" and "gemma-2-2b" can, since an SAE of
    a base model is used with the models tuned from it."""
    a, b = sorted((name.rstrip("/").rsplit("/", 1)[-1].lower() for name in (one, other)), key=len)
    return b == a or b.startswith(f"{a}-")


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


def check_saes(
    sae_in: FrozenSAE, sae_out: FrozenSAE, model: nn.Module, n_layers: int, called: str | None = None
) -> None:
    """Raise unless both SAEs can sit at their layers of `model`, the input SAE first.

    `called` is what the model is, where its own name or path does not tell.
    """
    for name, sae in (("sae_in", sae_in), ("sae_out", sae_out)):
        check_sae(name, sae, model, n_layers, called)
    if layer_of(sae_in) >= layer_of(sae_out):
        raise ModelError(
            f"The input SAE sits at layer {sae_in.layer} and the output SAE at layer {sae_out.layer}. The input SAE "
            "has to come first, since a prompt is read before it is steered."
        )


def layer_of(sae: FrozenSAE) -> int:
    """The layer of an SAE that has to say one."""
    if sae.layer is None:
        raise ModelError(f"{sae!r} does not say its layer. Load it with FrozenSAE.load(path, layer=...).")
    return sae.layer


def check_sae(name: str, sae: FrozenSAE, model: nn.Module, n_layers: int, called: str | None) -> None:
    """Raise unless the SAE can sit at its layer of `model`."""
    if not 0 <= layer_of(sae) < n_layers:
        raise ModelError(f"`{name}` sits at layer {sae.layer}; accepted: 0 to {n_layers - 1}, the model's layers.")
    check_made_for(name, sae, model, called)


def check_made_for(name: str, sae: FrozenSAE, model: nn.Module, called: str | None) -> None:
    """Raise unless an SAE is of the width of `model`, and was not made for another one."""
    if sae.d_in != hidden_size(model):
        raise ModelError(
            f"`{name}` reads {sae.d_in} dimensions and the model's hidden size is {hidden_size(model)}: it is an SAE "
            "of another model."
        )
    check_model_name(f"`{name}` was made for", sae.model_name or "", called or model_name(model))
