"""Encode and decode of an SAE on a CPU, in plain PyTorch, where nothing traces the calls and no gradient is recorded.

Rows are normalised already, `hn [N, d_in]`. Sums are in at least fp32. The functions read values to choose a way, so
they belong neither into a graph nor on a device that computes asynchronously.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from dspa_kernels.formulas import MAX_ELEMENTS, compute_dtype, row_blocks

# Numbers of narrow weights that are widened at once, so that they stay in a cache.
WIDENED = 1 << 20
# Decoding through sparse latents pays, by `python -m bench.offline.saes`, from this width of rows and this number of
# multiplications on, and while at most one in SPARSE_SHARE latents is active.
SPARSE_WIDTH, SPARSE_WORK, SPARSE_SHARE = 256, 1 << 20, 32
# The last two for several rows and narrow weights, which a CPU multiplies several times as fast.
NARROW_WORK, NARROW_SHARE = 1 << 26, 128
WIDE = (torch.float32, torch.float64)
# oneDNN pays from this number of multiplications on, and from this number of rows on unless the matrix is contiguous.
ONEDNN_WORK, ONEDNN_ROWS = 1 << 20, 8
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def encode(
    hn: Tensor, encoder_rows: Tensor, b_enc: Tensor, threshold: Tensor, k: int, capacity: int | None = None
) -> Tensor:
    """Return the latents [N, d_sae] of rows, dense, in the dtype of the encoder.

    Rows that are not finite are NaN, and those with more active latents than `capacity`, if that is given.
    """
    hn, not_finite = _finite(hn, encoder_rows)
    if len(hn) * len(encoder_rows) <= MAX_ELEMENTS:
        f = cast(_latents(hn, encoder_rows, b_enc, threshold, k, capacity), encoder_rows.dtype)
    else:
        f = encoder_rows.new_empty(len(hn), len(encoder_rows))
        for rows in row_blocks(len(hn), len(encoder_rows)):
            f[rows] = _latents(hn[rows], encoder_rows, b_enc, threshold, k, capacity)
    return f if not_finite is None else f.masked_fill_(not_finite, torch.nan)


def decode(f: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """Return `f W_dec + b_dec` [N, d_out] of latents f [N, d_sae], in the dtype of W_dec.

    It goes through sparse latents where a few rows show that this is faster.
    """
    n_rows, d_sae = f.shape
    if sparse_pays(n_rows, W_dec):
        sample = f[:: n_rows // 4 + 1]
        share = NARROW_SHARE if _is_narrow(n_rows, W_dec) else SPARSE_SHARE
        if share * int(sample.count_nonzero()) <= sample.numel():

            def decoded(rows: slice) -> Tensor:
                block = f[rows]
                row, latents = block.nonzero(as_tuple=True)
                values = block[row, latents]
                if f.dtype != W_dec.dtype:
                    values = values.to(compute_dtype(f, W_dec))
                return decode_active(values, latents, _starts(row, len(block)), W_dec, b_dec)

            return _by_blocks(n_rows, d_sae, decoded)
    return linear(cast(f, W_dec.dtype), W_dec.T, b_dec)


def reconstruct(
    hn: Tensor,
    encoder_rows: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    k: int,
    W_dec: Tensor,
    b_dec: Tensor,
    capacity: int | None = None,
) -> Tensor:
    """Return `decode(encode(hn))` [N, d_out], with the latents of a block of rows at a time."""
    hn, not_finite = _finite(hn, encoder_rows)

    def reconstructed(rows: slice) -> Tensor:
        block = hn[rows]
        few = 0 < SPARSE_SHARE * k <= len(encoder_rows) and _bound(capacity, k) is None
        if few and sparse_pays(len(block), W_dec):
            values, latents, _ = top_latents(_pre_activations(block, encoder_rows, b_enc), k)
            starts = torch.arange(0, values.numel(), k, device=values.device)
            return decode_active(values.relu().flatten(), latents.flatten(), starts, W_dec, b_dec)
        return decode(_latents(block, encoder_rows, b_enc, threshold, k, capacity), W_dec, b_dec)

    out = _by_blocks(len(hn), len(encoder_rows), reconstructed)
    return out if not_finite is None else out.masked_fill_(not_finite, torch.nan)


def decode_active(values: Tensor, latents: Tensor, starts: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """Decode active latents [n_active] in the order of their rows, of which the first ones are at `starts` [N].

    The result [N, d_out] has the dtype of W_dec.
    """
    dtype = W_dec.dtype
    if dtype != values.dtype:
        # The rows that are needed, widened once.
        used, latents = latents.unique(return_inverse=True)
        W_dec = W_dec[used].to(values.dtype)
    out = embedding_bag(latents, W_dec, starts, mode="sum", per_sample_weights=values).add_(b_dec)
    return cast(out, dtype)


def top_latents(pre: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return values and indices [N, k] of the k largest pre-activations of each row, and where these are [N, d_sae].

    Of equal values at the edge, the smaller index is among them.
    """
    values, latents = pre.topk(k, dim=1, sorted=False)
    chosen = pre >= values.amin(dim=1, keepdim=True)
    if chosen.count_nonzero().item() != values.numel():
        # Only the rows with ties, of which there may be one among thousands.
        tied = chosen.count_nonzero(dim=1) != k
        ordered = pre[tied].sort(dim=1, descending=True, stable=True)
        values[tied], latents[tied] = ordered.values[:, :k], ordered.indices[:, :k]
        chosen[tied] = torch.zeros_like(chosen[tied]).scatter_(1, latents[tied], True)
    return values, latents, chosen


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return `x weight^T + bias` [N, n_out] of x [N, n_in], all of one dtype.

    In large products of fp32, oneDNN is up to twice as fast as the BLAS library that PyTorch takes.
    """
    large = ONEDNN and x.dtype == torch.float32 and len(x) * weight.numel() >= ONEDNN_WORK
    if large and (len(x) >= ONEDNN_ROWS or weight.is_contiguous()):
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return out
    return torch.addmm(bias, x, weight.T)


def sparse_pays(n_rows: int, W_dec: Tensor) -> bool:
    """Return True if products are so large that decoding through few active latents is faster."""
    work = NARROW_WORK if _is_narrow(n_rows, W_dec) else SPARSE_WORK
    return W_dec.shape[1] >= SPARSE_WIDTH and n_rows * W_dec.numel() >= work


def _is_narrow(n_rows: int, W_dec: Tensor) -> bool:
    return n_rows >= ONEDNN_ROWS and W_dec.dtype not in WIDE


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x in `dtype`. A call of `to` that changes nothing takes as long as a small product of one row."""
    return x if x.dtype == dtype else x.to(dtype)


