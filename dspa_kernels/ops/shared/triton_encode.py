"""A GEMM of rows and an encoder that stores, counts or sums active latents."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dspa_kernels.formulas import row_blocks
from dspa_kernels.launch import NATIVE, launch_parameters, precision
from dspa_kernels.ops.shared.triton_grid import n_programs
from dspa_kernels.ops.shared.triton_tiles import (
    GROUP_SIZE,
    dot_tile,
    grouped_tile,
    product_tile,
    row_chunk,
    row_scale,
)

# Rows of keys have a multiple of this many numbers, so that threads can read and write 16 bytes at a time.
ALIGN = 16
# Number of keys that the program of a row reads at a time.
BLOCK = 2048
# Tiles of rows that are looked at together for a row that counts.
_TILES = tl.constexpr(16)


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
def packed(m):
    """Pack a mask [M, N] into words [M, N / 32], one bit per column, or 16 columns into one word [M, 1]."""
    BLOCK_M: tl.constexpr = m.shape[0]
    BLOCK_N: tl.constexpr = m.shape[1]
    SIZE: tl.constexpr = 32 if BLOCK_N >= 32 else BLOCK_N
    b_bit = tl.full([BLOCK_N], 1, dtype=tl.uint32) << (tl.arange(0, BLOCK_N) % SIZE).to(tl.uint32)
    b_bits = tl.where(m, b_bit[None, :], tl.zeros([1, BLOCK_N], dtype=tl.uint32))
    return tl.sum(tl.reshape(b_bits, [BLOCK_M, BLOCK_N // SIZE, SIZE]), axis=2)


@triton.jit
def n_ones(b):
    """Count the ones of each uint32. The compiler recognises this as one instruction."""
    b = b - ((b >> 1) & 0x55555555)
    b = (b & 0x33333333) + ((b >> 2) & 0x33333333)
    b = (b + (b >> 4)) & 0x0F0F0F0F
    return ((b * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def count_tile(p_counts, m_active, b_sequence, o_latent, d_sae):
    """counts_sj += number of rows n of a tile with sequence_n = s whose latent j is active.

    The mask is packed once, so that every further sequence of a tile costs one instruction per 32 rows.
    """
    b_active = packed(m_active)
    i_sequence = tl.max(b_sequence, axis=0)
    while i_sequence >= 0:
        m_sequence = b_sequence == i_sequence
        b_count = tl.sum(n_ones(b_active & packed(m_sequence[None, :])), axis=1)
        p_count = p_counts + i_sequence.to(tl.int64) * d_sae + o_latent
        tl.atomic_add(p_count, b_count, mask=b_count > 0, sem="relaxed")
        b_sequence = tl.where(m_sequence, -1, b_sequence)
        i_sequence = tl.max(b_sequence, axis=0)


@triton.jit
def sum_tile(p_sums, b_f, b_sequence, o_latent, d_sae):
    """sums_sj += f_nj over the rows n of a tile with sequence_n = s."""
    i_sequence = tl.max(b_sequence, axis=0)
    while i_sequence >= 0:
        m_sequence = b_sequence == i_sequence
        b_sum = tl.sum(tl.where(m_sequence[None, :], b_f, 0.0), axis=1)
        p_sum = p_sums + i_sequence.to(tl.int64) * d_sae + o_latent
        tl.atomic_add(p_sum, b_sum, mask=b_sum > 0, sem="relaxed")
        b_sequence = tl.where(m_sequence, -1, b_sequence)
        i_sequence = tl.max(b_sequence, axis=0)


@triton.jit
def store_bits(p_bits, b_slot, m_active, i_latent, n_words):
    """Bit i_latent + l of slot_n = 1 if m_active [N, L] is true at n and l, else 0. A negative slot is not written.

    L and i_latent are multiples of 32, so that no other tile has bits of the same words.
    """
    BLOCK_L: tl.constexpr = m_active.shape[1]
    tl.static_assert(BLOCK_L % 32 == 0, "a tile of latents that writes bits has whole words")
    o_word = i_latent // 32 + tl.arange(0, BLOCK_L // 32)
    p_word = p_bits + b_slot.to(tl.int64)[:, None] * n_words + o_word[None, :]
    tl.store(
        p_word, packed(m_active).to(tl.int32, bitcast=True), mask=(b_slot >= 0)[:, None] & (o_word < n_words)[None, :]
    )


@triton.jit
def tile_sequences(p_sequences, o_row, n_rows, n_sequences):
    """Return the sequence of each row of a tile, -1 for a row that does not count. Without sequences, all are one."""
    m_row = o_row < n_rows
    b_sequence = tl.where(m_row, 0, -1)
    if p_sequences is not None:
        b_sequence = tl.load(p_sequences + o_row, mask=m_row, other=-1)
        # Rows of a sequence that does not exist are not counted.
        b_sequence = tl.where(b_sequence < n_sequences, b_sequence, -1)
    return b_sequence


@triton.jit
def list_tiles(p_sequences, p_tiles, n_rows, n_sequences, BLOCK_N: tl.constexpr):
    """List the tiles of rows that have a row of a sequence, and return their number.

    Every program writes the same list and reads only what it has written itself.
    """
    n = 0
    for i in range(0, tl.cdiv(n_rows, BLOCK_N), _TILES):
        o_tile = i + tl.arange(0, _TILES)
        o_row = o_tile[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        b_counts = (tl.max(tile_sequences(p_sequences, o_row, n_rows, n_sequences), axis=1) >= 0).to(tl.int32)
        tl.store(p_tiles + n + tl.cumsum(b_counts, axis=0) - 1, o_tile, mask=b_counts > 0)
        n += tl.sum(b_counts, axis=0)
    tl.debug_barrier()
    return n


@triton.jit
def finish_tile(
    b_acc,
    b_sequence,
    i_latent,
    o_row,
    o_latent,
    p_b_enc,
    p_threshold,
    p_totals,
    p_bits,
    p_f,
    d_sae,
    width,
    TOP_K: tl.constexpr,
):
    """Count, sum, pack or store in a tile f_nj = pre_nj if pre_nj > max(threshold_j, 0), else 0; pre = acc + b_enc."""
    m_latent = o_latent < d_sae
    b_pre = b_acc + tl.load(p_b_enc + o_latent, mask=m_latent, other=0.0)[:, None]
    # Of latents that do not exist, pre is 0 or NaN, which no floor is below.
    b_floor = tl.zeros_like(o_latent).to(tl.float32)
    if not TOP_K:
        b_threshold = tl.load(p_threshold + o_latent, mask=m_latent, other=0.0)
        # A threshold that is NaN stays NaN, so that nothing is above it.
        b_floor = tl.maximum(b_threshold, b_floor, propagate_nan=tl.PropagateNan.ALL)
    m_active = b_pre > b_floor[:, None]
    if p_totals is not None:
        if p_totals.dtype.element_ty == tl.float32:
            sum_tile(p_totals, tl.where(m_active, b_pre, 0.0), b_sequence, o_latent, d_sae)
        else:
            count_tile(p_totals, m_active, b_sequence, o_latent, d_sae)
    elif p_bits is not None:
        store_bits(p_bits, b_sequence, tl.trans(m_active), i_latent, width)
    else:
        p_f_tile = p_f + o_row.to(tl.int64)[None, :] * width + o_latent[:, None]
        m_store = (b_sequence >= 0)[None, :] & (o_latent < width)[:, None]
        tl.store(p_f_tile, tl.where(m_active, b_pre, 0.0), mask=m_store)


@triton.jit(
    do_not_specialize=["d_sae", "n_rows", "n_sequences", "n_programs"],
    do_not_specialize_on_alignment=["p_sequences", "p_bits"],
)
def encode_kernel(
    x,
    encoder_rows,
    p_b_enc,
    p_threshold,
    p_sequences,
    p_tiles,
    p_totals,
    p_bits,
    p_f,
    d_in,
    d_sae,
    width,
    n_rows,
    n_sequences,
    n_programs,
    TOP_K: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
):
    """f_nj = pre_nj if pre_nj > 0 and pre_nj > threshold_j, else 0; top-k: if pre_nj > 0.

    With int32 totals, totals_sj += number of rows n with sequence_n = s and f_nj > 0, with fp32 ones the sum of their
    f_nj, and f is not stored. With bits, the sequence of a row is its slot s, and bit j of s = 1 if f_nj > 0, else 0.
    Tiles without a row of a sequence are skipped. x and encoder_rows are pointers or, with DESCRIPTORS, tensor
    descriptors of tiles.
    """
    n_row_tiles, n_latent_tiles = tl.cdiv(n_rows, BLOCK_N), tl.cdiv(d_sae, BLOCK_L)
    if p_tiles is not None:
        n_row_tiles = list_tiles(p_sequences, p_tiles, n_rows, n_sequences, BLOCK_N)
    n_tiles = n_row_tiles * n_latent_tiles
    if DESCRIPTORS:
        # One loop passes through the steps along d_in of all tiles of a program, so that the first loads of a tile run
        # while the tile before it is finished. This is tl.range(flatten=True), which Triton 3.6 and 3.8 do not compile
        # around the loop over sequences.
        n_steps = tl.cdiv(d_in, BLOCK_K)
        i, i_step, i_row, i_latent = tl.program_id(0) - n_programs, n_steps - 1, 0, 0
        b_acc = tl.zeros([BLOCK_L, BLOCK_N], dtype=tl.float32)
        for _ in range(tl.cdiv(n_tiles - tl.program_id(0), n_programs) * n_steps):
            i_step = tl.where(i_step == n_steps - 1, 0, i_step + 1)
            if i_step == 0:
                i += n_programs
                i_row_tile, i_latent_tile = grouped_tile(i, n_row_tiles, n_latent_tiles, GROUP_SIZE)
                if p_tiles is not None:
                    i_row_tile = tl.load(p_tiles + i_row_tile)
                i_row, i_latent = i_row_tile * BLOCK_N, i_latent_tile * BLOCK_L
            # What lies outside of a matrix is loaded as 0.
            b_w = encoder_rows.load([i_latent, i_step * BLOCK_K])
            b_x = x.load([i_row, i_step * BLOCK_K])
            b_acc = dot_tile(b_w, b_x.T, b_acc, PRECISION)
            if i_step == n_steps - 1:
                o_row, o_latent = i_row + tl.arange(0, BLOCK_N), i_latent + tl.arange(0, BLOCK_L)
                b_sequence = tile_sequences(p_sequences, o_row, n_rows, n_sequences)
                finish_tile(
                    b_acc,
                    b_sequence,
                    i_latent,
                    o_row,
                    o_latent,
                    p_b_enc,
                    p_threshold,
                    p_totals,
                    p_bits,
                    p_f,
                    d_sae,
                    width,
                    TOP_K,
                )
                b_acc = tl.zeros([BLOCK_L, BLOCK_N], dtype=tl.float32)
    else:
        for i in range(tl.program_id(0), n_tiles, n_programs):
            i_row_tile, i_latent_tile = grouped_tile(i, n_row_tiles, n_latent_tiles, GROUP_SIZE)
            i_row, i_latent = i_row_tile * BLOCK_N, i_latent_tile * BLOCK_L
            o_row, o_latent = i_row + tl.arange(0, BLOCK_N), i_latent + tl.arange(0, BLOCK_L)
            b_sequence = tile_sequences(p_sequences, o_row, n_rows, n_sequences)
            m_row, m_latent = b_sequence >= 0, o_latent < d_sae
            if tl.max(b_sequence, axis=0) >= 0:
                b_acc = product_tile(
                    encoder_rows, x, i_latent, m_latent, i_row, m_row, d_in, BLOCK_L, BLOCK_N, BLOCK_K, PRECISION
                )
                if p_f is not None:
                    # Loaded again, because fp32 tiles that are stored leave no registers to keep them.
                    b_sequence = tile_sequences(p_sequences, o_row, n_rows, n_sequences)
                finish_tile(
                    b_acc,
                    b_sequence,
                    i_latent,
                    o_row,
                    o_latent,
                    p_b_enc,
                    p_threshold,
                    p_totals,
                    p_bits,
                    p_f,
                    d_sae,
                    width,
                    TOP_K,
                )


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


def takes_descriptors(tensor: Tensor) -> bool:
    """Return True if a tensor descriptor can describe a contiguous matrix: its rows begin at multiples of 16 bytes."""
    return tensor.data_ptr() % 16 == 0 and tensor.stride(0) * tensor.element_size() % 16 == 0


def launch_encode(
    x: Tensor,
    encoder_rows: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    k: int,
    multiply: int,
    sequences: Tensor | None = None,
    n_sequences: int = 0,
    totals: Tensor | None = None,
    bits: Tensor | None = None,
    f: Tensor | None = None,
) -> None:
    """Add to totals [S, d_sae], or write bits [S, width] or f [N, width], for the (normalised) rows x [N, d_in].

    Rows without one of the S `sequences` are left out. To bits, a sequence gives one row at most.
    """
    (n_rows, d_in), d_sae = x.shape, len(encoder_rows)
    width = next((out.shape[1] for out in (bits, f) if out is not None), 0)
    # With the sums of its rows, a tile of descriptors would not fit into the registers.
    kernel = "encode" + ("+sums" if totals is not None and totals.is_floating_point() else "")
    launch = launch_parameters(kernel, n_rows, d_in, d_sae, multiply, x.device)
    programs = n_programs(x.device, launch.programs)
    operands: tuple[Any, Any] = x, encoder_rows
    descriptors = launch.descriptors and multiply == NATIVE and all(map(takes_descriptors, operands))
    if descriptors:
        blocks = [launch.BLOCK_N, launch.BLOCK_K], [launch.BLOCK_L, launch.BLOCK_K]
        operands = tuple(map(TensorDescriptor.from_tensor, operands, blocks))
    n_tiles = triton.cdiv(n_rows, launch.BLOCK_N)
    tiles = x.new_empty(n_tiles, dtype=torch.int32) if descriptors and sequences is not None else None
    encode_kernel[(programs,)](
        *operands,
        b_enc,
        threshold,
        sequences,
        tiles,
        totals,
        bits,
        f,
        d_in,
        d_sae,
        width,
        n_rows,
        n_sequences,
        programs,
        TOP_K=k > 0,
        PRECISION=multiply,
        DESCRIPTORS=descriptors,
        GROUP_SIZE=GROUP_SIZE,
        **launch.kernel_options(),
    )


def row_keys(
    h: Tensor,
    encoder_rows: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    k: int,
    normalize: str,
    sequences: Tensor | None = None,
    n_sequences: int = 0,
) -> Iterator[tuple[slice, Tensor]]:
    """Yield blocks of rows with the keys of their latents, int32 [rows, width]; each block overwrites the last.

    Those of rows without a sequence are undefined if there are `sequences`.

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
        own = None if sequences is None else sequences[rows]
        launch_encode(x[rows], encoder_rows, b_enc, threshold, k, multiply, own, n_sequences, f=f)
        yield rows, f.view(torch.int32)
