"""How the counts of a map were computed, and whether that is what its model computes."""

from __future__ import annotations

import warnings

from torch import nn

from dspa.errors import MapError
from dspa.maps.passes import shares_prompts
from dspa.models.attention import attention_extras, attention_fault, describe_extras
from dspa.models.layers import CausalLM


def join_attention(recorded: set[str]) -> str:
    """Return one record of the attention of several collections, empty if that of one is unknown."""
    return "" if "" in recorded else ", ".join(sorted(recorded))


def check_provenance(attention: str, model: CausalLM, stack: nn.ModuleList) -> None:
    """Raise `MapError` if a map was counted on another function than the model's, and warn where that is possible.

    Args:
        attention: record of the implementations that computed attention, empty if unknown.
        model: the model that the map is used with.
        stack: its decoder layers.
    """
    again = "Make it again from its triples, in a new folder: dspa map build, or dspa.build_map."
    if error := _error(attention, stack):
        raise MapError(f"The map's numbers are wrong: {error}. {again}")
    if doubt := _doubt(attention, model, stack):
        warnings.warn(f"The map's numbers may be wrong: {doubt}. {again}", stacklevel=4)


def _error(attention: str, stack: nn.ModuleList) -> str:
    """Return why counts are of another function, empty if they are not."""
    for name in filter(None, attention.split(", ")):
        if wrong := attention_fault(name, stack):
            return f"its attention was computed by {name!r}, which {wrong}"
    return ""


def _doubt(attention: str, model: CausalLM, stack: nn.ModuleList) -> str:
    """Return why counts of an earlier version, which recorded no attention, can be wrong, empty if they cannot."""
    if attention:
        return ""
    if wanted := attention_extras(stack):
        return f"an earlier version did not check that attention computed {describe_extras(wanted)}"
    if not shares_prompts(model):
        return "an earlier version could mix up the states of recurrent layers"
    return ""
