"""Files that hold an SAE: SAELens folders, Gemma Scope's `params.npz`, dictionary_learning's `ae.pt`.

A reader returns an SAE as its maker stored it, with SAELens' names and shapes. `FrozenSAE` checks and folds it.
Nothing is ever unpickled except tensors, through `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import StrictBool, StrictStr
from safetensors.torch import load_file, save_file
from torch import Tensor
from typing_extensions import TypedDict

from dspa.data.lines import MOST_EXPANSION, SMALL
from dspa.errors import SAEError, refusal
from dspa.outputs import replacing, write_atomically
from dspa.saes.metadata import CENTERED, LOADED_WITH, is_centered, residual_hook
from dspa.schemas import Accepts, Count, Flag, PositiveInt, Text, check, read_json

SAE_LENS_CONFIG = "cfg.json"
SAE_LENS_WEIGHTS = "sae_weights.safetensors"
GEMMA_SCOPE_WEIGHTS = "params.npz"
DICTIONARY_WEIGHTS = "ae.pt"
DICTIONARY_CONFIG = "config.json"
# The entry of a SAELens folder's metadata in which `FrozenSAE.save` records what it wrote.
RECORD = "dspa"
# The entry of that record which covers the others.
SEAL = "seal"
# Figures of quality in a SAELens folder's metadata, and as `Quality` names them.
FIGURES = {"explained_variance": "explained_variance", "l0": "l0", "num_dead_features": "dead"}

COMMON = frozenset({"W_enc", "W_dec", "b_dec"})
SAE_LENS_TENSORS = {
    "standard": COMMON | {"b_enc"},
    "jumprelu": COMMON | {"b_enc", "threshold"},
    "topk": COMMON | {"b_enc"},
    "gated": COMMON | {"b_gate", "b_mag", "r_mag"},
}
# Tensors of dictionary_learning: SAELens' name, and True if its `nn.Linear` holds the matrix transposed.
RENAMED = {
    "encoder.weight": ("W_enc", True),
    "encoder.bias": ("b_enc", False),
    "decoder.weight": ("W_dec", True),
    "bias": ("b_dec", False),
    "decoder_bias": ("b_dec", False),
    "gate_bias": ("b_gate", False),
    "mag_bias": ("b_mag", False),
}


# The entries of configurations that are read here; all others are their makers' own.
class _Arguments(TypedDict, total=False):
    k: PositiveInt | None


class _Metadata(TypedDict, total=False):
    hook_name: Text | None
    hook_point: Text | None
    model_name: Text | None
    neuronpedia_id: Text | None
    model_from_pretrained_kwargs: dict[Text, Any] | None
    dspa: dict[Text, Any]


class _Config(_Metadata, total=False):
    d_in: PositiveInt | None
    d_sae: PositiveInt | None
    k: PositiveInt | None
    activation_fn_kwargs: _Arguments | None
    apply_b_dec_to_input: Flag
    normalize_activations: Annotated[StrictBool | StrictStr | None, Accepts("the name of a normalisation")]
    rescale_acts_by_decoder_norm: Flag
    metadata: _Metadata | None


class _Trainer(TypedDict, total=False):
    dict_class: Text
    k: PositiveInt | None
    layer: Count | None
    lm_name: Text | None
    submodule_name: Text | None


class _Dictionary(TypedDict):
    trainer: _Trainer


@dataclass(frozen=True)
class SourceSAE:
    """An SAE as its maker stored it, nothing folded.

    Attributes:
        name: where it came from, for messages.
        arch: "standard", "jumprelu", "topk" or "gated".
        tensors: SAELens' names and shapes. A gated SAE has `b_gate`, `b_mag` and `r_mag` instead of `b_enc`.
        center_writing_weights: True if it was trained on residuals less their mean over d_in; None if an old file does
            not say.
        hook_name: its place in the model, by its maker's name; None if unknown.
        neuronpedia_id: its model and place on Neuronpedia, as "gpt2-small/8-res-jb".
        record: what `FrozenSAE.save` wrote about it.
        figures: those of `FIGURES` that its training recorded.
        owned: True if nothing else reads or writes the memory of `tensors`, unlike that of a mapped file.
    """

    name: str
    arch: str
    tensors: dict[str, Tensor]
    k: int | None = None
    layer: int | None = None
    hook_name: str | None = None
    model_name: str | None = None
    neuronpedia_id: str | None = None
    apply_b_dec_to_input: bool = False
    normalize_activations: str = "none"
    rescale_acts_by_decoder_norm: bool = False
    center_writing_weights: bool | None = False
    record: dict[str, Any] | None = None
    figures: dict[str, float] = field(default_factory=dict)
    owned: bool = False


@dataclass(frozen=True)
class _DictClass:
    """A class of dictionary_learning: its architecture at inference, and the keys of its state dict."""

    arch: str
    required: frozenset[str]
    optional: frozenset[str] = frozenset()
    apply_b_dec_to_input: bool = True


_LINEAR = frozenset({"encoder.weight", "encoder.bias", "decoder.weight"})
_MATRICES = COMMON | {"b_enc", "threshold"}
_GATED = frozenset({"encoder.weight", "decoder.weight", "decoder_bias", "gate_bias", "mag_bias", "r_mag"})
# Read as stored, like SAELens does. dictionary_learning's own AutoEncoder.from_pretrained also normalises W_dec.
DICT_CLASSES = {
    "AutoEncoder": _DictClass("standard", _LINEAR | {"bias"}),
    "AutoEncoderTopK": _DictClass("topk", _LINEAR | {"b_dec"}, frozenset({"k", "threshold"})),
    "BatchTopKSAE": _DictClass("jumprelu", _LINEAR | {"b_dec", "threshold"}, frozenset({"k"})),
    "MatryoshkaBatchTopKSAE": _DictClass("jumprelu", _MATRICES | {"k", "group_sizes"}),
    "JumpReluAutoEncoder": _DictClass("jumprelu", _MATRICES, apply_b_dec_to_input=False),
    "GatedAutoEncoder": _DictClass("gated", _GATED),
}


def read_sae(path: Path, dict_class: str | None = None) -> SourceSAE:
    """Read the SAE in a folder or file of SAELens, Gemma Scope or dictionary_learning. The file's name decides which.

    Args:
        path: the folder or file.
        dict_class: class of an `ae.pt` that has no `config.json` next to it.

    Raises:
        SAEError: a file that cannot be read, or is none of these.
    """
    file = _weights_file(path)
    if file.suffix == ".safetensors":
        return _read_sae_lens(file)
    if file.suffix == ".npz":
        return _read_gemma_scope(file)
    return _read_dictionary(file, dict_class)


def write_sae_lens(folder: Path, sae: SourceSAE) -> None:
    """Write an SAE that needs no more folding as a SAELens folder, in the format of version 6.

    Raises:
        SAEError: the folder holds the `cfg.json` of something else.
    """
    config = folder / SAE_LENS_CONFIG
    if config.exists() and "d_sae" not in _read_json(config):
        got = f"{folder}, whose {SAE_LENS_CONFIG} is of something else"
        raise refusal(SAEError, "The SAE's folder", got, "a new folder, or one of an SAE", "Name another.")
    metadata = {"sae_lens_version": "6.0.0", "model_name": sae.model_name, RECORD: sae.record}
    if sae.neuronpedia_id is not None:
        metadata["neuronpedia_id"] = sae.neuronpedia_id
    if sae.layer is not None:
        # SAELens knows the hooks of TransformerLens. The others here have the number of the layer too.
        is_hook = sae.hook_name is not None and sae.hook_name.startswith("blocks.")
        metadata["hook_name"] = sae.hook_name if is_hook else f"blocks.{sae.layer}.hook_resid_post"
    if sae.center_writing_weights:
        metadata[LOADED_WITH] = {CENTERED: True}
    d_in, d_sae = sae.tensors["W_enc"].shape
    cfg = {
        "architecture": sae.arch,
        "d_in": d_in,
        "d_sae": d_sae,
        # SAELens converts every tensor to this dtype. That of the biases and thresholds rounds nothing.
        "dtype": str(sae.tensors["b_enc"].dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": sae.normalize_activations,
        "reshape_activations": "none",
        "metadata": metadata,
    }
    if sae.arch == "topk":
        cfg |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in sae.tensors.items()}
    with replacing(folder / SAE_LENS_WEIGHTS) as made:
        save_file(tensors, made)
    write_atomically(config, (json.dumps(cfg, indent=2) + "\n").encode())


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
    if arch not in list(SAE_LENS_TENSORS):
        raise refusal(
            SAEError,
            f"{name}: the architecture",
            repr(arch),
            ", ".join(SAE_LENS_TENSORS),
            "For a batchtopk or matryoshka_batchtopk SAE that was just trained, save_inference_model() makes a "
            "jumprelu SAE. Transcoders and the like do not edit a residual stream through one decoder.",
        )
    check(_Config, dict(cfg), SAEError, name)
    metadata = {**cfg, **(cfg.get("metadata") or {})}
    if activation not in ("relu", "topk"):
        raise refusal(SAEError, f"{name}: the activation function", repr(activation), "relu, topk")
    if cfg.get("reshape_activations", "none") != "none":
        raise refusal(SAEError, f"{name}: reshape_activations", repr(cfg["reshape_activations"]), "none")
    # Some versions wrote it as ones, which have no effect.
    tensors = {key: t for key, t in tensors.items() if key != "scaling_factor" or bool((t != 1).any())}
    _check_names(name, tensors, SAE_LENS_TENSORS[arch])
    stated = [cfg.get("d_in"), cfg.get("d_sae")]
    if None not in stated and stated != list(tensors["W_enc"].shape):
        raise refusal(
            SAEError, f"{name}: `W_enc`", f"of shape {list(tensors['W_enc'].shape)}", f"{stated}, as the cfg says"
        )
    hook = metadata.get("hook_name") or metadata.get("hook_point") or None
    normalize = cfg.get("normalize_activations") or "none"
    return SourceSAE(
        name=name,
        arch=arch,
        tensors=dict(tensors),
        k=cfg.get("k", (cfg.get("activation_fn_kwargs") or {}).get("k")) if arch == "topk" else None,
        layer=_layer(name, hook),
        hook_name=hook,
        model_name=metadata.get("model_name"),
        neuronpedia_id=metadata.get("neuronpedia_id"),
        apply_b_dec_to_input=bool(cfg.get("apply_b_dec_to_input", True)),
        normalize_activations="expected_average_only_in" if normalize is True else normalize,
        rescale_acts_by_decoder_norm=bool(cfg.get("rescale_acts_by_decoder_norm", False)),
        center_writing_weights=_centered(name, metadata),
        record=metadata.get(RECORD),
        figures={ours: metadata[key] for key, ours in FIGURES.items() if isinstance(metadata.get(key), int | float)},
    )


def _centered(name: str, metadata: Mapping[str, Any]) -> bool | None:
    if LOADED_WITH not in metadata and "metadata" not in metadata:
        return None
    return is_centered(name, metadata.get(LOADED_WITH) or {})


def _weights_file(path: Path) -> Path:
    names = (SAE_LENS_WEIGHTS, GEMMA_SCOPE_WEIGHTS, DICTIONARY_WEIGHTS)
    accepted = f"a folder with one of {', '.join(names)}, or the path of such a file"
    if path.is_dir():
        files = [path / name for name in names if (path / name).is_file()]
        if len(files) == 1:
            return files[0]
        held = sorted(entry.name for entry in path.iterdir())[:8]
        raise refusal(SAEError, str(path), f"a folder with {len(files)} of these ({held})", accepted, "Name the file.")
    if not path.exists():
        raise refusal(SAEError, str(path), "not there", accepted, "For an SAE on a hub: FrozenSAE.from_pretrained.")
    if path.name == SAE_LENS_CONFIG:
        return path.with_name(SAE_LENS_WEIGHTS)
    if path.suffix not in (".safetensors", ".npz", ".pt"):
        raise refusal(SAEError, str(path), f"a file of unknown kind {path.suffix!r}", accepted)
    return path


def _read_sae_lens(file: Path) -> SourceSAE:
    cfg = _read_json(file.with_name(SAE_LENS_CONFIG))
    return sae_lens_source(str(file.parent), cfg, _read(file, load_file))


def _read_gemma_scope(file: Path) -> SourceSAE:
    def arrays(path: Path) -> dict[str, Tensor]:
        with np.load(path, allow_pickle=False) as data:
            # Names and sizes before contents, which can be far larger than the file.
            _check_names(str(path), [_renamed(name) for name in data.files], SAE_LENS_TENSORS["jumprelu"])
            _check_expansion(path, sum(entry.file_size for entry in data.zip.infolist()))
            return {_renamed(name): torch.from_numpy(data[name]) for name in data.files}

    tensors = _read(file, arrays)
    return SourceSAE(str(file), "jumprelu", tensors, owned=True)


def _renamed(name: str) -> str:
    return re.sub("^w_", "W_", name)


def _check_expansion(file: Path, unpacked: int) -> None:
    size = file.stat().st_size
    if unpacked > MOST_EXPANSION * max(size, SMALL):
        got = f"{size} bytes that unpack to {unpacked}"
        raise refusal(SAEError, str(file), got, f"at most {MOST_EXPANSION} times as many", "Save it by numpy.savez.")


def _read_dictionary(file: Path, dict_class: str | None) -> SourceSAE:
    state = _read(file, lambda path: torch.load(path, map_location="cpu", weights_only=True))
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        held = f"a dict of {', '.join(map(str, state))}" if isinstance(state, dict) else type(state).__name__
        raise refusal(
            SAEError, str(file), held, "a state dict of tensors", "Save ae.state_dict(), not a training backup."
        )
    config = file.with_name(DICTIONARY_CONFIG)
    trainer: Any = check(_Dictionary, _read_json(config), SAEError, str(config))["trainer"] if config.is_file() else {}
    name = _agreed(file, "dict_class", dict_class, trainer.get("dict_class")) or _inferred_class(file, state)
    if name not in list(DICT_CLASSES):
        raise refusal(SAEError, f"{file}: the class", name, ", ".join(DICT_CLASSES))
    kind = DICT_CLASSES[name]
    _check_names(str(file), state, kind.required, kind.optional)
    k = check(PositiveInt, state["k"].tolist(), SAEError, f"{file}: `k`") if "k" in state else None
    tensors = {RENAMED.get(n, (n,))[0]: t.T if n in RENAMED and RENAMED[n][1] else t for n, t in state.items()}
    if kind.arch == "jumprelu":
        tensors["threshold"] = _learned_threshold(file, tensors["threshold"], tensors["b_enc"])
    return SourceSAE(
        name=str(file),
        arch=kind.arch,
        tensors={n: t for n, t in tensors.items() if n in SAE_LENS_TENSORS[kind.arch]},
        k=_agreed(file, "k", k, trainer.get("k")) if kind.arch == "topk" else None,
        layer=_agreed(config, "layer", _layer(str(config), trainer.get("submodule_name")), trainer.get("layer")),
        hook_name=trainer.get("submodule_name"),
        model_name=trainer.get("lm_name"),
        apply_b_dec_to_input=kind.apply_b_dec_to_input,
        owned=True,
    )


def _inferred_class(file: Path, state: Collection[str]) -> str:
    names = set(state)
    fitting = [name for name, kind in DICT_CLASSES.items() if kind.required <= names <= kind.required | kind.optional]
    if len(fitting) != 1:
        held = f"the tensors {', '.join(sorted(names))} and no class in a {DICTIONARY_CONFIG} next to it"
        accepted = f"the class by name: dict_class= one of {', '.join(fitting or DICT_CLASSES)}"
        raise refusal(SAEError, f"{file}: what it is", f"not certain, from {held}", accepted)
    return fitting[0]


def _learned_threshold(file: Path, threshold: Tensor, b_enc: Tensor) -> Tensor:
    if threshold.dim():
        return threshold
    if not threshold >= 0:
        raise refusal(
            SAEError,
            f"{file}: `threshold`",
            f"{float(threshold)}, which is unset",
            "a threshold learned in training, >= 0",
            "Train past `threshold_start_step`.",
        )
    return threshold.expand(b_enc.shape)


def _layer(name: str, hook: str | None) -> int | None:
    place = None if hook is None else residual_hook(name, hook)
    return None if place is None else place[0]


def _agreed(file: Path, name: str, first: Any, second: Any) -> Any:
    if None not in (first, second) and first != second:
        got = f"{first!r} and {second!r}"
        raise refusal(SAEError, f"{file}: `{name}`", got, "one of them", "Correct the wrong one.")
    return second if first is None else first


def _check_names(
    file: str, tensors: Collection[str], required: frozenset[str], optional: frozenset[str] = frozenset()
) -> None:
    missing = sorted(required - set(tensors))
    twice = [f"{name} twice" for name in sorted(set(tensors)) if list(tensors).count(name) > 1]
    unknown = sorted(set(tensors) - required - optional) + twice
    if missing or unknown:
        got = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has {', '.join(unknown)}"] * bool(unknown)
        raise SAEError(f"{file} {' and '.join(got)}; accepted: exactly {', '.join(sorted(required))}.")


def _read_json(file: Path) -> dict[str, Any]:
    return check(dict[str, Any], _read(file, lambda path: read_json(path, SAEError)), SAEError, str(file))


def _read(file: Path, reader: Callable[[Path], Any]) -> Any:
    if not file.is_file():
        raise refusal(SAEError, str(file), "not there", "the file that belongs to the SAE's other file")
    try:
        return reader(file)
    except SAEError:
        raise
    # Each of the four formats has its own errors. Whatever they are, the file is the reason.
    except Exception as error:
        raise refusal(
            SAEError,
            str(file),
            f"not readable ({type(error).__name__})",
            "an undamaged file of tensors, or of JSON, without pickled objects",
            "Download or save it again.",
        ) from error
