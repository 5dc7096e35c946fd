"""Llama Scope: `checkpoints/final.safetensors`, with the `hyperparams.json` in the folder above."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
from safetensors.torch import load_file
from torch import Tensor
from typing_extensions import Required, TypedDict

from dspa.errors import SAEError, refusal
from dspa.saes.formats.source import (
    SourceSAE,
    check_names,
    check_stated,
    layer_of,
    read_config,
    read_file,
    transposed,
)
from dspa.schemas import Flag, NonNegative, OneOf, Positive, PositiveInt, Text, check

LLAMA_SCOPE_WEIGHTS = ("checkpoints/final.safetensors", "checkpoints/pruned.safetensors")
LLAMA_SCOPE_CONFIG = "hyperparams.json"
MODEL_CONFIG = "lm_config.json"
# Names of the maker: SAELens', and True if its `nn.Linear` holds the matrix transposed.
RENAMED = {
    "encoder.weight": ("W_enc", True),
    "encoder.bias": ("b_enc", False),
    "decoder.weight": ("W_dec", True),
    "decoder.bias": ("b_dec", False),
}

# `in` is a word of Python.
_Norms = TypedDict("_Norms", {"in": Positive, "out": Positive})


class _Config(TypedDict, total=False):
    hook_point_in: Required[Text]
    hook_point_out: Text | None
    d_model: Required[PositiveInt]
    d_sae: PositiveInt | None
    act_fn: Required[Annotated[str, OneOf(("jumprelu", "topk", "relu"))]]
    jump_relu_threshold: NonNegative
    top_k: PositiveInt
    apply_decoder_bias_to_pre_encoder: Required[Flag]
    sparsity_include_decoder_norm: Required[Flag]
    norm_activation: Required[Annotated[str, OneOf(("dataset-wise", "inference", "none"))]]
    dataset_average_activation_norm: _Norms | None


class _Model(TypedDict, total=False):
    model_name: Text | None


def read_llama_scope(file: Path) -> SourceSAE:
    """Read an SAE or transcoder, as its maker's package reads it for inference."""
    config, model_config = (file.parent.parent / name for name in (LLAMA_SCOPE_CONFIG, MODEL_CONFIG))
    cfg = check(_Config, read_config(config), SAEError, str(config))
    model = check(_Model, read_config(model_config) if model_config.is_file() else {}, SAEError, str(model_config))
    stored = read_file(file, load_file)
    check_names(str(file), stored, frozenset(RENAMED))
    tensors = {name: transposed(stored[key]) if turn else stored[key] for key, (name, turn) in RENAMED.items()}
    check_stated(str(file), tensors, d_in=cfg["d_model"], d_sae=cfg.get("d_sae"), d_out=cfg["d_model"])
    if cfg["norm_activation"] == "dataset-wise":
        norms = cfg.get("dataset_average_activation_norm")
        if norms is None:
            accepted = 'the norms {"in": ..., "out": ...} of a dataset-wise SAE'
            raise refusal(SAEError, f"{config}: `dataset_average_activation_norm`", "missing", accepted)
        take_norms(tensors, norms["in"], norms["out"])
    arch = {"relu": "standard"}.get(cfg["act_fn"], cfg["act_fn"])
    threshold = cfg.get("jump_relu_threshold", 0.0)
    if arch == "jumprelu" or (arch == "topk" and threshold > 0):
        arch = "jumprelu"
        # The maker compares it with what comes out of the folded encoder.
        tensors["threshold"] = torch.full_like(tensors["b_enc"], threshold, dtype=torch.float64)
    hook, out = cfg["hook_point_in"], cfg.get("hook_point_out")
    is_transcoder = out not in (None, hook)
    return SourceSAE(
        name=str(file.parent.parent),
        arch=arch,
        tensors=tensors,
        k=cfg.get("top_k") if arch == "topk" else None,
        layer=None if is_transcoder else layer_of(str(config), hook),
        hook_name=hook,
        transcoder=is_transcoder,
        hook_name_out=out if is_transcoder else None,
        model_name=model.get("model_name"),
        apply_b_dec_to_input=cfg["apply_decoder_bias_to_pre_encoder"],
        rescale_acts_by_decoder_norm=cfg["sparsity_include_decoder_norm"],
    )


def take_norms(tensors: dict[str, Tensor], norm_in: float, norm_out: float) -> None:
    """Fold into biases and decoder that the SAE was trained on activations of norm sqrt(d_model) on average.

    Latents are in units of the activations then, and the matrix of the encoder stays the same.

    Args:
        tensors: SAELens' names, changed in place.
        norm_in: average norm of what the SAE reads.
        norm_out: average norm of what it reconstructs.
    """
    root = tensors["W_enc"].shape[0] ** 0.5
    tensors["b_enc"] = scaled(tensors["b_enc"], norm_in / root)
    tensors["b_dec"] = scaled(tensors["b_dec"], norm_out / root)
    if norm_in != norm_out:
        tensors["W_dec"] = tensors["W_dec"] * (norm_out / norm_in)


def scaled(vector: Tensor, factor: float) -> Tensor:
    """Return a vector times a factor, in fp32 or wider."""
    return (vector.double() * factor).to(torch.promote_types(vector.dtype, torch.float32))
