"""What the Triton kernels share: normalised rows, one tile of products, the grid barrier."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dspa_kernels.launch import NATIVE, SPLIT

# Under TRITON_INTERPRET=1 kernels run on CPU tensors, program after program. Its bf16 products are wrong, so
# operands are widened there; the GPU multiplies them as they are and sums in fp32 too.
INTERPRETED = bool(triton.knobs.runtime.interpret)
UPCAST = tl.constexpr(INTERPRETED)

_NATIVE, _SPLIT = tl.constexpr(NATIVE), tl.constexpr(SPLIT)


def n_programs(device: torch.device, per_multiprocessor: int) -> int:
    """Programs of a persistent grid: as many as run at one time; three in the interpreter."""
    if INTERPRETED:
        return 3
    return per_multiprocessor * torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def rounded(b_x, dtype: tl.constexpr):
    """b_x fp32 in `dtype`, to the nearest, ties to even; the interpreter would cut bf16 off."""
    if UPCAST and dtype == tl.bfloat16:
        b_bits = b_x.to(tl.int32, bitcast=True)
        b_bits = b_bits + 32767 + ((b_bits >> 16) & 1)
        b_x = tl.where(b_x == b_x, (b_bits & -65536).to(tl.float32, bitcast=True), b_x)
    return b_x.to(dtype)


@triton.jit
def row_chunk(p_row, i_k, o_k, d_in, b_mean, b_divisor, NORMALIZE: tl.constexpr):
    """n(h) at i_k + o_k of one row in fp32, 0 beyond its end: (h - mean) / divisor."""
    m_k = o_k < d_in - i_k
    b_x = tl.load(p_row + i_k + o_k, mask=m_k, other=0.0).to(tl.float32)
    if NORMALIZE != "none":
        b_x = tl.where(m_k, tl.div_rn(b_x - b_mean, b_divisor), 0.0)
    return b_x


@triton.jit
def row_scale(p_row, d_in, NORMALIZE: tl.constexpr, BLOCK_K: tl.constexpr):
    """mean, divisor and scale of one row: `n(h) = (h - mean) / divisor`, and an edit is multiplied by scale.

    layer_norm: divisor std + 1e-5, scale std; constant_norm_rescale: both ||h|| / sqrt(d_in); none: both 1.
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
    """acc[l, n] + sum_k w[l, k] x[k, n], in fp32."""
    if PRECISION == _NATIVE:
        if UPCAST:
            b_w, b_x = b_w.to(tl.float32), b_x.to(tl.float32)
        b_acc = tl.dot(b_w.to(b_x.dtype), b_x, b_acc, input_precision="ieee")
    elif PRECISION == _SPLIT:
        b_w = b_w.to(tl.bfloat16)
        b_rest = b_x.to(tl.float32)
        for _ in tl.static_range(3):
            b_part = b_rest.to(tl.bfloat16)
            b_rest -= b_part.to(tl.float32)
            if UPCAST:
                b_acc = tl.dot(b_w.to(tl.float32), b_part.to(tl.float32), b_acc, input_precision="ieee")
            else:
                b_acc = tl.dot(b_w, b_part, b_acc)
    else:
        b_acc = tl.dot(b_w.to(tl.float32), b_x.to(tl.float32), b_acc, input_precision="ieee")
    return b_acc


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
    """acc[l, n] = sum_k W[i_latent + l, k] x[i_row + n, k], [BLOCK_L, BLOCK_N] fp32.

    The weights are the first operand: sixteen rows fill a tensor-core tile whose other side is latents.
    Whatever the blocks, an element is summed in the order of k, so its bits depend on its row and latent alone.
    Latents outside of `m_latent` are not read.
    """
    o_k = tl.arange(0, BLOCK_K)
    # Offsets within a tile fit 32 bits, which halves the registers that addresses take.
    p_w = p_W + tl.cast(i_latent, tl.int64) * d_in + (tl.arange(0, BLOCK_L)[:, None] * d_in + o_k[None, :])
    p_r = p_x + tl.cast(i_row, tl.int64) * d_in + (tl.arange(0, BLOCK_N)[None, :] * d_in + o_k[:, None])
    b_acc = tl.zeros([BLOCK_L, BLOCK_N], dtype=tl.float32)
    for i_k in range(0, d_in, BLOCK_K):
        m_k = o_k < d_in - i_k
        b_w = tl.load(p_w + i_k, mask=m_latent[:, None] & m_k[None, :], other=0.0)
        b_x = tl.load(p_r + i_k, mask=m_row[None, :] & m_k[:, None], other=0.0)
        b_acc = dot_tile(b_w, b_x, b_acc, PRECISION)
    return b_acc


@triton.jit
def tree_sum(b, LOG_N: tl.constexpr):
    """Sum over the first axis of b [2^LOG_N, M], halves with halves: the same bits whatever M and the layout are."""
    for _ in tl.static_range(LOG_N):
        b = tl.sum(tl.reshape(b, [2, b.shape[0] // 2, b.shape[1]]), axis=0)
    return tl.reshape(b, [b.shape[1]])


@triton.jit
def grid_arrive(p_barrier, n_programs):
    """Announce, after everything this program wrote, that it came this far; returns what to wait on.

    The first program adds what turns the word's sign once all have come, and leaves its other bits as they
    were: two arrivals leave the word as it was found, and nothing has to be reset.
    """
    # Without it a warp's stores could still be on their way when another warp's atomic tells of them.
    tl.debug_barrier()
    b_step = tl.where(tl.program_id(0) == 0, -2147483648 - (n_programs - 1), 1)
    return tl.atomic_add(p_barrier, b_step.to(tl.int32), sem="acq_rel", scope="gpu")


@triton.jit
def grid_wait(p_barrier, b_ticket):
    """Wait until all programs have arrived. The launch has to be cooperative."""
    # Plain loads look for the sign to turn; one atomic then makes what the others wrote visible. It compares with
    # and stores the same value, since to add 0 is optimised away, and the acquire with it.
    while (tl.load(p_barrier, volatile=True) ^ b_ticket) >= 0:
        pass
    tl.atomic_cas(p_barrier, b_ticket, b_ticket, sem="acquire", scope="gpu")
    tl.debug_barrier()
