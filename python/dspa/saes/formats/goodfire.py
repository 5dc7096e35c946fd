"""Goodfire: a `.pth` or `.pt` file with the state dict of the `SparseAutoEncoder` in its model cards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dspa.saes.formats.source import SourceSAE, check_names, check_stated, check_tensors, transposed

# By which the file is known. SAELens' names, and True if its `nn.Linear` holds the matrix transposed.
GOODFIRE_TENSORS = {
    "encoder_linear.weight": ("W_enc", True),
    "encoder_linear.bias": ("b_enc", False),
    "decoder_linear.weight": ("W_dec", True),
    "decoder_linear.bias": ("b_dec", False),
}


def read_goodfire(file: Path, state: Mapping[str, Any]) -> SourceSAE:
    """Read a ReLU SAE. The file does not say the place or layer, which its model card does."""
    check_names(str(file), state, frozenset(GOODFIRE_TENSORS))
    check_tensors(file, state)
    tensors = {name: transposed(state[key]) if turn else state[key] for key, (name, turn) in GOODFIRE_TENSORS.items()}
    d_in = tensors["b_dec"].numel()
    check_stated(str(file), tensors, d_in=d_in, d_sae=tensors["b_enc"].numel(), d_out=d_in)
    return SourceSAE(name=str(file), arch="standard", tensors=tensors, owned=True)
