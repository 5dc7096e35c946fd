"""An SAE of random numbers in SAELens' names, and what comparing two takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dspa.saes.frozen import FrozenSAE
from dspa.testing import D_IN as D_IN_MODEL

from ...rounding import rounding

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
    return FrozenSAE(arch, **(named(*OF_ARCH[arch]) | kwargs))


def close(actual: Tensor, expected: Tensor) -> None:
    """Equal up to fp32 rounding: same active latents, sums of D_IN terms of either sign."""
    assert torch.equal(actual != 0, expected != 0)
    assert (actual - expected).abs().max() <= latent_rounding(expected)


# Roundings in a row from a residual to a latent: mean and scale of the row, both applied, the folded bias and norm, the
# products with their sum, the bias. The way back adds the decoder's sum and bias, and undoes scale and mean.
ENCODING, DECODING = 8, 8 + 4


def latent_rounding(f: Tensor, d_in: int = D_IN) -> float:
    """How far apart two computations of latents may be: terms of either sign are sqrt(d_in) times their sum."""
    return rounding(ENCODING, d_in**0.5 * float(f.abs().max()))


def decoded_rounding(f: Tensor, W_dec: Tensor, scale: float = 1.0) -> float:
    """How far apart two reconstructions from latents f may be, scaled by what normalising took out."""
    return rounding(DECODING, scale * float((f.abs() @ W_dec.abs().to(f.dtype)).max()))


def close_but_at_thresholds(actual: Tensor, expected: Tensor, threshold: Tensor) -> None:
    """Equal up to fp32 rounding, where one of both may be 0 if the other is at its threshold."""
    apart = latent_rounding(expected, D_IN_MODEL)
    at_threshold = ((actual == 0) != (expected == 0)) & ((actual + expected - threshold).abs() <= apart)
    assert ((actual - expected).abs() <= apart).logical_or(at_threshold).all()


class Stopped(Exception):
    """Ends a training."""


def stop_after(monkeypatch, steps: int) -> None:
    """Let the training of an SAE end with `Stopped` after its first steps."""
    from sae_lens.training.sae_trainer import SAETrainer

    step, taken = SAETrainer.step, []

    def counted(self, batch):
        if len(taken) == steps:
            raise Stopped
        taken.append(batch)
        return step(self, batch)

    monkeypatch.setattr(SAETrainer, "step", counted)
