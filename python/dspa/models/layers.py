"""A Hugging Face model: its decoder layers, its names and sizes, and the checks that it can be used."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dspa.errors import ModelError, listed, refusal
from dspa.models.attention import check_attention
from dspa.schemas import Text, check, read_json

# A PreTrainedModel that generates. Its methods come from a mixin that its type does not show.
CausalLM: TypeAlias = Any
# Llama, Mistral, Gemma, Gemma-2, Gemma-3 text, Qwen-2, Qwen-3; Gemma-3 with images; GPT-2; GPT-NeoX.
LAYER_PATHS = ("model.layers", "model.language_model.layers", "transformer.h", "gpt_neox.layers")
# Attributes of modules with the probability or size of what they draw in training mode: attention_dropout, embd_pdrop,
# rank_dropout, router_jitter_noise.
DRAWN = re.compile("drop|jitter|noise")
NOT_FINITE = "Check the model's weights and dtype (fp16 overflows in Gemma models: use bfloat16)."


def base_model(model: nn.Module) -> CausalLM:
    """Return the transformers model itself, out of a PEFT wrapper if it is in one.

    Raises:
        ModelError: anything that is not a whole decoder-only language model.
    """
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if not isinstance(inner, PreTrainedModel):
        raise refusal(
            ModelError,
            "`model`",
            f"a {type(model).__name__}",
            "a transformers causal language model, or one in a PEFT wrapper",
        )
    if not inner.can_generate():
        raise refusal(
            ModelError,
            "`model`",
            f"a {type(inner).__name__}, which does not generate",
            "the whole model, ...ForCausalLM",
        )
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise refusal(
            ModelError,
            "`model`",
            "a PEFT model with learned prompts, which have no tokens to select from",
            "LoRA and the like",
        )
    if inner.config.is_encoder_decoder:
        raise refusal(ModelError, type(inner).__name__, "an encoder-decoder", "decoder-only models")
    return inner


def decoder_layers(model: nn.Module, path: str | None = None) -> nn.ModuleList:
    """Return the list of decoder layers of `model`.

    Args:
        model: a transformers model, or one in a PEFT wrapper.
        path: dotted path of the list, for an unknown architecture.

    Raises:
        ModelError: there is no such list, or the attention implementation leaves out what its layers compute.
    """
    stack = find_layers(model, path)
    check_attention(base_model(model), stack)
    return stack


def find_layers(model: nn.Module, path: str | None = None) -> nn.ModuleList:
    """Return the list of `decoder_layers` without a check of what its layers compute."""
    inner = base_model(model)
    if path is not None:
        check(Text, path, ModelError, "`layers`")
    for dotted in (path,) if path else LAYER_PATHS:
        layers: Any = inner
        for name in dotted.split("."):
            layers = getattr(layers, name, None)
        if isinstance(layers, nn.ModuleList):
            return layers
    lists = [f"{name!r} ({len(m)})" for name, m in inner.named_modules() if isinstance(m, nn.ModuleList)]
    raise ModelError(
        f"No decoder layers at {path or ' or '.join(LAYER_PATHS)} in {type(inner).__name__}. Pass their "
        f"dotted path as `layers`. Module lists of this model (and their lengths): {', '.join(lists) or 'none'}."
    )


def device_of(module: nn.Module) -> torch.device:
    """Return the device on which a module of a model computes."""
    device = next(module.parameters()).device
    if device.type != "meta":
        return device
    # Offloaded weights are away until their module runs. accelerate knows where that will be.
    hooks = (getattr(submodule, "_hf_hook", None) for submodule in module.modules())
    return torch.device(next(hook.execution_device for hook in hooks if hook is not None))


def hidden_size(model: nn.Module) -> int:
    """Return the width of the residual stream."""
    return int(base_model(model).config.get_text_config().hidden_size)


def has_layer_norm(model: nn.Module) -> bool:
    """Return True if the decoder normalises with LayerNorm, which ignores the mean of a residual, unlike RMSNorm."""
    modules = base_model(model).get_decoder().modules()
    return any(isinstance(m, nn.LayerNorm) or type(m).__name__.endswith("LayerNorm") for m in modules)


def loaded_name(model: nn.Module) -> str:
    """Return the name by which `model` was loaded.

    A local folder has the name that the hub's cache or its `config.json` records. Otherwise it is "./" and the name of
    the folder, which is not a model's name. Empty for a model made from a configuration.
    """
    name = str(base_model(model).config.name_or_path or "")
    path = Path(name).expanduser()
    if not name or not path.exists():
        return name
    path = path.resolve()
    if cached := re.search(r"/models--([^/]+)/snapshots/", path.as_posix()):
        return cached[1].replace("--", "/")
    config = path / "config.json"
    record = read_json(config, ModelError) if config.is_file() else None
    recorded = record.get("_name_or_path") if isinstance(record, dict) else None
    return recorded if isinstance(recorded, str) and is_model_name(recorded) else f"./{path.name}"


def is_model_name(name: str) -> bool:
    """Return True for a name of a model; False for a path, a snapshot's hash or an empty name, which name none."""
    is_path = name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1 or "\\" in name
    return bool(name) and not is_path and not re.fullmatch(r"[0-9a-f]{40}", name)


