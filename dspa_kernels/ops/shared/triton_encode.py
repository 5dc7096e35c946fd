"""A GEMM of rows and an encoder that stores or counts active latents, for `sparse_encode` and `activation_counts`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from dspa_kernels.formulas import row_blocks
from dspa_kernels.launch import launch_parameters, precision
from dspa_kernels.ops.shared.triton_grid import n_programs
from dspa_kernels.ops.shared.triton_tiles import GROUP_SIZE, grouped_tile, product_tile, row_chunk, row_scale

# Rows of keys have a multiple of this many numbers, so that threads can read and write 16 bytes at a time.
ALIGN = 16
# Number of keys that the program of a row reads at a time.
BLOCK = 2048


@triton.jit
def normalise_kernel(p_h, p_out, d_in, NORMALIZE: tl.constexpr, BLOCK: tl.constexpr):
    """out = n(h) in fp32. One program per row."""
    i_row = tl.program_id(0).to(tl.int64)
    p_row = p_h + i_row * d_in
    b_mean, b_divisor, _ = row_scale(p_row, d_in, NORMALIZE, BLOCK)
    o_k = tl.arange(0, BLOCK)
    for i_k in range(0, d_in, BLOCK):
        b_x = row_chunk(p_row, i_k, o_k, d_in, b_mean, b_divisor, NORMALIZE)
        tl.store(p_out + i_row * d_in + i_k + o_k, b_x, mask=o_k < d_in - i_k)


@triton.jit
def count_tile(p_counts, m_active, b_sequence, o_latent, d_sae):
    """counts_sj += number of rows n of a tile with sequence_n = s whose latent j is active."""
    i_sequence = tl.max(b_sequence, axis=0)
    while i_sequence >= 0:
        m_sequence = b_sequence == i_sequence
        b_count = tl.sum((m_active & m_sequence[None, :]).to(tl.int32), axis=1)
        p_count = p_counts + i_sequence.to(tl.int64) * d_sae + o_latent
        tl.atomic_add(p_count, b_count, mask=b_count > 0, sem="relaxed")
        b_sequence = tl.where(m_sequence, -1, b_sequence)
        i_sequence = tl.max(b_sequence, axis=0)


@triton.jit(
    do_not_specialize=["d_sae", "n_rows", "n_sequences", "n_programs"],
    do_not_specialize_on_alignment=["p_sequences"],
)
def encode_kernel(
    p_x,
    p_encoder_rows,
    p_b_enc,
    p_threshold,
    p_sequences,
    p_counts,
    p_f,
    d_in,
    d_sae,
    width,
    n_rows,
    n_sequences,
    n_programs,
    TOP_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
):
    """f_nj = pre_nj if pre_nj > 0 and pre_nj > threshold_j, else 0; top-k: if pre_nj > 0.

    With sequences, counts_sj += number of rows n with sequence_n = s and f_nj > 0, and f is not stored.
    """
    n_row_tiles, n_latent_tiles = tl.cdiv(n_rows, BLOCK_N), tl.cdiv(d_sae, BLOCK_L)
    for i in range(tl.program_id(0), n_row_tiles * n_latent_tiles, n_programs):
        i_row_tile, i_latent_tile = grouped_tile(i, n_row_tiles, n_latent_tiles, GROUP_SIZE)
        i_row, i_latent = i_row_tile * BLOCK_N, i_latent_tile * BLOCK_L
        o_row, o_latent = i_row + tl.arange(0, BLOCK_N), i_latent + tl.arange(0, BLOCK_L)
        m_row, m_latent = o_row < n_rows, o_latent < d_sae
        if p_sequences is not None:
            b_sequence = tl.load(p_sequences + o_row, mask=m_row, other=-1)
            # Rows of a sequence that does not exist are not counted.
            b_sequence = tl.where(b_sequence < n_sequences, b_sequence, -1)
            m_row = b_sequence >= 0
        if tl.max(m_row.to(tl.int32), axis=0) > 0:
            b_pre = product_tile(
                p_encoder_rows, p_x, i_latent, m_latent, i_row, m_row, d_in, BLOCK_L, BLOCK_N, BLOCK_K, PRECISION
            )
            b_pre += tl.load(p_b_enc + o_latent, mask=m_latent, other=0.0)[:, None]
            m_active = m_latent[:, None] & (b_pre > 0)
            if not TOP_K:
                b_threshold = tl.load(p_threshold + o_latent, mask=m_latent, other=0.0)
                m_active = m_active & (b_pre > b_threshold[:, None])
            if p_counts is not None:
                count_tile(p_counts, m_active, b_sequence, o_latent, d_sae)
            else:
                p_f_tile = p_f + o_row.to(tl.int64)[None, :] * width + o_latent[:, None]
                m_store = m_row[None, :] & (o_latent < width)[:, None]
                tl.store(p_f_tile, tl.where(m_active, b_pre, 0.0), mask=m_store)


def normalised_rows(h: Tensor, normalize: str) -> Tensor:
    """Return n(h) [N, d_in], contiguous: in fp32, or h itself if nothing is normalised."""
    h = h.contiguous()
    if normalize == "none" or not len(h):
        return h
    out = torch.empty_like(h, dtype=torch.float32)
    normalise_kernel[(len(h),)](
        h, out, h.shape[1], NORMALIZE=normalize, BLOCK=1024, num_warps=4, enable_fp_fusion=False
    )
    return out


def launch_encode(
    x: Tensor,
    encoder_rows: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    k: int,
    multiply: int,
    sequences: Tensor | None = None,
    counts: Tensor | None = None,
    f: Tensor | None = None,
) -> None:
    """Add to counts [S, d_sae], or write f [N, width], for the (normalised) rows x [N, d_in]."""
    (n_rows, d_in), d_sae = x.shape, len(encoder_rows)
    launch = launch_parameters("encode", n_rows, d_in, d_sae, multiply, x.device)
    programs = n_programs(x.device, launch.programs)
    encode_kernel[(programs,)](
        x,
        encoder_rows,
        b_enc,
        threshold,
        sequences,
        counts,
        f,
        d_in,
        d_sae,
        0 if f is None else f.shape[1],
        n_rows,
        0 if counts is None else len(counts),
        programs,
        TOP_K=k > 0,
        PRECISION=multiply,
        GROUP_SIZE=GROUP_SIZE,
        **launch.kernel_options(),
    )


def row_keys(
    h: Tensor, encoder_rows: Tensor, b_enc: Tensor, threshold: Tensor, k: int, normalize: str
) -> Iterator[tuple[slice, Tensor]]:
    """Yield blocks of rows with the keys of their latents, int32 [rows, width]; each block overwrites the last.

    Keys are the bits of the values, and order like them. They are positive where a latent is active or, for top-k,
    where it could be.
    """
    x, multiply = normalised_rows(h, normalize), precision(h, encoder_rows, normalize)
    width = triton.cdiv(len(encoder_rows), ALIGN) * ALIGN
    scratch = h.new_empty(0, dtype=torch.float32)
    for rows in row_blocks(len(h), width):
        if not len(scratch):
            scratch = h.new_empty(rows.stop, width, dtype=torch.float32)
        f = scratch[: rows.stop - rows.start]
        launch_encode(x[rows], encoder_rows, b_enc, threshold, k, multiply, f=f)
        yield rows, f.view(torch.int32)
