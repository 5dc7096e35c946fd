"""Where a model or an SAE was loaded from, and what was there."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dspa.models.layers import base_model

# Numbers of each weight that take part in a digest.
SAMPLED = 64


@dataclass(frozen=True)
class Source:
    """A place from which a model or an SAE was loaded.

    Attributes:
        path: absolute path, or a name on the Hub; for an SAE of a release, RELEASE:SAE_ID.
        digest: what was there: the fingerprint of an SAE, or the `model_digest` of a model.
    """

    path: str
    digest: str


def absolute(name: str) -> str:
    """Return the absolute path of a file or folder, and any other name as it is."""
    return str(Path(name).absolute()) if Path(name).exists() else name


def model_source(model: nn.Module) -> Source | None:
    """Return the source of `model`, or None for a model that was not loaded or whose weights are offloaded."""
    name, digest = str(base_model(model).config.name_or_path or ""), model_digest(model)
    return Source(absolute(name), digest) if name and digest is not None else None


def model_digest(model: nn.Module) -> str | None:
    """Return 16 hexadecimal digits that identify the weights of `model`, or None if some of them are offloaded.

    They begin a SHA-256 over the shape and SAMPLED numbers of each weight, rounded to bf16. So they are the same in
    fp32 and bf16, on any device and whatever the weights are called, and differ after training or under a LoRA.
    Quantized weights take part with their codes and scales: in other bits, a model has another digest.
    """
    parameters = list(base_model(model).parameters())
    if any(parameter.is_meta for parameter in parameters):
        return None
    described = sorted(
        f"{list(shape)}".encode() + b"".join(map(_sample, tensors)) for shape, tensors in map(_stored, parameters)
    )
    return hashlib.sha256(b"".join(described)).hexdigest()[:16]


def _stored(weight: nn.Parameter) -> tuple[torch.Size, list[Tensor]]:
    """Return the shape of a weight, and the tensors that it is stored in."""
    state: Any = getattr(weight, "quant_state", None)
    if state is not None:
        return state.shape, [_block_scales(state)]
    data = weight.data
    # Quantized weights of torchao are tensors that are made of others.
    names = data.__tensor_flatten__()[0] if hasattr(data, "__tensor_flatten__") else []
    parts = [getattr(data, name) for name in names] or [data]
    # Others have formats of their own: their shapes have to do.
    return data.shape, [part for part in parts if type(part) is Tensor]


def _block_scales(state: Any) -> Tensor:
    """Return the scale of each block of a 4-bit weight of bitsandbytes, in the order of its rows.

    Its codes are in another order once a CPU has run a pass, and the scales in another shape.
    """
    scales: Tensor = state.absmax
    if state.nested:
        from bitsandbytes.functional import dequantize_blockwise

        scales = dequantize_blockwise(scales, state.state2) + state.offset
    return scales.T if getattr(state, "packing_format_for_cpu", False) else scales


def _sample(weight: Tensor) -> bytes:
    numbers = weight.detach().flatten()[:: max(1, weight.numel() // SAMPLED)][:SAMPLED]
    return numbers.to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes()
