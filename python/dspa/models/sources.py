"""Where a model or an SAE was loaded from, and what was there."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

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
    """
    parameters = list(base_model(model).parameters())
    if any(parameter.is_meta for parameter in parameters):
        return None
    # Packed weights of quantized layers have formats of their own: their shapes have to do.
    samples = [_sample(p) if type(p) is nn.Parameter and p.is_floating_point() else b"" for p in parameters]
    described = sorted(f"{list(p.shape)}".encode() + sample for p, sample in zip(parameters, samples, strict=True))
    return hashlib.sha256(b"".join(described)).hexdigest()[:16]


def _sample(weight: Tensor) -> bytes:
    numbers = weight.detach().flatten()[:: max(1, weight.numel() // SAMPLED)][:SAMPLED]
    return numbers.to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes()
