"""Attention implementations that compute another function than the model's own code."""

from __future__ import annotations

import inspect
from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dspa.errors import ModelError, refusal

# The model's own code.
EAGER = "eager"
# What an attention module can ask for beyond a softmax: its attribute, and the argument that hands it to an
# implementation. One without that argument takes it among its **kwargs and leaves it out.
EXTRAS = {"attn_logit_softcapping": "softcap", "sinks": "s_aux"}
EXTRA_NAMES = {"attn_logit_softcapping": "the cap of attention scores", "sinks": "the attention sinks"}
# Arguments that an implementation takes and its kernel does not have.
NOT_IN_KERNEL = {"flash_attention_2": {"s_aux"}}


def attention_implementation(model: PreTrainedModel) -> str:
    """Return the name of the implementation that computes the attention of the language model."""
    return model.config.get_text_config()._attn_implementation or EAGER


def attention_extras(modules: nn.Module) -> list[str]:
    """Return the attributes of EXTRAS that an attention module in `modules` asks for."""
    return [name for name in EXTRAS if any(getattr(module, name, None) is not None for module in modules.modules())]


def describe_extras(wanted: Iterable[str]) -> str:
    """Return some of EXTRAS in words."""
    return " and ".join(f"{EXTRA_NAMES[name]} ({name})" for name in wanted)


def attention_fault(name: str, modules: nn.Module) -> str:
    """Return how an implementation departs from the code of attention modules, or "" if it does not.

    Returns "" for an implementation that is not registered, of which nothing is known.

    Args:
        name: name of the implementation.
        modules: a module that holds the attention modules.
    """
    if name.startswith("paged|"):
        return "is for continuous batching, and in other passes attends to the tokens after each token"
    function = ALL_ATTENTION_FUNCTIONS.get(name)
    if name == EAGER or function is None:
        return ""
    taken = set(inspect.signature(function).parameters) - NOT_IN_KERNEL.get(name, set())
    missing = [extra for extra in attention_extras(modules) if EXTRAS[extra] not in taken]
    return f"leaves out {describe_extras(missing)}" if missing else ""


def check_attention(model: PreTrainedModel, modules: nn.Module) -> None:
    """Raise `ModelError` if the implementation in use computes another function than `modules` of the model do."""
    name = attention_implementation(model)
    if wrong := attention_fault(name, modules):
        raise refusal(
            ModelError,
            f"The attention implementation of {type(model).__name__}",
            f"{name!r}, which {wrong}",
            "eager, or another that computes the same function",
            "Load the model with attn_implementation='eager', or call model.set_attn_implementation('eager').",
        )


def use_same_function(model: PreTrainedModel) -> None:
    """Change to the model's own attention code if the chosen implementation computes another function.

    Transformers before 5.21 chooses such an implementation by default for models with a cap, such as Gemma-2.
    """
    if attention_fault(attention_implementation(model), model):
        model.set_attn_implementation(EAGER)
