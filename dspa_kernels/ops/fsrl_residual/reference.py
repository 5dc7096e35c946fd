"""The specification of `fsrl_residual`, forward and backward, in plain PyTorch."""

from typing import NamedTuple

import torch
from torch import Tensor

from dspa_kernels.ops.common import active_latents, compute_dtype, n_kept, pre_activations, row_blocks


class Latents(NamedTuple):
    """What a block of rows makes of an adapter, [rows, d_sae] each: u = h W_a^T + b_a, v = act(u) where it is kept, and
    f the SAE's latents (None where nothing depends on them)."""

    u: Tensor
    v: Tensor
    f: Tensor | None
    kept: Tensor | None

    def change(self) -> Tensor:
        """ReLU(f + v) - f, which is v wherever v >= 0."""
        return self.v if self.f is None else torch.maximum(self.v, -self.f)


def activate(u: Tensor, theta: Tensor | None, activation: str) -> Tensor:
    """v = act(u): sign(u) max(|u| - theta, 0), max(u, 0), or u where u > theta; NaN of NaN."""
    if activation == "relu" or theta is None:
        return u.clamp(min=0)
    if activation == "soft_threshold":
        return u.sign() * (u.abs() - theta).clamp(min=0)
    return u.masked_fill(u <= theta, 0)


def top_of_row(v: Tensor, fraction: float) -> Tensor:
    """Where v is among the largest |v| of its row: the fraction of those that are not 0, ties to the smaller index."""
    keep = n_kept((v != 0).sum(dim=-1), fraction)
    order = v.abs().argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(v.shape[-1], device=v.device).expand_as(order))
    return rank < keep[:, None]


def latents(
    h: Tensor,
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    k: int,
    W_a: Tensor,
    b_a: Tensor,
    theta: Tensor | None,
    activation: str,
    mask: Tensor | None,
    fraction: float,
    needs_f: bool,
) -> Latents:
    """u, v and f of a block of rows; h is what the adapter reads, x what the encoder reads."""
    u = pre_activations(h, W_a, b_a)
    v = activate(u, None if theta is None else theta.to(u.dtype), activation)
    kept = None if mask is None else mask.expand_as(v)
    if kept is not None:
        v = v.where(kept, 0)
    if fraction < 1:
        top = top_of_row(v, fraction)
        v, kept = v.where(top, 0), top
    if not needs_f:
        return Latents(u, v, None, kept)
    pre = pre_activations(x, W_enc, b_enc)
    return Latents(u, v, pre.where(active_latents(pre, threshold, k), 0), kept)


def fsrl_residual(
    h: Tensor,
    x: Tensor | None,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    k: int,
    W_dec: Tensor,
    W_a: Tensor,
    b_a: Tensor,
    theta: Tensor | None,
    activation: str,
    bandwidth: float,
    mask: Tensor | None,
    fraction: float,
    barriers: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """h' = h + (ReLU(f + v) - f) W_dec, l1 = sum_j |v_j|, l0 = number of v_j that are not 0.

    With x, the rows as a normalising encoder reads them, the change of h alone, in the precision it is computed in.
    """
    del bandwidth, barriers
    dtype = compute_dtype(h, W_enc, W_a)
    out = h.new_empty(h.shape, dtype=h.dtype if x is None else dtype)
    l1, l0 = h.new_empty(len(h), dtype=dtype), h.new_empty(len(h), dtype=torch.int32)
    W_dec = W_dec.to(dtype)
    for rows in row_blocks(len(h), len(W_a)):
        b_h = h[rows].to(dtype)
        b_x = b_h if x is None else x[rows].to(dtype)
        found = latents(
            b_h,
            b_x,
            W_enc,
            b_enc,
            threshold,
            k,
            W_a,
            b_a,
            theta,
            activation,
            mask,
            fraction,
            needs_f=activation == "soft_threshold",
        )
        delta = found.change() @ W_dec
        l1[rows] = found.v.abs().sum(dim=1)
        l0[rows] = (found.v != 0).sum(dim=1, dtype=torch.int32)
        # A row of which nothing is moved stays as it came, a -0.0 as well.
        out[rows] = (delta + b_h).where(l0[rows, None] > 0, b_h) if x is None else delta
    return out, l1, l0


def fsrl_residual_backward(
    grad: Tensor,
    grad_l1: Tensor,
    h: Tensor,
    x: Tensor | None,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    k: int,
    W_dec: Tensor,
    W_a: Tensor,
    b_a: Tensor,
    theta: Tensor | None,
    activation: str,
    bandwidth: float,
    mask: Tensor | None,
    fraction: float,
    needs_h: bool,
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of h, x, W_a, b_a and theta; empty where not needed. Latents are computed again, none was kept.

    With c = ReLU(f + v) - f and g the gradient of h': dc = g W_dec^T; dv = dc [f + v > 0] + dl1 sign(v), where it is
    kept; du = dv where v is not 0; df = -dc where f + v <= 0. A soft threshold gets -sign(v) du; a JumpReLU's gets
    -(theta / bandwidth) dv where |u - theta| <= bandwidth / 2, the straight-through estimate of its jump.
    """
    dtype = compute_dtype(h, W_enc, W_a)
    jumps = activation == "jumprelu"
    d_h = h.new_empty(h.shape if needs_h else 0)
    d_x = h.new_zeros(0) if x is None or not needs_x else x.new_zeros(x.shape)
    d_W_a, d_b_a = h.new_zeros(W_a.shape, dtype=dtype), h.new_zeros(b_a.shape, dtype=dtype)
    d_theta = h.new_zeros(0 if theta is None else theta.shape, dtype=dtype)
    W_dec = W_dec.to(dtype)
    for rows in row_blocks(len(h), len(W_a)):
        b_h, g = h[rows].to(dtype), grad[rows].to(dtype)
        found = latents(
            b_h,
            b_h if x is None else x[rows].to(dtype),
            W_enc,
            b_enc,
            threshold,
            k,
            W_a,
            b_a,
            theta,
            activation,
            mask,
            fraction,
            needs_f=activation != "relu",
        )
        u, v, f = found.u, found.v, found.f
        d_c = g @ W_dec.T
        on = v > 0 if f is None else f + v > 0
        d_v = d_c.where(on, 0) + grad_l1[rows].to(dtype)[:, None] * v.sign()
        d_u = d_v.where(v != 0, 0)
        if theta is not None and jumps:
            near = ((u - theta).abs() <= bandwidth / 2) & (True if found.kept is None else found.kept)
            d_theta -= (theta / bandwidth * d_v).where(near, 0).sum(dim=0)
        elif theta is not None:
            d_theta -= (v.sign() * d_u).sum(dim=0)
        d_W_a.addmm_(d_u.T, b_h)
        d_b_a += d_u.sum(dim=0)
        d_f = None if f is None or jumps else -d_c.where((f > 0) & ~on, 0)
        if needs_h:
            b_d = d_u @ W_a.to(dtype)
            if x is None:
                b_d += g
                if d_f is not None:
                    b_d += d_f @ W_enc.to(dtype)
            d_h[rows] = b_d.to(h.dtype)
        if needs_x and d_f is not None:
            d_x[rows] = (d_f @ W_enc.to(dtype)).to(d_x.dtype)
    return d_h, d_x, d_W_a.to(W_a.dtype), d_b_a.to(b_a.dtype), d_theta.to(b_a.dtype)
