"""SAEs of SAELens of every architecture, with few active latents, made from a seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

D_IN, D_SAE, D_OUT, D_HEAD, K = 256, 1024, 320, 32, 12
# As a class of SAELens, and the settings that make it another architecture.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "standard": ("StandardSAE", {}),
    "jumprelu": ("JumpReLUSAE", {}),
    "topk": ("TopKSAE", {"k": K}),
    "topk_rescaled": ("TopKSAE", {"k": K, "rescale_acts_by_decoder_norm": True}),
    "abstopk": ("AbsTopKSAE", {"k": K}),
    "abstopk_rescaled": ("AbsTopKSAE", {"k": K, "rescale_acts_by_decoder_norm": True}),
    "gated": ("GatedSAE", {}),
    "transcoder": ("Transcoder", {"d_out": D_OUT}),
    "skip_transcoder": ("SkipTranscoder", {"d_out": D_OUT}),
    "jumprelu_transcoder": ("JumpReLUTranscoder", {"d_out": D_OUT}),
    "jumprelu_skip_transcoder": ("JumpReLUSkipTranscoder", {"d_out": D_OUT}),
}
TRANSCODERS = tuple(name for name in ARCHITECTURES if "transcoder" in name)
SAES = tuple(name for name in ARCHITECTURES if name not in TRANSCODERS)


def make_sae(arch: str, dtype: torch.dtype = torch.float32, *, hook_name: str | None = None, **cfg: Any) -> Any:
    """Make an SAE of these weights: the same whenever it is called, and about 1% of the latents active."""
    sae_lens = pytest.importorskip("sae_lens", reason="sae-lens is not installed: there is nothing to fuse")
    name, settings = ARCHITECTURES[arch]
    config_class = getattr(sae_lens, f"{name}Config")
    if arch in TRANSCODERS:
        settings = {**settings, "apply_b_dec_to_input": False}
    config = config_class(**{"d_in": D_IN, "d_sae": D_SAE, **settings, **cfg})
    config.metadata.hook_name = hook_name
    sae = getattr(sae_lens, name)(config)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g) / D_IN**0.5)
        if arch in ("standard", "transcoder", "skip_transcoder"):
            sae.b_enc -= 2.3
        if arch == "gated":
            sae.b_gate -= 2.3
            sae.b_mag[::2] += 1
            # Negative magnitudes of open gates.
            sae.b_mag[1::2] -= 40
        if "jumprelu" in arch:
            sae.threshold += 2.3
    return sae.to(dtype)


def rows(*shape: int, dtype: torch.dtype = torch.float32, width: int = D_IN, seed: int = 1) -> Tensor:
    return torch.randn(*shape, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
