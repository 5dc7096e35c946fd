"""`fsrl_residual` in Triton: a few rows (decoding) in one cooperative launch; many (training, prefill) in blocks.

Of many rows, a kernel makes of two or three products what is left of them, for a block of latents at a time, and
stores that in the dtype of the residual; the plain products with it are the library's. So the weights are read once,
and the gradient of W_a is whole, block by block. For the backward a byte a latent is kept, so that it need not make
the products of the forward again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from dspa_kernels.barriers import barrier_of
from dspa_kernels.formulas import n_kept, row_blocks
from dspa_kernels.launch import FULL, SPLIT, launch_parameters, precision
from dspa_kernels.ops.fsrl_residual.triton_kernel import (
    ALL,
    BELOW,
    MOVE,
    NEARBY,
    NOWHERE,
    SUM,
    change_kernel,
    cut_kernel,
    gradient_kernel,
    step_kernel,
)
from dspa_kernels.ops.shared.triton_encode import ALIGN, BLOCK, row_keys
from dspa_kernels.ops.shared.triton_grid import n_programs
from dspa_kernels.ops.shared.triton_tiles import GROUP_SIZE, INTERPRETED

# Rows that one launch of a decoding step serves.
MAX_STEP = 64
# Columns that a program of a step writes at a time, and programs whose sums it adds at a time.
BLOCK_D, BLOCK_P = 64, 32
# Latents times rows that are held at once.
MAX_ELEMENTS = 1 << 26


class Operands(NamedTuple):
    """What the forward kernels read; keep: whether codes are made. rank, top: `cut_kernel`'s, [2, N] int32 or None."""

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
    activation: str
    bandwidth: float
    keep: bool
    rank: Tensor | None = None
    top: Tensor | None = None

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return len(self.W_a)

    def blocks(self) -> Iterator[tuple[slice, Operands]]:
        """Blocks of latents, so narrow that all rows of them stay small."""
        for latents in _slices(len(self.h), self.d_sae):
            names = ("encoder_rows", "b_enc", "sae_threshold", "W_dec", "W_a", "b_a", "threshold", "mask")
            parts = {name: getattr(self, name)[latents] for name in names if getattr(self, name) is not None}
            for name in ("rank", "top"):
                if getattr(self, name) is not None:
                    level, last = getattr(self, name)
                    # The last latent at a level, counted from the first of the block.
                    parts[name] = torch.stack([level, last - latents.start])
            yield latents, self._replace(**parts)

    @property
    def latents(self) -> int:
        """Where the encoder's latents are needed, a value for `LATENTS`."""
        if self.activation == "soft_threshold":
            return BELOW
        return NEARBY if self.activation == "jumprelu" and self.keep else NOWHERE

    def launch(self, kernel: str, full: bool = False) -> dict[str, Any]:
        """What all kernels are called with, launch parameters included; `full` where a product with W_dec is FULL.

        The parameters are those for the product that takes most of a tile, so that there is room for it.
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
            "p_rank": self.rank,
            "p_W_a": self.W_a,
            "p_b_a": self.b_a,
            "p_threshold": self.threshold,
            "p_mask": self.mask,
            "p_top": self.top,
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


def _ranks(operands: Operands, k: int) -> Tensor:
    """[2, N] int32: what the k largest pre-activations of a row reach, as bits, and the last latent there."""
    arguments = (operands.x, operands.encoder_rows, operands.b_enc, operands.sae_threshold, k, "none")
    return torch.cat([_cut(keys, torch.full_like(keys[:, 0], k)) for _, keys in row_keys(*arguments)], dim=1)


def _top(operands: Operands, fraction: float) -> Tensor:
    """[2, N] int32: what the largest v of a row reach in size, as bits, and the last latent there."""
    cuts = []
    for rows in row_blocks(len(operands.h), operands.d_sae):
        some = operands._replace(h=operands.h[rows], x=operands.x[rows])
        sizes, _, l0 = _changes(some, torch.float32, None, size=True)
        cuts.append(_cut(sizes.view(torch.int32), n_kept(l0, fraction)))
    return torch.cat(cuts, dim=1)


def _cut(keys: Tensor, keep: Tensor) -> Tensor:
    n_rows, width = keys.shape
    cut = keep.new_empty(2, n_rows)
    cut_kernel[(n_rows,)](keys, keep.contiguous(), cut, width, n_rows, BLOCK=BLOCK, num_warps=8, enable_fp_fusion=False)
    return cut


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b of one dtype, in fp32: as it is summed, and not rounded in between."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _slices(n_rows: int, d_sae: int) -> Iterator[slice]:
    """Slices of the latents, so narrow that all rows of them stay small; they begin on 16 bytes of a row of codes."""
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
    fraction: float,
    barriers: Tensor,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h' (with x, the change of h alone), l1, l0, and codes where they are kept."""
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
        activation=activation,
        bandwidth=bandwidth,
        keep=keep,
    )
    # Cuts need whole rows of latents, and come before what depends on them.
    if fraction < 1 and len(h):
        operands = operands._replace(top=_top(operands, fraction))
    if k and operands.latents != NOWHERE and len(h):
        operands = operands._replace(rank=_ranks(operands, k))
    codes = h.new_empty((len(h), len(W_a)) if keep else 0, dtype=torch.uint8)
    if len(h) <= MAX_STEP:
        return *_step(operands, barrier_of(barriers), codes, add=x is None), codes
    delta = h.new_zeros(h.shape, dtype=torch.float32)
    l1, l0 = h.new_zeros(len(h), dtype=torch.float32), h.new_zeros(len(h), dtype=torch.int32)
    dtype = torch.promote_types(h.dtype, W_dec.dtype)
    for latents, block in operands.blocks():
        c, sizes, counts = _changes(block, dtype, codes[:, latents] if keep else None)
        delta += _product(c, block.W_dec.to(dtype))
        l1 += sizes
        l0 += counts
    # A row of which nothing is moved stays as it came, a -0.0 as well.
    out = delta if x is not None else (h + delta).to(h.dtype).where(l0[:, None] > 0, h)
    return out, l1, l0, codes


