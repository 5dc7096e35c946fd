"""`fsrl_residual` in Triton: few rows (decoding) in one cooperative launch, many rows (training, prefill) in blocks.

With many rows, a kernel computes two or three products for a block of latents and stores only the result c in the dtype
of the residual. PyTorch multiplies it with the weights. So weights are read once, and each block of the gradient of W_a
is complete. For the backward, one byte per latent is kept, so that the forward's products are not computed again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from dspa_kernels.barriers import barrier_word
from dspa_kernels.formulas import n_kept, row_blocks
from dspa_kernels.launch import FULL, SPLIT, launch_parameters, precision
from dspa_kernels.ops.fsrl_residual.triton_kernel import (
    ALL,
    BELOW,
    NEARBY,
    NOWHERE,
    PARTIALS,
    REDUCE,
    change_kernel,
    cutoff_kernel,
    gradient_kernel,
    step_kernel,
)
from dspa_kernels.ops.shared.triton_encode import ALIGN, BLOCK, row_keys
from dspa_kernels.ops.shared.triton_grid import launch_cooperative, n_programs
from dspa_kernels.ops.shared.triton_tiles import GROUP_SIZE, INTERPRETED

# The most rows of a decoding step in one launch. Its programs read and write their sums [rows, d_in] in fp32 once per
# tile of latents: with 64 rows, 16384 latents and 132 programs, almost four times the bytes of W_a.
MAX_STEP = 16
# Columns that a program of a step writes at a time, and programs whose partials it adds at a time.
BLOCK_D, BLOCK_P = 64, 32
# The most latents times rows that are stored at the same time.
MAX_ELEMENTS = 1 << 26


class Operands(NamedTuple):
    """Operands of the forward kernels. keep: store codes. Cutoffs: of `cutoff_kernel`, [2, N] int32, or None."""

    h: Tensor
    x: Tensor
    encoder_rows: Tensor
    b_enc: Tensor
    sae_threshold: Tensor
    W_dec: Tensor
    W_a: Tensor
    b_a: Tensor
    threshold: Tensor | None
    mask: Tensor | None
    rows: Tensor | None
    activation: str
    bandwidth: float
    keep: bool
    encoder_cutoff: Tensor | None = None
    adapter_cutoff: Tensor | None = None

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return len(self.W_a)

    def blocks(self) -> Iterator[tuple[slice, Operands]]:
        """Yield blocks of latents with at most MAX_ELEMENTS numbers each."""
        for latents in _slices(len(self.h), self.d_sae):
            names = ("encoder_rows", "b_enc", "sae_threshold", "W_dec", "W_a", "b_a", "threshold", "mask")
            parts = {name: getattr(self, name)[latents] for name in names if getattr(self, name) is not None}
            for name in ("encoder_cutoff", "adapter_cutoff"):
                if getattr(self, name) is not None:
                    pivot, last = getattr(self, name)
                    # The last latent is counted from the first of the block.
                    parts[name] = torch.stack([pivot, last - latents.start])
            yield latents, self._replace(**parts)

    @property
    def latents(self) -> int:
        """The value of `LATENTS`: where the encoder's latents are needed."""
        if self.activation == "soft_threshold":
            return BELOW
        return NEARBY if self.activation == "jumprelu" and self.keep else NOWHERE

    def launch(self, kernel: str, full: bool = False) -> dict[str, Any]:
        """Return the arguments and launch parameters that all kernels share.

        The launch parameters are those of the product that needs most registers and shared memory.

        Args:
            kernel: name in the launch table.
            full: the kernel also has a product with W_dec in FULL precision.
        """
        (n_rows, d_in), adapter = self.h.shape, precision(self.h, self.W_a, "none")
        encoder = precision(self.x, self.encoder_rows, "none")
        multiply = FULL if full else max(adapter, encoder)
        launch = launch_parameters(kernel, n_rows, d_in, self.d_sae, multiply, self.h.device)
        return {
            "p_h": self.h,
            "p_x": self.x,
            "p_encoder_rows": self.encoder_rows,
            "p_b_enc": self.b_enc,
            "p_sae_threshold": self.sae_threshold,
            "p_encoder_cutoff": self.encoder_cutoff,
            "p_W_a": self.W_a,
            "p_b_a": self.b_a,
            "p_threshold": self.threshold,
            "p_mask": self.mask,
            "p_rows": self.rows,
            "p_adapter_cutoff": self.adapter_cutoff,
            "d_in": d_in,
            "d_sae": self.d_sae,
            "n_rows": n_rows,
            "n_programs": n_programs(self.h.device, launch.programs),
            "ACTIVATION": self.activation,
            "bandwidth": self.bandwidth,
            "ADAPTER": adapter,
            "ENCODER": encoder,
            **launch.kernel_options(),
        }


