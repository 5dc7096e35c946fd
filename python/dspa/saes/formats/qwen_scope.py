"""Qwen-Scope: `layer{n}.sae.pt`, one file per layer. The name of its repository says k, as `...-L0_50`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dspa.saes.formats.source import SAE_LENS_TENSORS, SourceSAE, check_names, check_stated, check_tensors, transposed

QWEN_SCOPE_WEIGHTS = r"layer(\d+)\.sae\.pt"


def read_qwen_scope(file: Path, state: Mapping[str, Any]) -> SourceSAE:
    """Read the TopK SAE of the output of the decoder layer that the name of the file says. The file does not say k."""
    check_names(str(file), state, SAE_LENS_TENSORS["topk"])
    check_tensors(file, state)
    # Stored as [d_sae, d_in] and [d_in, d_sae].
    tensors = dict(state) | {name: transposed(state[name]) for name in ("W_enc", "W_dec")}
    d_in = state["b_dec"].numel()
    check_stated(str(file), tensors, d_in=d_in, d_sae=state["b_enc"].numel(), d_out=d_in)
    layer = int(re.sub(QWEN_SCOPE_WEIGHTS, r"\1", file.name))
    return SourceSAE(
        name=str(file), arch="topk", tensors=tensors, layer=layer, hook_name=f"model.layers.{layer}", owned=True
    )
