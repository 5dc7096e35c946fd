"""dictionary_learning: `ae.pt` or `checkpoints/ae_STEP.pt`, best with the `config.json` of the folder."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from typing_extensions import TypedDict

from dspa.errors import SAEError, refusal
from dspa.saes.formats.source import (
    COMMON,
    SAE_LENS_TENSORS,
    SourceSAE,
    agreed,
    check_names,
    check_tensors,
    layer_of,
    read_config,
    transposed,
)
from dspa.schemas import Count, PositiveInt, Text, check

DICTIONARY_WEIGHTS = "ae.pt"
DICTIONARY_CONFIG = "config.json"
# Tensors of dictionary_learning: SAELens' name, and True if its `nn.Linear` holds the matrix transposed.
RENAMED = {
    "encoder.weight": ("W_enc", True),
    "encoder.bias": ("b_enc", False),
    "decoder.weight": ("W_dec", True),
    "bias": ("b_dec", False),
    "decoder.bias": ("b_dec", False),
    "decoder_bias": ("b_dec", False),
    "gate_bias": ("b_gate", False),
    "mag_bias": ("b_mag", False),
}


class _Trainer(TypedDict, total=False):
    dict_class: Text
    k: PositiveInt | None
    layer: Count | None
    lm_name: Text | None
    submodule_name: Text | None


class _Dictionary(TypedDict):
    trainer: _Trainer


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
    "AutoEncoderNew": _DictClass("standard", _LINEAR | {"decoder.bias"}, apply_b_dec_to_input=False),
    "AutoEncoderTopK": _DictClass("topk", _LINEAR | {"b_dec"}, frozenset({"k", "threshold"})),
    "BatchTopKSAE": _DictClass("jumprelu", _LINEAR | {"b_dec", "threshold"}, frozenset({"k"})),
    "MatryoshkaBatchTopKSAE": _DictClass("jumprelu", _MATRICES | {"k", "group_sizes"}),
    "JumpReluAutoEncoder": _DictClass("jumprelu", _MATRICES, apply_b_dec_to_input=False),
    "GatedAutoEncoder": _DictClass("gated", _GATED),
}


def read_dictionary(file: Path, state: Mapping[str, Any], dict_class: str | None) -> SourceSAE:
    """Read the state dict of an `ae.pt`, whose class `dict_class` names if no `config.json` does."""
    check_tensors(file, state)
    config = (file.parent.parent if file.parent.name == "checkpoints" else file.parent) / DICTIONARY_CONFIG
    trainer: Any = check(_Dictionary, read_config(config), SAEError, str(config))["trainer"] if config.is_file() else {}
    name = agreed(str(file), "dict_class", dict_class, trainer.get("dict_class")) or _inferred_class(file, state)
    if name not in list(DICT_CLASSES):
        raise refusal(SAEError, f"{file}: the class", name, ", ".join(DICT_CLASSES))
    kind = DICT_CLASSES[name]
    check_names(str(file), state, kind.required, kind.optional)
    k = check(PositiveInt, state["k"].tolist(), SAEError, f"{file}: `k`") if "k" in state else None
    tensors = {
        RENAMED.get(n, (n,))[0]: transposed(t) if n in RENAMED and RENAMED[n][1] else t for n, t in state.items()
    }
    if kind.arch == "jumprelu":
        tensors["threshold"] = _learned_threshold(file, tensors["threshold"], tensors["b_enc"])
    return SourceSAE(
        name=str(file),
        arch=kind.arch,
        tensors={n: t for n, t in tensors.items() if n in SAE_LENS_TENSORS[kind.arch]},
        k=agreed(str(file), "k", k, trainer.get("k")) if kind.arch == "topk" else None,
        layer=layer_of(str(config), trainer.get("submodule_name"), trainer.get("layer")),
        hook_name=trainer.get("submodule_name"),
        model_name=trainer.get("lm_name"),
        apply_b_dec_to_input=kind.apply_b_dec_to_input,
        owned=True,
    )


def _inferred_class(file: Path, state: Collection[str]) -> str:
    names = set(state)
    fitting = [name for name, kind in DICT_CLASSES.items() if kind.required <= names <= kind.required | kind.optional]
    # SAELens has the same names for SAEs that may take b_dec off their input, which the tensors do not say.
    if len(fitting) != 1 or names in SAE_LENS_TENSORS.values():
        held = f"the tensors {', '.join(sorted(names))} and no class in a {DICTIONARY_CONFIG} next to it"
        accepted = f"the class by name: dict_class= one of {', '.join(fitting or DICT_CLASSES)}"
        advice = "For an SAE of SAELens, load the folder that its save_model writes."
        raise refusal(SAEError, f"{file}: what it is", f"not certain, from {held}", accepted, advice)
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
