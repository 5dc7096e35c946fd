"""What the references share: a row's normalisation, its pre-activations, and which latents are active."""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

# Pre-activations held at once, so that no [N, d_sae] is ever kept.
MAX_ELEMENTS = 1 << 24


def compute_dtype(*operands: Tensor) -> torch.dtype:
    """At least fp32, and fp64 where an operand is."""
    return functools.reduce(torch.promote_types, (each.dtype for each in operands), torch.float32)


def normalise(h: Tensor, normalize: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`n(h) [N, d_in]` and the scale `[N, 1]` that it took out of each row, in `dtype`.

    layer_norm: (h - mean) / (std + 1e-5), scale std; constant_norm_rescale: h sqrt(d_in) / ||h||, scale its
    inverse (both as SAELens computes them).
    """
    h = h.to(dtype)
    if normalize == "layer_norm":
        centred = h - h.mean(dim=-1, keepdim=True)
        std = centred.std(dim=-1, keepdim=True)
        return centred / (std + 1e-5), std
    if normalize == "constant_norm_rescale":
        scale = h.norm(dim=-1, keepdim=True) / h.shape[-1] ** 0.5
        return h / scale, scale
    return h, h.new_ones(h.shape[0], 1)


def pre_activations(hn: Tensor, encoder_rows: Tensor, b_enc: Tensor) -> Tensor:
    """`pre = hn encoder_rows^T + b_enc`, [N, n_latents], in hn's dtype."""
    return hn @ encoder_rows.to(hn.dtype).T + b_enc.to(hn.dtype)


def is_active(pre: Tensor, threshold: Tensor) -> Tensor:
    """`pre > threshold` and `pre > 0`, both strict; a NaN is never active."""
    return (pre > threshold) & (pre > 0)


def top_k_mask(pre: Tensor, k: int) -> Tensor:
    """The k largest of each row, ties to the smaller index."""
    kth = pre.topk(k, dim=-1).values[..., -1:]
    above = pre > kth
    ties = pre == kth
    room = k - above.sum(dim=-1, keepdim=True)
    return above | (ties & (ties.cumsum(dim=-1) <= room))


def active_latents(pre: Tensor, threshold: Tensor, k: int) -> Tensor:
    """Active latents of whole rows `pre [N, d_sae]`, by threshold or, with `k > 0`, by rank."""
    return top_k_mask(pre, k) & (pre > 0) if k else is_active(pre, threshold)


def n_kept(counts: Tensor, fraction: float) -> Tensor:
    """How many of `counts` a fraction is, rounded up; what the product loses does not count."""
    return (counts.double() * fraction - 1e-9).ceil().clamp(min=0).to(torch.int32)


def latent_blocks(n_rows: int, d_sae: int) -> Iterator[slice]:
    """Slices of the latents, so narrow that `n_rows` rows of them stay small."""
    width = max(1, MAX_ELEMENTS // max(1, n_rows))
    return (slice(start, min(start + width, d_sae)) for start in range(0, d_sae, width))


def row_blocks(n_rows: int, d_sae: int, least: int = 1) -> Iterator[slice]:
    """Slices of the rows, so short that all their `d_sae` latents stay small, but of at least so many rows."""
    height = max(least, MAX_ELEMENTS // d_sae)
    return (slice(start, min(start + height, n_rows)) for start in range(0, n_rows, height))