def _changes(
    operands: Operands, dtype: torch.dtype, codes: Tensor | None, size: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """c [N, d_sae] in `dtype`, or with `size` |v| [N, width] with columns of 0 at its end; l1 and l0 [N]. Fills codes
    [N, d_sae]."""
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
        SIZE=size,
        LATENTS=NOWHERE if size else operands.latents,
        GROUP_SIZE=GROUP_SIZE,
    )
    return c if size else c[:, :d_sae], l1.sum(dim=0), l0.sum(dim=0, dtype=torch.int32)


def _step(operands: Operands, barrier: Tensor, codes: Tensor, add: bool) -> tuple[Tensor, Tensor, Tensor]:
    """h', or the change of h alone, of a few rows in one launch; l1, l0. Fills codes where they are kept."""
    h, n_rows = operands.h, len(operands.h)
    out = h.new_empty(h.shape, dtype=h.dtype if add else torch.float32)
    l1, l0 = h.new_empty(n_rows, dtype=torch.float32), h.new_empty(n_rows, dtype=torch.int32)
    if not n_rows:
        return out, l1, l0
    decoder = SPLIT if operands.W_dec.dtype == torch.bfloat16 else FULL
    arguments = operands.launch("fsrl_step", full=decoder == FULL)
    programs = arguments["n_programs"]
    part = h.new_empty(programs, *h.shape, dtype=torch.float32)
    part_l1 = h.new_empty(programs, n_rows, dtype=torch.float32)
    part_l0 = h.new_empty(programs, n_rows, dtype=torch.int32)
    for phase in (MOVE, SUM) if INTERPRETED else (ALL,):
        step_kernel[(programs,)](
            **arguments,
            p_W_dec=operands.W_dec,
            p_part=part,
            p_part_l1=part_l1,
            p_part_l0=part_l0,
            p_out=out,
            p_l1=l1,
            p_l0=l0,
            p_codes=codes if operands.keep else None,
            p_barrier=barrier,
            d_codes=operands.d_sae,
            PHASE=phase,
            ADD=add,
            LATENTS=operands.latents,
            DECODER=decoder,
            BLOCK_D=BLOCK_D,
            BLOCK_P=BLOCK_P,
            launch_cooperative_grid=True,
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
    """Gradients of h, x, W_a, b_a, threshold; empty where not needed."""
    grad, grad_l1 = grad.contiguous(), grad_l1.contiguous()
    dtype = torch.promote_types(h.dtype, W_a.dtype)
    b_h = h.to(dtype)
    d_W_a, d_b_a = W_a.new_zeros(W_a.shape), torch.zeros_like(b_a)
    d_threshold = b_a.new_zeros(0 if threshold is None else threshold.shape)
    d_h = torch.zeros_like(grad, dtype=torch.float32)
    # Without x, a latent of the encoder is one of h.
    d_x = d_h if adds else torch.zeros_like(d_h)
    # Only a soft threshold pushes down, and only then a latent's own gradient is left.
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
    """du in `dtype`, df in `latent_dtype` if there is one [N, d_sae]; the gradients of b_a and threshold [d_sae]."""
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
