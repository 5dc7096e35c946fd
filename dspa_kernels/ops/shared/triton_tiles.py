"""Shared by the Triton kernels: normalised rows, tiles of products, the order of tiles."""

from __future__ import annotations

import triton
import triton.language as tl

from dspa_kernels.launch import NATIVE, SPLIT

# Number of latent tiles that all row tiles pass through before the next ones.
GROUP_SIZE = 16

# Under TRITON_INTERPRET=1 kernels run on CPU tensors, one program after the other. The interpreter's bf16 products are
# wrong, so operands are converted to fp32 there. The GPU multiplies them in bf16 and accumulates in fp32.
INTERPRETED = bool(triton.knobs.runtime.interpret)
UPCAST = tl.constexpr(INTERPRETED)

_NATIVE, _SPLIT = tl.constexpr(NATIVE), tl.constexpr(SPLIT)


@triton.jit
def rounded(b_x, dtype: tl.constexpr):
    """Return fp32 values rounded to `dtype`, to nearest, ties to even. The interpreter would truncate to bf16."""
    if UPCAST and dtype == tl.bfloat16:
        b_bits = b_x.to(tl.int32, bitcast=True)
        b_bits = b_bits + 32767 + ((b_bits >> 16) & 1)
        b_x = tl.where(b_x == b_x, (b_bits & -65536).to(tl.float32, bitcast=True), b_x)
    return b_x.to(dtype)


@triton.jit
def row_chunk(p_row, i_k, o_k, d_in, b_mean, b_divisor, NORMALIZE: tl.constexpr):
    """n(h) = (h - mean) / divisor at columns i_k + o_k of one row, in fp32, with 0 after its end."""
    m_k = o_k < d_in - i_k
    b_x = tl.load(p_row + i_k + o_k, mask=m_k, other=0.0).to(tl.float32)
    if NORMALIZE != "none":
        b_x = tl.where(m_k, tl.div_rn(b_x - b_mean, b_divisor), 0.0)
    return b_x


