"""The formulas of an SAE in plain PyTorch, shared by `SAEWeights` and the references of the ops."""

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

# Pre-activations held at once, so that no [N, d_sae] is ever kept.
MAX_ELEMENTS = 1 << 24
# Residuals are smaller than this, since the squares that a norm sums up would overflow in fp32.
RESIDUAL_LIMIT = 2.0**56
# What a slot of a plan does with its latent: move it down or up or, in a plan with strengths, also set it to a value,
# and move it up or set it in every steered row, whether it is active there or not.
ABLATE, AUGMENT, CLAMP, AUGMENT_ALWAYS, CLAMP_ALWAYS = -1, 1, 2, 3, 4
# Bits of a word of packed latents.
WORD = 32


class Normalised(NamedTuple):
    """Rows as an encoder reads them, n(h) [..., d_in], and the mean and scale [..., 1] that were removed."""

    rows: Tensor
    mean: Tensor
    scale: Tensor


def compute_dtype(*operands: Tensor) -> torch.dtype:
    """Return the dtype to compute in: at least fp32, and fp64 where an operand is."""
    return functools.reduce(torch.promote_types, (operand.dtype for operand in operands), torch.float32)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context without autocast, which would compute products in a narrower dtype than that of their factors.

    Latents are active or not by comparing such products with thresholds.
    """
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return `a b`, also under autocast in their dtype."""
    with without_autocast(a.device):
        return a @ b


def normalise(h: Tensor, normalize: str, dtype: torch.dtype) -> Normalised:
    """Normalise rows h [..., d_in] in `dtype`, as SAELens does.

    - layer_norm: (h - mean) / (std + 1e-5), scale std.
    - constant_norm_rescale: h / scale, scale ||h|| / sqrt(d_in), mean 0.
    - none: h, scale 1, mean 0.
    """
    h = h.to(dtype)
    if normalize == "layer_norm":
        mean = h.mean(dim=-1, keepdim=True)
        centred = h - mean
        std = centred.std(dim=-1, keepdim=True)
        return Normalised(centred / (std + 1e-5), mean, std)
    mean = torch.zeros_like(h[..., :1])
    if normalize == "constant_norm_rescale":
        scale = h.norm(dim=-1, keepdim=True) / h.shape[-1] ** 0.5
        return Normalised(h / scale, mean, scale)
    return Normalised(h, mean, torch.ones_like(mean))


def pre_activations(hn: Tensor, encoder_rows: Tensor, b_enc: Tensor) -> Tensor:
    """Return `pre = hn encoder_rows^T + b_enc`, [..., n_latents], in the dtype of hn."""
    return product(hn, encoder_rows.to(hn.dtype).T) + b_enc.to(hn.dtype)


def is_active(pre: Tensor, threshold: Tensor) -> Tensor:
    """Return where `pre > threshold` and `pre > 0`, both strict. A NaN is never active."""
    return (pre > threshold) & (pre > 0)


def is_finite(h: Tensor) -> Tensor:
    """Return which rows [N] of residuals h [N, d_in] hold no NaN and nothing as large as `RESIDUAL_LIMIT`."""
    return (h.abs() < RESIDUAL_LIMIT).all(dim=-1)


def top_k_mask(pre: Tensor, k: int) -> Tensor:
    """Return where pre is among the k largest of its row. Of equal values, the smaller index comes first."""
    kth = pre.topk(k, dim=-1).values[..., -1:]
    above = pre > kth
    ties = pre == kth
    n_free = k - above.sum(dim=-1, keepdim=True)
    return above | (ties & (ties.cumsum(dim=-1) <= n_free))


def active_latents(pre: Tensor, threshold: Tensor, k: int) -> Tensor:
    """Return which latents of whole rows `pre [..., d_sae]` are active: by threshold or, with `k > 0`, by rank."""
    return top_k_mask(pre, k) & (pre > 0) if k else is_active(pre, threshold)


def latents(hn: Tensor, encoder_rows: Tensor, b_enc: Tensor, threshold: Tensor, k: int) -> Tensor:
    """Return all latents f [..., d_sae] of normalised rows hn [..., d_in]: pre where active, else 0."""
    pre = pre_activations(hn, encoder_rows, b_enc)
    return torch.where(active_latents(pre, threshold, k), pre, 0)


def n_words(d_sae: int) -> int:
    """Return the number of int32 words that hold one bit per latent."""
    return -(-d_sae // WORD)


def pack_latents(active: Tensor) -> Tensor:
    """Return words [N, n_words] int32 of the active latents [N, d_sae] bool: j is bit `j % 32` of word `j // 32`."""
    words = n_words(active.shape[1])
    padded = torch.nn.functional.pad(active, (0, words * WORD - active.shape[1]))
    bit = torch.arange(WORD, dtype=torch.int32, device=active.device)
    packed: Tensor = (padded.unflatten(1, (words, WORD)).int() << bit).sum(dim=-1, dtype=torch.int32)
    return packed


def n_kept(counts: Tensor, fraction: float) -> Tensor:
    """Return `fraction` of each of `counts`, rounded up; the rounding error of the product does not count."""
    return (counts.double() * fraction - 1e-9).ceil().clamp(min=0).to(torch.int32)


def latent_blocks(n_rows: int, d_sae: int, least: int = 1) -> Iterator[slice]:
    """Return slices of the latents, so narrow that `n_rows` rows of them stay small, in multiples of `least`."""
    width = least * max(1, MAX_ELEMENTS // (least * max(1, n_rows)))
    return (slice(start, min(start + width, d_sae)) for start in range(0, d_sae, width))


def encoder_tiles(n_rows: int, d_sae: int, k: int, least: int = 1) -> Iterator[tuple[slice, slice]]:
    """Return slices of rows and of latents that cover all, with latents in multiples of `least`.

    A rank needs whole rows. A threshold does not, so that each block of the encoder is read once.
    """
    if k:
        return ((rows, slice(0, d_sae)) for rows in row_blocks(n_rows, d_sae))
    return ((slice(None), latents) for latents in latent_blocks(n_rows, d_sae, least))


def row_blocks(n_rows: int, d_sae: int, least: int = 1) -> Iterator[slice]:
    """Return slices of the rows, so short that their `d_sae` latents stay small, but of at least `least` rows."""
    height = max(least, MAX_ELEMENTS // d_sae)
    return (slice(start, min(start + height, n_rows)) for start in range(0, n_rows, height))
