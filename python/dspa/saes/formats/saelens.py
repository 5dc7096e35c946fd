"""SAELens folders: `cfg.json` and `sae_weights.safetensors`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import StrictBool, StrictStr
from safetensors.torch import load_file, save_file
from torch import Tensor
from typing_extensions import TypedDict

from dspa.errors import SAEError, refusal
from dspa.outputs import replacing, write_atomically
from dspa.saes.formats.source import (
    SAE_LENS_TENSORS,
    SourceSAE,
    check_names,
    check_stated,
    layer_of,
    read_config,
    read_file,
)
from dspa.saes.metadata import CENTERED, LOADED_WITH, is_centered
from dspa.schemas import Accepts, Count, Explained, Flag, NonNegative, PositiveInt, Text, check

SAE_LENS_CONFIG = "cfg.json"
SAE_LENS_WEIGHTS = "sae_weights.safetensors"
# The entry of a SAELens folder's metadata in which `FrozenSAE.save` records what it wrote.
RECORD = "dspa"
# Figures of quality in a SAELens folder's metadata, and as `Quality` names them.
FIGURES = {"explained_variance": "explained_variance", "l0": "l0", "num_dead_features": "dead"}
# Architectures of SAELens, and their tensors.
ARCHITECTURES = SAE_LENS_TENSORS | {
    "transcoder": SAE_LENS_TENSORS["standard"],
    "skip_transcoder": SAE_LENS_TENSORS["standard"] | {"W_skip"},
    "jumprelu_transcoder": SAE_LENS_TENSORS["jumprelu"],
    "jumprelu_skip_transcoder": SAE_LENS_TENSORS["jumprelu"] | {"W_skip"},
}


# The entries of configurations that are read here; all others are their makers' own.
class _Arguments(TypedDict, total=False):
    k: PositiveInt | None


# Written by `FrozenSAE.save`.
class _Record(TypedDict, total=False):
    fingerprint: Text
    weights: Text
    folded: list[Text]
    seal: Text


class _Metadata(TypedDict, total=False):
    hook_name: Text | None
    hook_name_out: Text | None
    hook_point: Text | None
    model_name: Text | None
    neuronpedia_id: Text | None
    model_from_pretrained_kwargs: dict[Text, Any] | None
    dspa: _Record
    explained_variance: Explained | None
    l0: NonNegative | None
    num_dead_features: Count | None


class _Config(_Metadata, total=False):
    d_in: PositiveInt | None
    d_sae: PositiveInt | None
    d_out: PositiveInt | None
    k: PositiveInt | None
    activation_fn_kwargs: _Arguments | None
    apply_b_dec_to_input: Flag
    normalize_activations: Annotated[StrictBool | StrictStr | None, Accepts("the name of a normalisation")]
    rescale_acts_by_decoder_norm: Flag
    metadata: _Metadata | None


def read_sae_lens(file: Path) -> SourceSAE:
    """Read the weights of a SAELens folder, with the `cfg.json` next to them."""
    cfg = read_config(file.with_name(SAE_LENS_CONFIG))
    return sae_lens_source(str(file.parent), cfg, read_file(file, load_file))


def write_sae_lens(folder: Path, sae: SourceSAE) -> None:
    """Write an SAE that needs no more folding as a SAELens folder, in the format of version 6.

    Raises:
        SAEError: the folder holds the `cfg.json` of something else, or SAELens has no such SAE.
    """
    config = folder / SAE_LENS_CONFIG
    if config.exists() and "d_sae" not in read_config(config):
        got = f"{folder}, whose {SAE_LENS_CONFIG} is of something else"
        raise refusal(SAEError, "The SAE's folder", got, "a new folder, or one of an SAE", "Name another.")
    metadata = {"sae_lens_version": "6.0.0", "model_name": sae.model_name, RECORD: sae.record}
    if sae.neuronpedia_id is not None:
        metadata["neuronpedia_id"] = sae.neuronpedia_id
    if sae.layer is not None:
        # SAELens knows the hooks of TransformerLens. The others here have the number of the layer too.
        is_hook = sae.hook_name is not None and sae.hook_name.startswith("blocks.")
        metadata["hook_name"] = sae.hook_name if is_hook else f"blocks.{sae.layer}.hook_resid_post"
    elif sae.hook_name is not None:
        metadata["hook_name"] = sae.hook_name
    if sae.hook_name_out is not None:
        metadata["hook_name_out"] = sae.hook_name_out
    if sae.center_writing_weights:
        metadata[LOADED_WITH] = {CENTERED: True}
    d_in, d_sae = sae.tensors["W_enc"].shape
    cfg = {
        "architecture": _architecture(sae),
        "d_in": d_in,
        "d_sae": d_sae,
        # SAELens converts every tensor to this dtype. That of the biases and thresholds rounds nothing.
        "dtype": str(sae.tensors["b_enc"].dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": sae.normalize_activations,
        "reshape_activations": sae.reshape_activations,
        "metadata": metadata,
    }
    if sae.transcoder:
        cfg["d_out"] = sae.tensors["W_dec"].shape[1]
    if sae.arch == "topk":
        cfg |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in sae.tensors.items()}
    with replacing(folder / SAE_LENS_WEIGHTS) as made:
        save_file(tensors, made)
    write_atomically(config, (json.dumps(cfg, indent=2) + "\n").encode())


def _architecture(sae: SourceSAE) -> str:
    """Return the name that SAELens has for what `sae` is."""
    if not sae.transcoder:
        return sae.arch
    skip = "skip_" if "W_skip" in sae.tensors else ""
    names = {"standard": f"{skip}transcoder", "jumprelu": f"jumprelu_{skip}transcoder"}
    if sae.arch not in names:
        advice = "It encodes and decodes here, as FrozenSAE and FusedSAE."
        raise refusal(
            SAEError, "The architecture to save", f"a {sae.arch} transcoder", ", ".join(ARCHITECTURES), advice
        )
    return names[sae.arch]


def sae_lens_source(name: str, cfg: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SourceSAE:
    """Return the SAE of a configuration and state dict of SAELens.

    Args:
        name: name of the SAE in messages.
        cfg: configuration of version 6, or the flat one before it.
        tensors: the state dict.

    Raises:
        SAEError: an SAE that `FrozenSAE` cannot be.
    """
    activation = cfg.get("activation_fn_str") or cfg.get("activation_fn") or "relu"
    arch = "topk" if activation == "topk" else cfg.get("architecture", "standard")
    # A list, because a value that JSON can hold may have no hash.
    if arch not in list(ARCHITECTURES):
        raise refusal(
            SAEError,
            f"{name}: the architecture",
            repr(arch),
            ", ".join(ARCHITECTURES),
            "For a batchtopk or matryoshka_batchtopk SAE that was just trained, save_inference_model() makes a "
            "jumprelu SAE.",
        )
    check(_Config, dict(cfg), SAEError, name)
    metadata = {**cfg, **(cfg.get("metadata") or {})}
    if activation not in ("relu", "topk"):
        raise refusal(SAEError, f"{name}: the activation function", repr(activation), "relu, topk")
    hook = metadata.get("hook_name") or metadata.get("hook_point") or None
    # Flat configurations may leave it to the name of the hook, as SAELens does.
    is_heads = "metadata" not in cfg and "hook_z" in (hook or "")
    reshape = cfg.get("reshape_activations") or ("hook_z" if is_heads else "none")
    if reshape not in ("none", "hook_z"):
        raise refusal(SAEError, f"{name}: reshape_activations", repr(reshape), "none, hook_z")
    # Some versions wrote it as ones, which have no effect.
    tensors = {key: t for key, t in tensors.items() if key != "scaling_factor" or bool((t != 1).any())}
    check_names(name, tensors, ARCHITECTURES[arch])
    is_transcoder = arch.endswith("transcoder")
    d_in = cfg.get("d_in")
    check_stated(name, tensors, d_in=d_in, d_sae=cfg.get("d_sae"), d_out=cfg.get("d_out") if is_transcoder else d_in)
    apply_b_dec_to_input = bool(cfg.get("apply_b_dec_to_input", True))
    if is_transcoder and apply_b_dec_to_input:
        raise refusal(SAEError, f"{name}: `apply_b_dec_to_input` of a {arch}", "true", "false, as in SAELens")
    normalize = cfg.get("normalize_activations") or "none"
    return SourceSAE(
        name=name,
        arch=("jumprelu" if "threshold" in tensors else "standard") if is_transcoder else arch,
        tensors=dict(tensors),
        k=cfg.get("k", (cfg.get("activation_fn_kwargs") or {}).get("k")) if arch == "topk" else None,
        layer=layer_of(name, hook),
        hook_name=hook,
        transcoder=is_transcoder,
        hook_name_out=metadata.get("hook_name_out") if is_transcoder else None,
        model_name=metadata.get("model_name"),
        neuronpedia_id=metadata.get("neuronpedia_id"),
        apply_b_dec_to_input=apply_b_dec_to_input,
        normalize_activations="expected_average_only_in" if normalize is True else normalize,
        reshape_activations=reshape,
        rescale_acts_by_decoder_norm=bool(cfg.get("rescale_acts_by_decoder_norm", False)),
        center_writing_weights=_centered(name, metadata),
        record=metadata.get(RECORD),
        figures=_figures(name, metadata, tensors["W_enc"].shape[1]),
    )


def _figures(name: str, metadata: Mapping[str, Any], d_sae: int) -> dict[str, float]:
    for key in ("l0", "num_dead_features"):
        if (metadata.get(key) or 0) > d_sae:
            raise refusal(SAEError, f"{name}: `{key}`", metadata[key], f"at most {d_sae}, the number of latents")
    return {ours: metadata[key] for key, ours in FIGURES.items() if metadata.get(key) is not None}


def _centered(name: str, metadata: Mapping[str, Any]) -> bool | None:
    if LOADED_WITH not in metadata and "metadata" not in metadata:
        return None
    return is_centered(name, metadata.get(LOADED_WITH) or {})
