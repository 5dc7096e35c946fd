"""An SAE of random numbers in SAELens' names, and what comparing two takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dspa.saes.frozen import FrozenSAE

D_IN, D_SAE, K = 12, 40, 5
NORMALIZATIONS = ("none", "layer_norm", "constant_norm_rescale")


def tensors(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """An SAE in SAELens' names and shapes, decoder norms from about 0.2 to 3."""
    g = torch.Generator().manual_seed(seed)
    scale = 0.2 + torch.rand(D_SAE, 1, generator=g)
    out = {
        "W_enc": torch.randn(D_IN, D_SAE, generator=g),
        "b_enc": 0.3 * torch.randn(D_SAE, generator=g),
        "W_dec": torch.randn(D_SAE, D_IN, generator=g) * scale,
        "b_dec": torch.randn(D_IN, generator=g),
        "threshold": 2 * torch.rand(D_SAE, generator=g) - 0.3,
        "b_gate": torch.randn(D_SAE, generator=g),
        "b_mag": torch.randn(D_SAE, generator=g),
        "r_mag": 0.5 * torch.randn(D_SAE, generator=g),
    }
    return {name: tensor.to(dtype) for name, tensor in out.items()}


def named(*names: str, seed: int = 0) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors(seed).items() if name in names}


STANDARD = ("W_enc", "b_enc", "W_dec", "b_dec")
JUMPRELU = (*STANDARD, "threshold")
GATED = ("W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag")
OF_ARCH = {"standard": STANDARD, "topk": STANDARD, "jumprelu": JUMPRELU, "gated": GATED}


def make(arch: str = "jumprelu", **kwargs: Any) -> FrozenSAE:
    if arch == "topk":
        kwargs.setdefault("k", K)
    return FrozenSAE(arch, **named(*OF_ARCH[arch]), **kwargs)


def close(actual: Tensor, expected: Tensor) -> None:
    """Equal up to fp32 rounding: same active latents, values to 1e-5 of the row's largest."""
    assert torch.equal(actual != 0, expected != 0)
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
