"""The specification of `fsrl_residual`, forward and backward, in plain PyTorch."""

import torch
from torch import Tensor

from dspa_kernels.formulas import compute_dtype, latents, n_kept, pre_activations, row_blocks
from dspa_kernels.ops.fsrl_residual.codes import DOWN, IDLE, NEAR, OFF, UP

# Many tensors of all latents are held per block of rows, so that blocks are shorter than with a single one. They keep
# at least this many rows, because a product of fewer mostly reads the weights.
TENSORS, LEAST = 16, 64


def activate(u: Tensor, threshold: Tensor | None, activation: str) -> Tensor:
    """Return v = act(u): sign(u) max(|u| - threshold, 0), max(u, 0), or u where u > threshold. A NaN stays NaN."""
    if threshold is None:
        return u.clamp(min=0)
    if activation == "soft_threshold":
        return u.sign() * (u.abs() - threshold).clamp(min=0)
    return u.masked_fill(u <= threshold, 0)


def top_of_row(v: Tensor, fraction: float) -> Tensor:
    """Return where |v| is in the largest `fraction` of its row's v that are not 0, ties to the smaller index."""
    keep = n_kept((v != 0).sum(dim=-1), fraction)
    order = v.abs().argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(v.shape[-1], device=v.device).expand_as(order))
    return rank < keep[:, None]


def codes_of(v: Tensor, f: Tensor | None, near: Tensor | None) -> Tensor:
    """Return the code of each latent, uint8. `near` is where the threshold of a JumpReLU is near."""
    codes = torch.zeros_like(v, dtype=torch.uint8).masked_fill_(v > 0, UP)
    if f is None:
        return codes
    down, on = v < 0, f + v > 0
    codes.masked_fill_(down, IDLE).masked_fill_(down & (f > 0), OFF).masked_fill_(down & on, DOWN)
    return codes if near is None else codes + (near & on) * NEAR


def fsrl_residual(
    h: Tensor,
    x: Tensor | None,
    encoder_rows: Tensor,
    b_enc: Tensor,
    sae_threshold: Tensor,
    k: int,
    W_dec: Tensor,
    W_a: Tensor,
    b_a: Tensor,
    threshold: Tensor | None,
    activation: str,
    bandwidth: float,
    mask: Tensor | None,
    rows: Tensor | None,
    fraction: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return h' = h + (ReLU(f + v) - f) W_dec with v = act(h W_a^T + b_a), l1, l0 and codes.

    l1 = sum_j |v_j|; l0 = number of v_j that are not 0. ReLU(f + v) - f is max(v, -f), so that it is v where v >= 0.
    With x, the rows as a normalising encoder reads them, h' is the change alone, in the dtype in which it is computed.
    The codes, one byte per latent and row, are what the backward needs. They are empty unless `keep`.
    """
    dtype = compute_dtype(h, encoder_rows, W_a)
    out = h.new_empty(h.shape, dtype=h.dtype if x is None else dtype)
    l1, l0 = h.new_empty(len(h), dtype=dtype), h.new_empty(len(h), dtype=torch.int32)
    codes = h.new_empty((len(h), len(W_a)) if keep else 0, dtype=torch.uint8)
    jumps = activation == "jumprelu"
    needs_f = activation == "soft_threshold" or (jumps and keep)
    encoder_rows = encoder_rows.to(dtype) if needs_f else encoder_rows
    W_dec, W_a = W_dec.to(dtype), W_a.to(dtype)
    for block in row_blocks(len(h), TENSORS * len(W_a), LEAST):
        b_h = h[block].to(dtype)
        u = pre_activations(b_h, W_a, b_a)
        v, f = activate(u, threshold, activation), None
        kept = torch.ones_like(v, dtype=torch.bool) if mask is None else mask.expand_as(v)
        kept = kept if rows is None else kept & rows[block, None]
        v = v.where(kept, 0)
        if fraction < 1:
            kept = top_of_row(v, fraction)
            v = v.where(kept, 0)
        if needs_f:
            f = latents(b_h if x is None else x[block].to(dtype), encoder_rows, b_enc, sae_threshold, k)
        delta = (v if f is None else torch.maximum(v, -f)) @ W_dec
        l1[block] = v.abs().sum(dim=1)
        l0[block] = (v != 0).sum(dim=1, dtype=torch.int32)
        # A row without a moved latent is returned bit for bit, -0.0 included.
        out[block] = (delta + b_h).where(l0[block, None] > 0, b_h) if x is None else delta
        if keep:
            near = ((u - threshold).abs() <= bandwidth / 2) & kept if jumps and threshold is not None else None
            codes[block] = codes_of(v, f, near)
    return out, l1, l0, codes


def fsrl_residual_backward(
    grad: Tensor,
    grad_l1: Tensor,
    codes: Tensor,
    h: Tensor,
    encoder_rows: Tensor,
    W_dec: Tensor,
    W_a: Tensor,
    b_a: Tensor,
    threshold: Tensor | None,
    activation: str,
    bandwidth: float,
    adds: bool,
    needs_h: bool,
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of h, x, W_a, b_a and threshold, empty if not needed.

    `adds` is True if the forward returned h' and not its change alone, so that there was no x. With g the gradient of
    h': dc = g W_dec^T; dv = dc [f + v > 0] + dl1 sign(v); du = dv where v is not 0; df = -dc where f > 0 and
    f + v <= 0. A soft threshold gets -sign(v) du. That of a JumpReLU gets -(threshold / bandwidth) dv where
    |u - threshold| <= bandwidth / 2, the straight-through estimate of its jump.
    """
    dtype = compute_dtype(h, encoder_rows, W_a)
    d_h = h.new_empty(h.shape if needs_h else 0)
    d_x = h.new_empty(h.shape if needs_x else 0, dtype=dtype)
    d_W_a, d_b_a = h.new_zeros(W_a.shape, dtype=dtype), h.new_zeros(b_a.shape, dtype=dtype)
    d_threshold = h.new_zeros(0 if threshold is None else threshold.shape, dtype=dtype)
    needs_f = (needs_h and adds) or needs_x
    wide_W_dec, wide_W_a = W_dec.to(dtype), W_a.to(dtype) if needs_h else W_a
    wide_encoder_rows = encoder_rows.to(dtype) if needs_f else encoder_rows
    for rows in row_blocks(len(h), TENSORS * len(W_a), LEAST):
        g, moved = grad[rows].to(dtype), codes[rows] % NEAR
        d_c = g @ wide_W_dec.T
        sign = (moved == UP).to(dtype) - (moved > UP).to(dtype)
        d_u = d_c.where((moved == UP) | (moved == DOWN), 0) + grad_l1[rows].to(dtype)[:, None] * sign
        if threshold is not None and activation == "soft_threshold":
            d_threshold -= (sign * d_u).sum(dim=0)
        elif threshold is not None:
            d_v = d_u.where(moved > 0, d_c)
            d_threshold -= threshold / bandwidth * d_v.where(codes[rows] >= NEAR, 0).sum(dim=0)
        d_W_a.addmm_(d_u.T, h[rows].to(dtype))
        d_b_a += d_u.sum(dim=0)
        d_f = -d_c.where(moved == OFF, 0) @ wide_encoder_rows if needs_f else 0
        if needs_h:
            d_h[rows] = (d_u @ wide_W_a + (g + d_f if adds else 0)).to(h.dtype)
        if needs_x:
            d_x[rows] = d_f
    return d_h, d_x, d_W_a.to(W_a.dtype), d_b_a.to(b_a.dtype), d_threshold.to(b_a.dtype)
