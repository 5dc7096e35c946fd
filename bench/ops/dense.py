"""The formulations that others use, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.harness.cases import ALPHA
from bench.harness.measure import DEVICE
from dspa_kernels import SAEWeights, SparseLatents


def widened(sae: SAEWeights) -> SAEWeights:
    """The weights in fp32, in which formulations agree."""
    return replace(sae, encoder_rows=sae.encoder_rows.float(), W_dec=sae.W_dec.float())


def dense_encode(h: Tensor, sae: SAEWeights) -> Tensor:
    pre = h @ sae.W_enc + sae.b_enc.to(h.dtype)
    return pre * ((pre > sae.threshold) & (pre > 0))


def ablated(f: Tensor, latents: Tensor) -> Tensor:
    """Latents f [N, d_sae] after the edit of some of them [N, S]."""
    chosen = torch.zeros_like(f, dtype=torch.bool).scatter_(1, latents, True)
    return torch.where(chosen, (f - ALPHA * f.amax(dim=1, keepdim=True)).clamp(min=0), f)


def dense_steer(h: Tensor, sae: SAEWeights, latents: Tensor) -> Tensor:
    """Encode everything, ablate latents [N, S], decode everything, as a script without the package does."""
    f = dense_encode(h, sae)
    return h + (ablated(f, latents) - f) @ sae.W_dec


class SAELensFormula:
    """Encode and decode of SAELens' JumpReLU SAE, where the package is not installed."""

    def __init__(self, sae: SAEWeights) -> None:
        self.W_enc, self.W_dec = sae.W_enc.contiguous(), sae.W_dec
        self.b_enc, self.threshold = (tensor.to(sae.W_dec.dtype) for tensor in (sae.b_enc, sae.threshold))
        self.b_dec = sae.W_dec.new_zeros(sae.d_in)

    def encode(self, x: Tensor) -> Tensor:
        hidden_pre = (x.to(self.W_enc.dtype) - self.b_dec) @ self.W_enc + self.b_enc
        return hidden_pre.relu() * (hidden_pre > self.threshold).to(hidden_pre.dtype)

    def decode(self, f: Tensor) -> Tensor:
        return f @ self.W_dec + self.b_dec

    def __call__(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


def sae_lens(sae: SAEWeights) -> tuple[Any, str]:
    """SAELens' JumpReLU SAE with these weights, and where it is from: the package, or its formula."""
    try:
        import sae_lens as lens
    except ImportError:
        return SAELensFormula(sae), "formula"
    config = lens.JumpReLUSAEConfig(
        d_in=sae.d_in, d_sae=sae.d_sae, dtype=str(sae.encoder_rows.dtype).removeprefix("torch."), device=str(DEVICE)
    )
    theirs = lens.JumpReLUSAE(config)
    tensors = {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "threshold": sae.threshold}
    theirs.load_state_dict(tensors | {"b_dec": torch.zeros(sae.d_in)})
    return theirs, "package"


def sae_lens_steer(theirs: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """`dense_steer` with SAELens: its encode, the edit, its decode before and after."""

    def run(h: Tensor, latents: Tensor) -> Tensor:
        f = theirs.encode(h)
        return h + theirs.decode(ablated(f, latents)) - theirs.decode(f)

    return run


def as_dense(f: SparseLatents, d_sae: int) -> Tensor:
    """Latents [N, d_sae]. Empty places go to an extra column, which is dropped."""
    out = f.values.new_zeros(len(f.indices), d_sae + 1)
    place = torch.where(f.indices < 0, d_sae, f.indices).long()
    return out.scatter_(1, place, f.values)[:, :d_sae]


def dense_counts(h: Tensor, sae: SAEWeights, sequences: Tensor, n_sequences: int) -> Tensor:
    counts = torch.zeros(n_sequences + 1, sae.d_sae, dtype=torch.int32, device=h.device)
    for rows, sequence in zip(h.split(512), sequences.split(512), strict=True):
        pre = rows @ sae.W_enc + sae.b_enc.to(h.dtype)
        counts.index_add_(0, sequence % (n_sequences + 1), ((pre > sae.threshold) & (pre > 0)).to(torch.int32))
    return counts[:-1]
