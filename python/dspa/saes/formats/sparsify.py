"""EleutherAI's sparsify: `sae.safetensors`, with the `cfg.json` next to it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from safetensors.torch import load_file
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
from dspa.saes.metadata import is_elsewhere, residual_hook
from dspa.schemas import Count, Flag, OneOf, PositiveInt, Text, check

SPARSIFY_WEIGHTS = "sae.safetensors"
SPARSIFY_CONFIG = "cfg.json"
# The configuration of the training, in the folder that holds one folder per hookpoint.
RUN_CONFIG = "config.json"
RENAMED = {"encoder.weight": "W_enc", "encoder.bias": "b_enc"}
TENSORS = frozenset({*RENAMED, "W_dec", "b_dec"})


class _Config(TypedDict, total=False):
    d_in: Required[PositiveInt]
    k: Required[PositiveInt]
    num_latents: Count
    expansion_factor: PositiveInt
    activation: Annotated[str, OneOf(("topk",))]
    signed: Flag
    transcode: Flag
    skip_connection: Flag


class _Run(TypedDict, total=False):
    model: Text | None
    transcode: Flag


def read_sparsify(file: Path) -> SourceSAE:
    """Read a `sae.safetensors`. Its folder has the name of the module that was hooked."""
    config = file.with_name(SPARSIFY_CONFIG)
    cfg = check(_Config, read_config(config), SAEError, str(config))
    if cfg.get("signed"):
        raise refusal(SAEError, f"{config}: `signed`", "true, for latents of either sign", "false")
    hook_folder = file.parent.parent if re.fullmatch(r"seed\d+", file.parent.name) else file.parent
    run_config = hook_folder.parent / RUN_CONFIG
    run = check(_Run, read_config(run_config) if run_config.is_file() else {}, SAEError, str(run_config))
    is_transcoder = cfg.get("transcode", run.get("transcode", cfg.get("skip_connection", False)))
    stored = read_file(file, load_file)
    check_names(str(file), stored, TENSORS | ({"W_skip"} if cfg.get("skip_connection") else set()))
    tensors = {RENAMED.get(name, name): tensor for name, tensor in stored.items()}
    tensors["W_enc"] = transposed(tensors["W_enc"])
    d_in = cfg["d_in"]
    d_sae = cfg.get("num_latents") or (d_in * cfg["expansion_factor"] if "expansion_factor" in cfg else None)
    check_stated(str(file), tensors, d_in=d_in, d_sae=d_sae, d_out=d_in)
    hook = hook_folder.name if residual_hook(hook_folder.name) or is_elsewhere(hook_folder.name) else None
    return SourceSAE(
        name=str(file),
        arch="topk",
        tensors=tensors,
        k=cfg["k"],
        layer=None if is_transcoder else layer_of(str(file), hook),
        hook_name=hook,
        transcoder=is_transcoder,
        hook_name_out=hook if is_transcoder else None,
        model_name=run.get("model"),
        # Versions that did not have `transcode` in this file subtracted it from the input of transcoders too.
        apply_b_dec_to_input=not cfg.get("transcode", False),
    )