def _encoder_cutoffs(operands: Operands, k: int) -> Tensor:
    """Return the cutoffs [2, N] of the k largest pre-activations of each row: pivot (as bits) and last latent."""
    arguments = (operands.x, operands.encoder_rows, operands.b_enc, operands.sae_threshold, k, "none")
    return torch.cat([_cutoffs(keys, torch.full_like(keys[:, 0], k)) for _, keys in row_keys(*arguments)], dim=1)


def _adapter_cutoffs(operands: Operands, fraction: float) -> Tensor:
    """Return the cutoffs [2, N] of the largest |v| of each row: pivot (as bits) and last latent."""
    cutoffs = []
    for rows in row_blocks(len(operands.h), operands.d_sae):
        row_operands = operands._replace(h=operands.h[rows], x=operands.x[rows], rows=None)
        abs_v, _, l0 = _changes(row_operands, torch.float32, None, return_abs_v=True)
        cutoffs.append(_cutoffs(abs_v.view(torch.int32), n_kept(l0, fraction)))
    return torch.cat(cutoffs, dim=1)


def _cutoffs(keys: Tensor, keep: Tensor) -> Tensor:
    n_rows, width = keys.shape
    cutoff = keep.new_empty(2, n_rows)
    cutoff_kernel[(n_rows,)](
        keys, keep.contiguous(), cutoff, width, n_rows, BLOCK=BLOCK, num_warps=8, enable_fp_fusion=False
    )
    return cutoff


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return a b in fp32, without rounding to the operands' dtype."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _slices(n_rows: int, d_sae: int) -> Iterator[slice]:
    """Yield slices of the latents with at most MAX_ELEMENTS numbers each, aligned to 16 bytes in a row of codes."""
    width = max(1, MAX_ELEMENTS // n_rows // ALIGN) * ALIGN
    return (slice(first, min(first + width, d_sae)) for first in range(0, d_sae, width))


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
    """Return h' (with x only the change of h), l1, l0, and codes, which are empty unless kept."""
    h = h.contiguous()
    operands = Operands(
        h=h,
        x=h if x is None else x.contiguous(),
        encoder_rows=encoder_rows,
        b_enc=b_enc.contiguous(),
        sae_threshold=sae_threshold.contiguous(),
        W_dec=W_dec,
        W_a=W_a.contiguous(),
        b_a=b_a.contiguous(),
        threshold=None if threshold is None else threshold.contiguous(),
        mask=None if mask is None else mask.contiguous().view(torch.uint8),
        rows=None if rows is None else rows.contiguous().view(torch.uint8),
        activation=activation,
        bandwidth=bandwidth,
        keep=keep,
    )
    # Cutoffs need whole rows of latents, so they come first.
    if fraction < 1 and len(h):
        operands = operands._replace(adapter_cutoff=_adapter_cutoffs(operands, fraction))
    if k and operands.latents != NOWHERE and len(h):
        operands = operands._replace(encoder_cutoff=_encoder_cutoffs(operands, k))
    codes = h.new_empty((len(h), len(W_a)) if keep else 0, dtype=torch.uint8)
    if len(h) <= MAX_STEP:
        return *_step(operands, codes, add=x is None), codes
    delta = h.new_zeros(h.shape, dtype=torch.float32)
    l1, l0 = h.new_zeros(len(h), dtype=torch.float32), h.new_zeros(len(h), dtype=torch.int32)
    dtype = torch.promote_types(h.dtype, W_dec.dtype)
    for latents, block in operands.blocks():
        c, block_l1, block_l0 = _changes(block, dtype, codes[:, latents] if keep else None)
        delta += _product(c, block.W_dec.to(dtype))
        l1 += block_l1
        l0 += block_l0
    # A row without changes keeps its bits, also of -0.0.
    out = delta if x is not None else (h + delta).to(h.dtype).where(l0[:, None] > 0, h)
    return out, l1, l0, codes


def _changes(
    operands: Operands, dtype: torch.dtype, codes: Tensor | None, return_abs_v: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return c [N, d_sae] in `dtype`, or |v| [N, width] padded with 0, and l1 and l0 [N].

    Fills codes [N, d_sae].
    """
    arguments, n_rows, d_sae = operands.launch("fsrl"), len(operands.h), operands.d_sae
    width, n_tiles = triton.cdiv(d_sae, ALIGN) * ALIGN, triton.cdiv(d_sae, arguments["BLOCK_L"])
    c = operands.h.new_empty(n_rows, width, dtype=dtype)
    l1 = operands.h.new_empty(n_tiles, n_rows, dtype=torch.float32)
    l0 = operands.h.new_empty(n_tiles, n_rows, dtype=torch.int32)
    change_kernel[(arguments["n_programs"],)](
        **arguments,
        p_c=c,
        p_l1=l1,
        p_l0=l0,
        p_codes=codes,
        d_codes=0 if codes is None else codes.stride(0),
        width=width,
        ABS_V=return_abs_v,
        LATENTS=NOWHERE if return_abs_v else operands.latents,
        GROUP_SIZE=GROUP_SIZE,
    )
    return c if return_abs_v else c[:, :d_sae], l1.sum(dim=0), l0.sum(dim=0, dtype=torch.int32)


def _step(operands: Operands, codes: Tensor, add: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return h' or only the change of h, l1 and l0 of few rows, in one launch. Fills codes if they are kept."""
    h, n_rows = operands.h, len(operands.h)
    out = h.new_empty(h.shape, dtype=h.dtype if add else torch.float32)
    l1, l0 = h.new_empty(n_rows, dtype=torch.float32), h.new_empty(n_rows, dtype=torch.int32)
    if not n_rows:
        return out, l1, l0
    decoder = SPLIT if operands.W_dec.dtype == torch.bfloat16 else FULL
    arguments = operands.launch("fsrl_step", full=decoder == FULL)
    programs = arguments.pop("n_programs")
    partials = h.new_empty(programs, *h.shape, dtype=torch.float32)
    partials_l1 = h.new_empty(programs, n_rows, dtype=torch.float32)
    partials_l0 = h.new_empty(programs, n_rows, dtype=torch.int32)
    for phase in (PARTIALS, REDUCE) if INTERPRETED else (ALL,):
        launch_cooperative(
            step_kernel,
            programs,
            **arguments,
            p_W_dec=operands.W_dec,
            p_partials=partials,
            p_partials_l1=partials_l1,
            p_partials_l0=partials_l0,
            p_out=out,
            p_l1=l1,
            p_l0=l0,
            p_codes=codes if operands.keep else None,
            p_barrier=barrier_word(h.device),
            d_codes=operands.d_sae,
            PHASE=phase,
            ADD=add,
            LATENTS=operands.latents,
            DECODER=decoder,
            BLOCK_D=BLOCK_D,
            BLOCK_P=BLOCK_P,
        )
    return out, l1, l0


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
    """Return the gradients of h, x, W_a, b_a and threshold; those that are not needed are empty."""
    grad, grad_l1 = grad.contiguous(), grad_l1.contiguous()
    dtype = torch.promote_types(h.dtype, W_a.dtype)
    b_h = h.to(dtype)
    d_W_a, d_b_a = W_a.new_zeros(W_a.shape), torch.zeros_like(b_a)
    d_threshold = b_a.new_zeros(0 if threshold is None else threshold.shape)
    d_h = torch.zeros_like(grad, dtype=torch.float32)
    # Without x, the encoder reads h.
    d_x = d_h if adds else torch.zeros_like(d_h)
    # f has a gradient only where v < 0, which only a soft threshold gives.
    pushes = activation == "soft_threshold" and (needs_h if adds else needs_x)
    latent_dtype = torch.promote_types(h.dtype, encoder_rows.dtype) if pushes else None
    for latents in _slices(len(h), len(W_a)) if len(h) else ():
        d_u, d_f, d_b_a[latents], thresholds = _gradients(
            grad,
            grad_l1,
            codes[:, latents],
            W_dec[latents],
            None if threshold is None else threshold[latents],
            jumps=activation == "jumprelu",
            bandwidth=bandwidth,
            dtype=dtype,
            latent_dtype=latent_dtype,
        )
        d_W_a[latents] = d_u.T @ b_h
        if threshold is not None:
            d_threshold[latents] = thresholds
        if needs_h:
            d_h += _product(d_u, W_a[latents].to(dtype))
        if d_f is not None:
            d_x += _product(d_f, encoder_rows[latents].to(d_f.dtype))
    if adds and needs_h:
        d_h += grad
    given_h = d_h.to(h.dtype) if needs_h else h.new_empty(0)
    return given_h, d_x if needs_x else d_x.new_empty(0), d_W_a, d_b_a, d_threshold


def _gradients(
    grad: Tensor,
    grad_l1: Tensor,
    codes: Tensor,
    W_dec: Tensor,
    threshold: Tensor | None,
    *,
    jumps: bool,
    bandwidth: float,
    dtype: torch.dtype,
    latent_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Return du and, if `latent_dtype` is given, df [N, d_sae], and the gradients of b_a and threshold [d_sae]."""
    (n_rows, d_in), d_sae, multiply = grad.shape, len(W_dec), precision(grad, W_dec, "none")
    launch = launch_parameters("fsrl_backward", n_rows, d_in, d_sae, multiply, grad.device)
    width, n_tiles = triton.cdiv(d_sae, ALIGN) * ALIGN, triton.cdiv(n_rows, launch.BLOCK_N)
    d_u = grad.new_empty(n_rows, width, dtype=dtype)
    d_f = None if latent_dtype is None else grad.new_empty(n_rows, width, dtype=latent_dtype)
    sums = [grad.new_empty(n_tiles, d_sae, dtype=torch.float32) for _ in range(1 if threshold is None else 2)]
    programs = n_programs(grad.device, launch.programs)
    gradient_kernel[(programs,)](
        p_grad=grad,
        p_grad_l1=grad_l1,
        p_codes=codes,
        p_W_dec=W_dec,
        p_threshold=threshold,
        p_du=d_u,
        p_df=d_f,
        p_db_a=sums[0],
        p_dthreshold=None if threshold is None else sums[1],
        bandwidth=bandwidth,
        d_codes=codes.stride(0),
        d_in=d_in,
        d_sae=d_sae,
        width=width,
        n_rows=n_rows,
        n_programs=programs,
        JUMPS=jumps,
        DECODER=multiply,
        GROUP_SIZE=GROUP_SIZE,
        **launch.kernel_options(),
    )
    return d_u[:, :d_sae], None if d_f is None else d_f[:, :d_sae], sums[0].sum(dim=0), sums[-1].sum(dim=0)
