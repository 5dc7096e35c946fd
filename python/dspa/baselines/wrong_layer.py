"""Control "wrong layer": the same edits, made at a layer that the output SAE was not trained on."""

from __future__ import annotations

import copy
from dataclasses import replace

from dspa.maps.cdmap import ConditionalDifferenceMap
from dspa.saes.frozen import FrozenSAE

DISTANCE = 8


def wrong_layer(layer_in: int, layer_out: int, n_layers: int) -> int | None:
    """Return the layer DISTANCE below `layer_out`, or as far from it as a small model allows.

    It has to come after `layer_in`, where the prompt is read. Where nothing lies between the two layers it is above
    `layer_out`, and where nothing lies above either, there is none.
    """
    below, above = max(layer_out - DISTANCE, layer_in + 1), min(layer_out + DISTANCE, n_layers - 1)
    return below if below < layer_out else above if above > layer_out else None


def at_layer(
    sae_out: FrozenSAE, cdmap: ConditionalDifferenceMap, layer: int
) -> tuple[FrozenSAE, ConditionalDifferenceMap]:
    """Return the output SAE and the map as if they were of another layer."""
    moved = copy.copy(sae_out)
    moved.layer = layer
    return moved, cdmap.replaced(meta=replace(cdmap.meta, layer_out=layer))
