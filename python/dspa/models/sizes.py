"""Sizes of a model, read from its configuration without its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from dspa.errors import ModelError, refusal
from dspa.models.gguf import weights_dtype
from dspa.models.layers import CausalLM, find_layers
from dspa.models.places import model_place, reading_model


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a decoder-only model that its costs depend on.

    Attributes:
        name: last part of the name by which the model was loaded.
        d_model: width of the residual stream.
        layers: weights of each decoder layer that multiply a token.
        head: weights of the language-model head.
        d_attention: width of all heads of a layer together.
        dtype: dtype of the weights.
        quantized: True if its weights are stored in fewer bits than those of `dtype`.
    """

    name: str
    d_model: int
    layers: tuple[int, ...]
    head: int
    d_attention: int
    dtype: torch.dtype
    quantized: bool = False

    @property
    def weights(self) -> int:
        """Weights that multiply each token of a full pass: all layers and the language-model head."""
        return sum(self.layers) + self.head

    def weights_to(self, layer: int) -> int:
        """Return the weights that multiply each token up to the output of a layer."""
        return sum(self.layers[: layer + 1])


def empty_model(name: str, *, trust_remote_code: bool = False) -> CausalLM:
    """Return a model without data, on the device "meta", from its configuration alone.

    Args:
        name: a folder, or a name on the Hub.
        trust_remote_code: run Python code that comes with the model, if transformers has none for it.

    Raises:
        OSError: there is no such configuration.
        ValueError: there is no model, its configuration is not that of a causal language model, or it brings code that
            is not trusted.
    """
    place = model_place(name)
    with reading_model(place):
        config = AutoConfig.from_pretrained(place.name, trust_remote_code=trust_remote_code, **place.arguments)
    config.name_or_path = place.path
    if place.gguf_file:
        config.dtype = weights_dtype(Path(place.path))
    with reading_model(place), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def sizes_of(model: CausalLM, dtype: str = "auto", layers: str | None = None) -> ModelSizes:
    """Return the sizes of a model, which may be without data.

    Args:
        model: the model.
        dtype: dtype in which it will be loaded; "auto": that of its configuration.
        layers: as for `Steering.attach`.

    Raises:
        ModelError: the configuration names no dtype, or the model's layers are not known.
    """
    config = model.config.get_text_config()
    stored = config.dtype if dtype == "auto" else getattr(torch, dtype)
    if stored is None:
        got, accepted = "auto, and the configuration of the model names none", "bfloat16, float16, float32"
        raise refusal(ModelError, "`dtype`", got, accepted)
    share, n_heads = _used_experts(config), getattr(config, "num_attention_heads", 0)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // max(1, n_heads)
    return ModelSizes(
        name=Path(model.config.name_or_path).absolute().name,
        d_model=config.hidden_size,
        layers=tuple(_multiplying_weights(layer, share) for layer in find_layers(model, layers)),
        head=model.get_output_embeddings().weight.numel(),
        d_attention=n_heads * head_dim,
        dtype=stored,
        quantized=getattr(model.config, "quantization_config", None) is not None,
    )


def _multiplying_weights(layer: nn.Module, share: float) -> int:
    """Return the number of weights that multiply a token: all matrices, of the experts those that a token uses."""
    sizes = {name: p.numel() for name, p in layer.named_parameters() if p.dim() > 1}
    experts = sum(size for name, size in sizes.items() if ".experts." in f".{name}")
    return sum(sizes.values()) - experts + round(share * experts)


def _used_experts(config: PretrainedConfig) -> float:
    """Return the share of a layer's experts that a token uses, 1 for a model without experts."""
    used = getattr(config, "num_experts_per_tok", None)
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    total = next((n for name in names if (n := getattr(config, name, None))), None)
    return used / total if used and total else 1.0
