"""An SAE as its maker stored it, and the checks that all readers share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dspa.archives import check_archive
from dspa.errors import SAEError, refusal
from dspa.saes.metadata import is_elsewhere, residual_hook
from dspa.schemas import check, read_json

# What torch.compile puts before the names of a module's tensors.
COMPILED = "_orig_mod."
COMMON = frozenset({"W_enc", "W_dec", "b_dec"})
SAE_LENS_TENSORS = {
    "standard": COMMON | {"b_enc"},
    "jumprelu": COMMON | {"b_enc", "threshold"},
    "topk": COMMON | {"b_enc"},
    "gated": COMMON | {"b_gate", "b_mag", "r_mag"},
}


@dataclass(frozen=True)
class SourceSAE:
    """An SAE as its maker stored it, nothing folded.

    Attributes:
        name: where it came from, for messages.
        arch: "standard", "jumprelu", "topk" or "gated".
        tensors: SAELens' names and shapes. A gated SAE has `b_gate`, `b_mag` and `r_mag` instead of `b_enc`. A
            transcoder has `W_dec` [d_sae, d_out] and `b_dec` [d_out], and one with a skip connection adds
            `x W_skip^T`, `W_skip` [d_out, d_in], to the output.
        layer: the decoder layer, from 0, whose output it reads; None if unknown, or if it reads another place.
        center_writing_weights: True if it was trained on residuals less their mean over d_in; None if an old file does
            not say.
        hook_name: the place in the model that it reads, by its maker's name; None if unknown.
        transcoder: True if it computes the content of another place than it reads.
        hook_name_out: that place, by its maker's name; None if unknown.
        reshape_activations: "hook_z" for rows that are [n_heads, d_head] in the model, else "none".
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
    transcoder: bool = False
    hook_name_out: str | None = None
    model_name: str | None = None
    neuronpedia_id: str | None = None
    apply_b_dec_to_input: bool = False
    normalize_activations: str = "none"
    reshape_activations: str = "none"
    rescale_acts_by_decoder_norm: bool = False
    center_writing_weights: bool | None = False
    record: dict[str, Any] | None = None
    figures: dict[str, float] = field(default_factory=dict)
    owned: bool = False


def layer_of(file: str, hook: str | None, stated: int | None = None) -> int | None:
    """Return the decoder layer whose output an SAE reads; None if unknown, or if it reads another place.

    Args:
        file: what says it, for messages.
        hook: the place that the SAE reads; None if unknown.
        stated: the layer, where something else than the name of the place says it.

    Raises:
        SAEError: both say it, and they differ.
    """
    if hook is not None and is_elsewhere(hook):
        return None
    place = None if hook is None else residual_hook(hook)
    layer: int | None = agreed(file, "layer", None if place is None else place[0], stated)
    return layer


def agreed(file: str, name: str, first: Any, second: Any) -> Any:
    """Return the one of two values that is not None; raise `SAEError` if they differ."""
    if None not in (first, second) and first != second:
        got = f"{first!r} and {second!r}"
        raise refusal(SAEError, f"{file}: `{name}`", got, "one of them", "Correct the wrong one.")
    return second if first is None else first


def read_state(file: Path) -> dict[str, Any]:
    """Return the state dict in a `.pt` file, by the names of the module that torch.compile may have wrapped."""
    state = read_file(file, _load)
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise refusal(SAEError, str(file), f"a {type(state).__name__}", "a state dict, of tensors by name")
    unwrapped = {name.removeprefix(COMPILED): value for name, value in state.items()}
    if len(unwrapped) < len(state):
        got = ", ".join(sorted(name for name in state if COMPILED + name in state))
        raise refusal(SAEError, f"{file}: tensors", f"twice, with and without {COMPILED!r}: {got}", "each name once")
    return unwrapped


def check_tensors(file: Path, state: Mapping[str, Any]) -> None:
    """Raise `SAEError` for a state dict that holds anything but dense tensors."""
    if other := [name for name, value in state.items() if not _is_stored(value)]:
        raise refusal(
            SAEError,
            str(file),
            f"a dict in which {', '.join(sorted(other))} are not dense tensors",
            "a state dict of tensors",
            "Save ae.state_dict(), not a training backup.",
        )


def _load(file: Path) -> Any:
    # Sizes before contents, which can be far larger than the file.
    check_archive(file, SAEError, "Save it by torch.save.")
    return torch.load(file, map_location="cpu", weights_only=True)


def _is_stored(value: object) -> bool:
    """Return True for a tensor whose numbers are all in the file: neither on "meta", nor sparse, nor expanded."""
    if not isinstance(value, Tensor) or value.is_meta or value.layout != torch.strided:
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def transposed(matrix: Tensor) -> Tensor:
    """Return a transposed matrix. A tensor that is not one, which only a damaged file holds, is left to the checks."""
    return matrix.T if matrix.dim() == 2 else matrix


def check_stated(file: str, tensors: Mapping[str, Tensor], **stated: int | None) -> None:
    """Raise `SAEError` unless the matrices have the `d_in`, `d_sae` and `d_out` that are stated and not None."""
    for name, widths in (("W_enc", ("d_in", "d_sae")), ("W_dec", ("d_sae", "d_out"))):
        shape = list(tensors[name].shape)
        wanted = [stated.get(width) for width in widths]
        if len(shape) != 2 or any(n not in (None, m) for n, m in zip(wanted, shape, strict=True)):
            sizes = ", ".join(width if n is None else str(n) for n, width in zip(wanted, widths, strict=True))
            accepted = f"[{sizes}], as its configuration or biases say"
            raise refusal(SAEError, f"{file}: `{name}`", f"of shape {shape}", accepted)


def check_names(
    file: str, tensors: Collection[str], required: frozenset[str], optional: frozenset[str] = frozenset()
) -> None:
    """Raise `SAEError` unless a file has the `required` tensors, once each, and besides only `optional` ones."""
    missing = sorted(required - set(tensors))
    twice = [f"{name} twice" for name in sorted(set(tensors)) if list(tensors).count(name) > 1]
    unknown = sorted(set(tensors) - required - optional) + twice
    if missing or unknown:
        got = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has {', '.join(unknown)}"] * bool(unknown)
        raise SAEError(f"{file} {' and '.join(got)}; accepted: exactly {', '.join(sorted(required))}.")


def read_config(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file; raise `SAEError` for anything else."""
    return check(dict[str, Any], read_file(file, lambda path: read_json(path, SAEError)), SAEError, str(file))


def read_file(file: Path, reader: Callable[[Path], Any]) -> Any:
    """Return what `reader` makes of a file; raise `SAEError` if it is not there or not readable."""
    if not file.is_file():
        raise refusal(SAEError, str(file), "not there", "the file that belongs to the SAE's other file")
    try:
        return reader(file)
    except SAEError:
        raise
    # Each kind of file has its own errors. Whatever they are, the file is the reason.
    except Exception as error:
        raise refusal(
            SAEError,
            str(file),
            f"not readable ({type(error).__name__})",
            "an undamaged file of tensors, or of JSON, without pickled objects",
            "Download or save it again.",
        ) from error