def _by_blocks(n_rows: int, d_sae: int, compute: Callable[[slice], Tensor]) -> Tensor:
    """Return what `compute` makes of blocks of rows, which is in new memory, without a copy where one is enough."""
    blocks = [compute(rows) for rows in row_blocks(max(1, n_rows), d_sae)]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def _finite(hn: Tensor, encoder_rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return rows in the dtype to compute in, with zeros for those that are not finite, and where [N, 1] these are."""
    if not hn.dtype == encoder_rows.dtype == torch.float32:
        hn = cast(hn, compute_dtype(hn, encoder_rows))
    # A sum that is finite shows that all are.
    if math.isfinite(hn.sum().item()):
        return hn, None
    not_finite = ~hn.isfinite().all(dim=1, keepdim=True)
    return hn.masked_fill(not_finite, 0), not_finite


def _pre_activations(hn: Tensor, encoder_rows: Tensor, b_enc: Tensor) -> Tensor:
    b_enc = cast(b_enc, hn.dtype)
    if encoder_rows.dtype == hn.dtype:
        return linear(hn, encoder_rows, b_enc)
    pre = hn.new_empty(len(hn), len(encoder_rows))
    height = max(1, WIDENED // hn.shape[1])
    for block, bias, out in zip(encoder_rows.split(height), b_enc.split(height), pre.split(height, dim=1), strict=True):
        out.copy_(linear(hn, block.to(hn.dtype), bias))
    return pre


def _latents(
    hn: Tensor, encoder_rows: Tensor, b_enc: Tensor, threshold: Tensor, k: int, capacity: int | None
) -> Tensor:
    """Return the latents of a block of rows, in the dtype of hn."""
    pre = _pre_activations(hn, encoder_rows, b_enc)
    active = top_latents(pre, k)[2] if k else pre > threshold
    f = pre.relu_().mul_(active)
    bound = _bound(capacity, k)
    if bound is not None:
        f[f.count_nonzero(dim=1) > bound] = torch.nan
    return f


def _bound(capacity: int | None, k: int) -> int | None:
    """Return the capacity that a row may exceed, None if it cannot: a top-k SAE has at most k active latents."""
    return None if capacity is None or 0 < k <= capacity else capacity


def _starts(row: Tensor, n_rows: int) -> Tensor:
    counts = row.bincount(minlength=n_rows)
    return counts.cumsum(0) - counts
