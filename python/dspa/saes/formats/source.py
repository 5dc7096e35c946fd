"""An SAE as its maker stored it, and the checks that all readers share."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from dspa.errors import SAEError, refusal
from dspa.saes.metadata import residual_hook
from dspa.schemas import check, read_json

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


def layer_of(name: str, hook: str | None) -> int | None:
    """Return the decoder layer whose output `hook` names; None if it shows none."""
    place = None if hook is None else residual_hook(name, hook)
    return None if place is None else place[0]


def agreed(file: Path, name: str, first: Any, second: Any) -> Any:
    """Return the one of two values that is not None; raise `SAEError` if they differ."""
    if None not in (first, second) and first != second:
        got = f"{first!r} and {second!r}"
        raise refusal(SAEError, f"{file}: `{name}`", got, "one of them", "Correct the wrong one.")
    return second if first is None else first


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
