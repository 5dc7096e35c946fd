"""`fsrl_residual`: move the latents of residual rows by an adapter, differentiably (FSRL)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dspa_kernels.backends import choose, define_op
from dspa_kernels.checks import check_device, check_dtype, check_shape, refuse
from dspa_kernels.formulas import compute_dtype, normalise
from dspa_kernels.weights import FLOATS, FULL, SAEWeights

ACTIVATIONS = ("soft_threshold", "relu", "jumprelu")
# Arguments of an adapter, in the schemas of forward and backward.
ADAPTER = "Tensor W_a, Tensor b_a, Tensor? threshold, str activation, float bandwidth"


class FSRLOutput(NamedTuple):
    """The result of `fsrl_residual`.

    Attributes:
        h: [N, d_in] residual rows, in their dtype.
        l1: [N] fp32, or fp64 if an operand is fp64, sum of |v| over the latents, differentiable.
        l0: [N] int32, number of latents that v moves.
    """

    h: Tensor
    l1: Tensor
    l0: Tensor


def fsrl_residual(
    h: Tensor,
    sae: SAEWeights,
    W_a: Tensor,
    b_a: Tensor,
    threshold: Tensor | None = None,
    activation: str = "soft_threshold",
    *,
    bandwidth: float = 1e-3,
    mask: Tensor | None = None,
    rows: Tensor | None = None,
    fraction: float = 1.0,
    backend: str = "auto",
) -> FSRLOutput:
    """Move the latents f of an SAE by an adapter: `h' = h + (ReLU(f + v) - f) W_dec` with `v = act(h W_a^T + b_a)`.

    This equals decoding ReLU(f + v) and adding the SAE's reconstruction error (arXiv 2509.12934). `act` is
    `sign(u) max(|u| - threshold, 0)` (soft_threshold), `max(u, 0)` (relu), or u where u > threshold (jumprelu).
    Where v >= 0 the change of a latent is v itself, so that the encoder matters only where v < 0. If the SAE normalises
    rows, f is computed from the normalised row and v from h itself, and the change is multiplied by the row's scale.

    Differentiable in h, W_a, b_a and threshold. The SAE gets no gradient. The threshold of a JumpReLU gets the
    straight-through estimate with a rectangle of width `bandwidth`. The choice of the v that a fraction keeps is not
    differentiated. The backward needs the inputs and one byte per latent and row, which is kept only if a gradient is
    needed.

    Args:
        h: residual rows [N, d_in], any floating dtype; N may be 0.
        sae: the SAE.
        W_a: matrix of the adapter [d_sae, d_in], one contiguous row per latent, any floating dtype. On a GPU, products
            are fast if it has the 16-bit dtype of h.
        b_a: [d_sae] fp32, or fp64 with an fp64 W_a.
        threshold: [d_sae] in the dtype of b_a, >= 0; None for "relu".
        activation: "soft_threshold", "relu" or "jumprelu".
        bandwidth: width of the straight-through estimate, > 0.
        mask: [d_sae] bool, True for latents that may be moved; None for all.
        rows: [N] bool, True for rows whose latents may be moved; None for all. Any other row is returned bit for bit,
            with l1 and l0 of 0. It is not read on the host, and nothing may need a gradient. For a tile of rows without
            a True one, Triton reads neither W_a nor the SAE, except for the decoder of more than 16 rows, and for ranks
            (`fraction`, and the encoder of a top-k SAE).
        fraction: share of the v of a row that are kept, among those that are not 0: the largest by size. Their number
            is rounded up.
        backend: "auto", "reference", "triton" or "cuda".

    Returns:
        `FSRLOutput(h, l1, l0)`, with l1 and l0 of v as it is applied.

    Raises:
        InputError: an invalid shape, dtype, device, activation or number, or `rows` where a gradient is needed.
        BackendError: the named backend cannot run.
    """
    _check(h, sae, W_a, b_a, threshold, activation, bandwidth, mask, rows, fraction)
    dtype = compute_dtype(h, sae.encoder_rows, W_a)
    x, scale = None, None
    if sae.normalize != "none":
        x, _, scale = normalise(h, sae.normalize, dtype)
    differentiable = (h, W_a, b_a, *(() if threshold is None else (threshold,)))
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in differentiable)
    if keep and rows is not None:
        raise refuse("rows", "a tensor", "None where a gradient is needed", "Call fsrl_residual under torch.no_grad().")
    out, l1, l0, _ = _fsrl_residual(
        h=h,
        x=x,
        encoder_rows=sae.encoder_rows,
        b_enc=sae.b_enc,
        sae_threshold=sae.threshold,
        k=sae.k,
        W_dec=sae.W_dec,
        W_a=W_a,
        b_a=b_a,
        threshold=threshold,
        activation=activation,
        bandwidth=bandwidth,
        mask=mask,
        rows=rows,
        fraction=fraction,
        keep=keep,
        backend=choose("fsrl_residual", h.device, backend, dtype),
    )
    if scale is not None:
        out = (h + scale * out).to(h.dtype)
        out = out if rows is None else out.where(rows[:, None], h)
    return FSRLOutput(out, l1, l0)


def _check(
    h: Tensor,
    sae: SAEWeights,
    W_a: Tensor,
    b_a: Tensor,
    threshold: Tensor | None,
    activation: str,
    bandwidth: float,
    mask: Tensor | None,
    rows: Tensor | None,
    fraction: float,
) -> None:
    check_shape("h", h, ("N", sae.d_in), "Flatten batch and sequence into one dimension.")
    check_dtype("h", h, FLOATS)
    check_device("sae", sae.encoder_rows, h, "h")
    check_shape("sae.W_dec", sae.W_dec, ("d_sae", sae.d_in), "A transcoder does not change the rows that it reads.")
    if activation not in ACTIVATIONS:
        raise refuse("activation", repr(activation), ", ".join(ACTIVATIONS))
    if (threshold is None) != (activation == "relu"):
        accepted = "None for relu, [d_sae] for soft_threshold and jumprelu"
        raise refuse("threshold", "None" if threshold is None else "a tensor", accepted)
    full, latents = FULL if W_a.dtype == torch.float64 else FULL[:1], (sae.d_sae,)
    for name, tensor, shape, dtypes in (
        ("W_a", W_a, (sae.d_sae, sae.d_in), FLOATS),
        ("b_a", b_a, latents, full),
        ("threshold", threshold, latents, full),
        ("mask", mask, latents, (torch.bool,)),
        ("rows", rows, (h.shape[0],), (torch.bool,)),
    ):
        if tensor is not None:
            check_shape(name, tensor, shape)
            check_dtype(name, tensor, dtypes)
            check_device(name, tensor, h, "h")
    if not 0 < bandwidth < float("inf"):
        raise refuse("bandwidth", bandwidth, "a finite number > 0")
    if not 0 <= fraction <= 1:
        raise refuse("fraction", fraction, "0 (keep none) to 1 (keep all)")


def _fake(
    h: Tensor, x: Tensor | None, encoder_rows: Tensor, W_a: Tensor, keep: bool, **_: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(h, encoder_rows, W_a)
    out = h.new_empty(h.shape, dtype=h.dtype if x is None else dtype)
    codes = h.new_empty((len(h), len(W_a)) if keep else 0, dtype=torch.uint8)
    return out, h.new_empty(len(h), dtype=dtype), h.new_empty(len(h), dtype=torch.int32), codes


def _fake_backward(
    h: Tensor,
    encoder_rows: Tensor,
    W_a: Tensor,
    b_a: Tensor,
    threshold: Tensor | None,
    needs_h: bool,
    needs_x: bool,
    **_: object,
) -> tuple[Tensor, ...]:
    d_x = h.new_empty(h.shape if needs_x else 0, dtype=compute_dtype(h, encoder_rows, W_a))
    d_threshold = b_a.new_empty(0 if threshold is None else threshold.shape)
    return h.new_empty(h.shape if needs_h else 0), d_x, W_a.new_empty(W_a.shape), b_a.new_empty(b_a.shape), d_threshold


_fsrl_residual = define_op(
    "fsrl_residual",
    "(Tensor h, Tensor? x, Tensor encoder_rows, Tensor b_enc, Tensor sae_threshold, int k, Tensor W_dec, "
    f"{ADAPTER}, Tensor? mask, Tensor? rows, float fraction, bool keep) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
)
_fsrl_residual_backward = define_op(
    "fsrl_residual_backward",
    "(Tensor grad, Tensor grad_l1, Tensor codes, Tensor h, Tensor encoder_rows, Tensor W_dec, "
    f"{ADAPTER}, bool adds, bool needs_h, bool needs_x) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    h, x, encoder_rows, _, _, _, W_dec, W_a, b_a, threshold, activation, bandwidth, *_others, backend = inputs
    ctx.save_for_backward(output[3], h, encoder_rows, W_dec, W_a, b_a, threshold)
    ctx.settings = {"activation": activation, "bandwidth": bandwidth, "adds": x is None, "backend": backend}


def _backward(ctx: Any, grad: Tensor, grad_l1: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    names = ("codes", "h", "encoder_rows", "W_dec", "W_a", "b_a", "threshold")
    saved = dict(zip(names, ctx.saved_tensors, strict=True))
    needs_h, needs_x, *_others = needs = ctx.needs_input_grad
    d_h, d_x, *adapter = _fsrl_residual_backward(
        grad=grad, grad_l1=grad_l1, **saved, **ctx.settings, needs_h=needs_h, needs_x=needs_x
    )
    # Schema order: h, x, five frozen arguments, the adapter's three tensors, then seven arguments without gradient.
    gradients = (d_h, d_x, *[None] * 5, *adapter, *[None] * 7)
    return tuple(gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True))


torch.library.register_autograd("dspa::fsrl_residual", _backward, setup_context=_save_for_backward)
