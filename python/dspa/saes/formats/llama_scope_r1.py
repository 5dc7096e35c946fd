"""Llama Scope R1 Distill: `sae_weights.safetensors`, with the `config.json` next to it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from safetensors.torch import load_file
from torch import Tensor
from typing_extensions import Required, TypedDict

from dspa.errors import SAEError, refusal
from dspa.saes.formats.llama_scope import RENAMED, scaled, take_norms
from dspa.saes.formats.source import SourceSAE, check_names, check_stated, layer_of, read_config, read_file, transposed
from dspa.schemas import Flag, OneOf, Positive, PositiveInt, Text, check

LLAMA_SCOPE_R1_CONFIG = "config.json"
THRESHOLD = "log_jumprelu_threshold"
NORM = "dataset_average_activation_norm"


class _Config(TypedDict, total=False):
    hook_point_in: Required[Text]
    hook_point_out: Text | None
    d_model: Required[PositiveInt]
    expansion_factor: Required[PositiveInt]
    act_fn: Required[Annotated[str, OneOf(("jumprelu",))]]
    apply_decoder_bias_to_pre_encoder: Flag
    sparsity_include_decoder_norm: Required[Flag]
    norm_activation: Required[Annotated[str, OneOf(("dataset-wise",))]]


def read_llama_scope_r1(file: Path) -> SourceSAE:
    """Read a JumpReLU SAE, whose threshold and norms are in the file of tensors."""
    config = file.with_name(LLAMA_SCOPE_R1_CONFIG)
    cfg = check(_Config, read_config(config), SAEError, str(config))
    if cfg.get("apply_decoder_bias_to_pre_encoder"):
        raise refusal(SAEError, f"{config}: `apply_decoder_bias_to_pre_encoder`", "true", "false")
    stored = read_file(file, load_file)
    hook, out = cfg["hook_point_in"], cfg.get("hook_point_out") or cfg["hook_point_in"]
    norms = [f"{NORM}.{hook}", f"{NORM}.{out}"]
    check_names(str(file), stored, frozenset({*RENAMED, THRESHOLD, *norms}))
    tensors = {name: transposed(stored[key]) if turn else stored[key] for key, (name, turn) in RENAMED.items()}
    d_in = cfg["d_model"]
    check_stated(str(file), tensors, d_in=d_in, d_sae=d_in * cfg["expansion_factor"], d_out=d_in)
    norm_in, norm_out = (_norm(file, name, stored[name]) for name in norms)
    take_norms(tensors, norm_in, norm_out)
    # It is compared with the latent, or with what that adds to the output, in units of the training.
    unit = norm_out if cfg["sparsity_include_decoder_norm"] else norm_in
    tensors["threshold"] = scaled(stored[THRESHOLD].double().exp(), unit / d_in**0.5)
    return SourceSAE(
        name=str(file.parent),
        arch="jumprelu",
        tensors=tensors,
        layer=None if out != hook else layer_of(str(config), hook),
        hook_name=hook,
        transcoder=out != hook,
        hook_name_out=out if out != hook else None,
        rescale_acts_by_decoder_norm=cfg["sparsity_include_decoder_norm"],
    )


def _norm(file: Path, name: str, stored: Tensor) -> float:
    norm: float = check(Positive, stored.tolist(), SAEError, f"{file}: `{name}`")
    return norm
