"""Gemma Scope 2: `params.safetensors`, with the `config.json` next to it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from safetensors.torch import load_file
from typing_extensions import Required, TypedDict

from dspa.errors import SAEError
from dspa.saes.formats.source import (
    SourceSAE,
    check_names,
    check_stated,
    layer_of,
    read_config,
    read_file,
    transposed,
)
from dspa.schemas import Flag, OneOf, PositiveInt, Text, check

GEMMA_SCOPE_2_WEIGHTS = "params.safetensors"
GEMMA_SCOPE_2_CONFIG = "config.json"
# Names of the maker: SAELens'.
RENAMED = {"w_enc": "W_enc", "w_dec": "W_dec"}
TENSORS = frozenset({*RENAMED, "b_enc", "b_dec", "threshold"})
SKIP = "affine_skip_connection"


class _Config(TypedDict, total=False):
    architecture: Required[Annotated[str, OneOf(("jump_relu",))]]
    hf_hook_point_in: Required[Text]
    hf_hook_point_out: Text | None
    model_name: Text | None
    width: PositiveInt | None
    affine_connection: Flag


def read_gemma_scope_2(file: Path) -> SourceSAE:
    """Read a `params.safetensors`: an SAE, or a transcoder with or without a skip connection."""
    config = file.with_name(GEMMA_SCOPE_2_CONFIG)
    cfg = check(_Config, read_config(config), SAEError, str(config))
    stored = read_file(file, load_file)
    is_affine = cfg.get("affine_connection", False)
    check_names(str(file), stored, TENSORS | ({SKIP} if is_affine else set()))
    tensors = {RENAMED.get(name, name): tensor for name, tensor in stored.items()}
    hook, out = cfg["hf_hook_point_in"], cfg.get("hf_hook_point_out")
    is_transcoder = is_affine or out not in (None, hook)
    d_in = None if is_transcoder else tensors["W_enc"].shape[0]
    check_stated(str(file), tensors, d_sae=cfg.get("width"), d_out=d_in)
    if is_affine:
        tensors["W_skip"] = transposed(tensors.pop(SKIP))
    return SourceSAE(
        name=str(file),
        arch="jumprelu",
        tensors=tensors,
        layer=None if is_transcoder else layer_of(str(config), hook.removesuffix(".output")),
        hook_name=hook,
        transcoder=is_transcoder,
        hook_name_out=out if is_transcoder else None,
        model_name=_model_name(cfg.get("model_name")),
    )


def _model_name(name: str | None) -> str | None:
    """Return the name of a model on the Hub, from which the maker's may differ."""
    if name is None:
        return None
    name = name.replace("gemma-v3", "gemma-3")
    # Of this size the base model has no suffix.
    return name.removesuffix("-pt") if "270m" in name else name