def same_model(one: str, other: str) -> bool:
    """Return True if two names can mean the same model, as they can if one of them names none.

    "google/gemma-2-2b-it" and "gemma-2-2b" can, since an SAE of a base model is used with the models tuned from it. So
    can "meta-llama/Llama-3.1-8B-Instruct" and "llama3.1-8b-it", as Neuronpedia calls it.
    """
    if not (is_model_name(one) and is_model_name(other)):
        return True
    shorter, longer = sorted(map(_spelled_alike, (one, other)), key=len)
    return longer == shorter or longer.startswith(f"{shorter}-")


def _spelled_alike(name: str) -> str:
    """Return a model's name without its owner, in the one of several spellings that has most hyphens."""
    name = name.rsplit("/", 1)[-1].lower().removeprefix("meta-")
    name = re.sub(r"(?<=[a-z]{2})(?=[0-9])", "-", name)
    return re.sub(r"-instruct\b", "-it", name)


def in_training(model: nn.Module) -> list[str]:
    """Return the names of the modules whose training mode changes residuals, "" for the model itself.

    The mode of the model is no evidence of its modules': those that PEFT adds later have their own. A module in
    training mode that has nothing to draw, as a new linear layer, computes the same.
    """
    inner = base_model(model)
    modules = inner.named_modules()
    return [name for name, module in modules if module.training and (module is inner or _differs_in_training(module))]


def _differs_in_training(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    drawn = [value for name, value in vars(module).items() if DRAWN.search(name)]
    # PEFT has one value per adapter.
    numbers = [number for value in drawn for number in (value.values() if isinstance(value, dict) else [value])]
    return isinstance(module, nn.modules.batchnorm._NormBase | nn.RReLU) or any(
        isinstance(number, float) and number > 0 for number in numbers
    )


def check_eval(model: CausalLM) -> None:
    """Raise `ModelError` if the model or a part of it is in training mode, where dropout changes residuals."""
    if names := in_training(model):
        part = "" if names[0] == "" else f" in part ({listed(names, 3)})"
        raise ModelError(
            f"The model is in training mode{part}, where dropout changes residuals: call model.eval() first."
        )


def check_finite(h: Tensor, layer: int, what: str = "Hidden states") -> None:
    """Raise `ModelError` unless all residuals `h` at the output of `layer` are finite."""
    if not bool(h.isfinite().all()):
        raise ModelError(f"{what} at layer {layer} are NaN or infinite. {NOT_FINITE}")


def check_model_name(made: str, name: str, mine: str) -> None:
    """Raise `ModelError` if two names cannot mean the same model.

    Args:
        made: start of the message, such as "The map was made with".
        name: model that the thing was made with.
        mine: model that it is used with.
    """
    if not same_model(name, mine):
        raise ModelError(
            f"{made} {name!r} and the model is {mine!r}. If they are the same, pass {name!r} as `model_name`."
        )


def context_length(model: CausalLM) -> int | None:
    """Return the number of positions that the model has, None if it has no bound."""
    limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit


def check_context(model: CausalLM, length: int) -> None:
    """Raise `ModelError` if the model has fewer than `length` positions."""
    limit = context_length(model)
    if limit is not None and length > limit:
        raise ModelError(
            f"The prompt has {length} tokens and {type(model).__name__} has {limit} positions. Shorten the prompt."
        )