@triton.jit
def row_scale(p_row, d_in, NORMALIZE: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return mean, divisor and scale of one row: n(h) = (h - mean) / divisor, and an edit is multiplied by scale.

    layer_norm: divisor = std + 1e-5, scale = std. constant_norm_rescale: divisor = scale = ||h|| / sqrt(d_in).
    none: divisor = scale = 1.
    """
    o_k = tl.arange(0, BLOCK_K)
    b_mean = tl.zeros([], dtype=tl.float32)
    b_scale = b_mean + 1.0
    b_divisor = b_scale
    if NORMALIZE == "layer_norm":
        b_sum = tl.zeros([BLOCK_K], dtype=tl.float32)
        for i_k in range(0, d_in, BLOCK_K):
            b_sum += row_chunk(p_row, i_k, o_k, d_in, b_mean, b_divisor, "none")
        b_mean = tl.div_rn(tl.sum(b_sum, axis=0), tl.cast(d_in, tl.float32))
    if NORMALIZE != "none":
        b_square = tl.zeros([BLOCK_K], dtype=tl.float32)
        for i_k in range(0, d_in, BLOCK_K):
            b_x = row_chunk(p_row, i_k, o_k, d_in, b_mean, b_divisor, "none")
            b_x = tl.where(o_k < d_in - i_k, b_x - b_mean, 0.0)
            b_square += b_x * b_x
        if NORMALIZE == "layer_norm":
            b_scale = tl.sqrt_rn(tl.div_rn(tl.sum(b_square, axis=0), tl.cast(d_in - 1, tl.float32)))
            b_divisor = b_scale + 1e-5
        else:
            b_scale = tl.sqrt_rn(tl.div_rn(tl.sum(b_square, axis=0), tl.cast(d_in, tl.float32)))
            b_divisor = b_scale
    return b_mean, b_divisor, b_scale


@triton.jit
def dot_tile(b_w, b_x, b_acc, PRECISION: tl.constexpr):
    """acc[l, n] += sum_k w[l, k] x[k, n], in fp32."""
    if PRECISION == _NATIVE:
        if UPCAST:
            b_w, b_x = b_w.to(tl.float32), b_x.to(tl.float32)
        b_acc = tl.dot(b_w.to(b_x.dtype), b_x, b_acc, input_precision="ieee")
    elif PRECISION == _SPLIT:
        b_w = b_w.to(tl.bfloat16)
        b_remainder = b_x.to(tl.float32)
        for _ in tl.static_range(3):
            b_part = b_remainder.to(tl.bfloat16)
            b_remainder -= b_part.to(tl.float32)
            if UPCAST:
                b_acc = tl.dot(b_w.to(tl.float32), b_part.to(tl.float32), b_acc, input_precision="ieee")
            else:
                b_acc = tl.dot(b_w, b_part, b_acc)
    else:
        b_acc = tl.dot(b_w.to(tl.float32), b_x.to(tl.float32), b_acc, input_precision="ieee")
    return b_acc


@triton.jit
def tile_product(
    p_w,
    p_x,
    m_latent,
    m_row,
    d_in,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc[l, n] = sum_k w[l, k] x[k, n], [BLOCK_L, BLOCK_N] fp32, where p_w [L, K] and p_x [K, N] begin the rows.

    The weights are the first operand, so that 16 rows fill the narrow side of a tensor-core tile. An element is summed
    in the order of k within steps of BLOCK_K, whatever the other block sizes are, so its bits depend only on its row,
    its latent and BLOCK_K. Latents outside of `m_latent` and rows outside of `m_row` are not read.
    """
    o_k = tl.arange(0, BLOCK_K)
    b_acc = tl.zeros([BLOCK_L, BLOCK_N], dtype=tl.float32)
    for i_k in range(0, d_in, BLOCK_K):
        m_k = o_k < d_in - i_k
        b_w = tl.load(p_w + i_k, mask=m_latent[:, None] & m_k[None, :], other=0.0)
        b_x = tl.load(p_x + i_k, mask=m_row[None, :] & m_k[:, None], other=0.0)
        b_acc = dot_tile(b_w, b_x, b_acc, PRECISION)
    return b_acc


@triton.jit
def row_pointers(p_x, i_row, d_in, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return pointers [K, N] to the first numbers of the rows from i_row on."""
    # Offsets within a tile fit into 32 bits, which halves the registers for addresses.
    o_n, o_k = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    return p_x + tl.cast(i_row, tl.int64) * d_in + (o_n[None, :] * d_in + o_k[:, None])


@triton.jit
def product_tile(
    p_W,
    p_x,
    i_latent,
    m_latent,
    i_row,
    m_row,
    d_in,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc[l, n] = sum_k W[i_latent + l, k] x[i_row + n, k], as in `tile_product`."""
    o_l, o_k = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_K)
    p_w = p_W + tl.cast(i_latent, tl.int64) * d_in + (o_l[:, None] * d_in + o_k[None, :])
    p_x = row_pointers(p_x, i_row, d_in, BLOCK_N, BLOCK_K)
    return tile_product(p_w, p_x, m_latent, m_row, d_in, BLOCK_L, BLOCK_N, BLOCK_K, PRECISION)


@triton.jit
def gathered_tile(
    p_W,
    p_x,
    o_latent,
    m_latent,
    i_row,
    m_row,
    d_in,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc[l, n] = sum_k W[o_latent[l], k] x[i_row + n, k], as in `tile_product`."""
    p_w = p_W + o_latent.to(tl.int64)[:, None] * d_in + tl.arange(0, BLOCK_K)[None, :]
    p_x = row_pointers(p_x, i_row, d_in, BLOCK_N, BLOCK_K)
    return tile_product(p_w, p_x, m_latent, m_row, d_in, BLOCK_L, BLOCK_N, BLOCK_K, PRECISION)


@triton.jit
def tree_sum(b, LOG_N: tl.constexpr):
    """Sum b [2^LOG_N, M] over its first axis, halves with halves: the same bits for any M and any layout."""
    for _ in tl.static_range(LOG_N):
        b = tl.sum(tl.reshape(b, [2, b.shape[0] // 2, b.shape[1]]), axis=0)
    return tl.reshape(b, [b.shape[1]])


@triton.jit
def grouped_tile(i, n_row_tiles, n_latent_tiles, GROUP_SIZE: tl.constexpr):
    """Return the i-th row tile and latent tile: all row tiles for GROUP_SIZE latent tiles, then for the next.

    The weights of a group stay in the cache while the rows pass.
    """
    i_first = i // (GROUP_SIZE * n_row_tiles) * GROUP_SIZE
    i_within = i % (GROUP_SIZE * n_row_tiles)
    n_latents = tl.minimum(n_latent_tiles - i_first, GROUP_SIZE)
    return i_within // n_latents, i_first + i_within % n_latents
