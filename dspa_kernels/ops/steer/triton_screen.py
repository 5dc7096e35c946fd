"""The screen of `steer`: an int5 copy of the encoder is read first, and of the encoder only what could matter.

`dspa_kernels/screen.py` defines the copy and proves the bounds. A first pass over the copy finds candidates and lower
bounds on the maxima of rows. After a grid barrier, a second pass evaluates those candidates that the bounds of all
programs leave.
"""

import triton
import triton.language as tl
from triton.language.target_info import current_target

from dspa_kernels.launch import NATIVE, SPLIT
from dspa_kernels.ops.shared.triton_tiles import UPCAST, dot_tile, gathered_tile
from dspa_kernels.ops.steer.triton_select import BLOCK_G
from dspa_kernels.ops.steer.triton_stream import raise_maxima, running_maxima, unsettled_rows, update_rows
from dspa_kernels.screen import BLOCK, BLOCK_BYTES, ROUNDING, SPLIT_ROUNDING

_NATIVE, _SPLIT, _BLOCK_G = tl.constexpr(NATIVE), tl.constexpr(SPLIT), tl.constexpr(BLOCK_G)
_BLOCK, _BLOCK_BYTES = tl.constexpr(BLOCK), tl.constexpr(BLOCK_BYTES)
_ROUNDING, _SPLIT_ROUNDING = tl.constexpr(ROUNDING), tl.constexpr(SPLIT_ROUNDING)


@triton.constexpr_function
def is_hopper():
    """Return True if a kernel is compiled for a GPU with wgmma."""
    target = current_target()
    return target is not None and target.arch // 10 == 9


@triton.constexpr_function
def unpacking(bit, fp16):
    """Return PTX for four numbers q, two to a register, from four bytes of nibbles and four of fifth bits.

    The bits of a code below those of 2^7 in bf16, or of 2^10 in fp16, make that number plus the code.
    """
    upper, unit, bias, dtype = (0x64, 0x3C00, 0xE410, "f16x2") if fp16 else (0x43, 0x3F80, 0xC310, "bf16x2")
    shift = f"shl.b32 r_fifth, $3, {4 - bit};" if bit < 4 else f"shr.b32 r_fifth, $3, {bit - 4};"
    return f"""{{
        .reg .b32 r_fifth, r_code, r_upper, r_unit, r_bias;
        mov.b32 r_upper, {upper:#x};
        mov.b32 r_unit, {unit << 16 | unit:#x};
        mov.b32 r_bias, {bias << 16 | bias:#x};
        {shift}
        shr.b32 r_code, $2, {bit // 4 * 4};
        and.b32 r_code, r_code, 0x0f0f0f0f;
        lop3.b32 r_code, r_fifth, 0x10101010, r_code, 0xea;
        prmt.b32 $0, r_code, r_upper, 0x4140;
        prmt.b32 $1, r_code, r_upper, 0x4342;
        fma.rn.{dtype} $0, $0, r_unit, r_bias;
        fma.rn.{dtype} $1, $1, r_unit, r_bias;
    }}"""


@triton.jit
def unpacked(b_nibbles, b_plane, bit: tl.constexpr, FP16: tl.constexpr):
    """q = (nibble | fifth bit << 4) - 16 of a tile, exact in 16 bits: high nibbles from bit 4 on."""
    if UPCAST:
        b_code = ((b_nibbles >> (bit // 4 * 4)) & 15) | (((b_plane >> bit) & 1) << 4)
        b_q = b_code.to(tl.float32) - 16
    elif FP16:
        b_q = tl.inline_asm_elementwise(
            unpacking(bit, True), "=r,=r,r,r", [b_nibbles, b_plane], dtype=tl.float16, is_pure=True, pack=4
        )
    else:
        b_q = tl.inline_asm_elementwise(
            unpacking(bit, False), "=r,=r,r,r", [b_nibbles, b_plane], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    return b_q


@triton.jit
def quantised_product(
    p_rows,
    p_x,
    i_latent,
    m_latent,
    m_row,
    d_in,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc[l, n] = sum_k q[i_latent + l, k] x[n, k], [BLOCK_L, BLOCK_N] fp32, for the packed rows of q.

    A product has 64 numbers: 32 low nibbles of a block and 32 high ones, with one bit each of its plane. wgmma takes
    weights from registers if a thread has numbers 2 t, 2 t + 1, 8 + 2 t, ..: there the numbers of weights and rows are
    reordered alike, so that a thread loads eight bytes in a row.
    """
    REORDERED: tl.constexpr = is_hopper()
    FP16: tl.constexpr = PRECISION == _NATIVE and p_x.dtype.element_ty == tl.float16
    o_byte, o_c = tl.arange(0, 32), tl.arange(0, 64)
    o_k = o_c % 32
    if REORDERED:
        o_k = o_c // 2 % 4 * 8 + o_c // 8 % 4 * 2 + o_c % 2
    o_k += o_c // 32 * (_BLOCK // 2)
    n_blocks = tl.cdiv(d_in, _BLOCK)
    stride = n_blocks * _BLOCK_BYTES
    p_tile = p_rows + tl.cast(i_latent, tl.int64) * stride + (tl.arange(0, BLOCK_L)[:, None] * stride + o_byte[None, :])
    p_x_tile = p_x + (tl.arange(0, BLOCK_N)[None, :] * d_in + o_k[:, None])
    b_acc = tl.zeros([BLOCK_L, BLOCK_N], dtype=tl.float32)
    for i_block in range(n_blocks):
        p_block = p_tile + i_block * _BLOCK_BYTES
        b_plane = tl.load(p_block + _BLOCK // 2, mask=m_latent[:, None], other=0)
        for j in tl.static_range(4):
            i_k = i_block * _BLOCK + 32 * j
            b_x = tl.load(p_x_tile + i_k, mask=m_row[None, :] & (o_k < d_in - i_k)[:, None], other=0.0)
            b_nibbles = tl.load(p_block + 32 * j, mask=m_latent[:, None], other=0)
            b_q = tl.join(unpacked(b_nibbles, b_plane, j, FP16), unpacked(b_nibbles, b_plane, j + 4, FP16))
            if REORDERED:
                b_q = tl.permute(tl.reshape(b_q, [BLOCK_L, 4, 4, 2, 2]), [0, 4, 2, 1, 3])
            else:
                b_q = tl.permute(b_q, [0, 2, 1])
            b_acc = dot_tile(tl.reshape(b_q, [BLOCK_L, 64]), b_x, b_acc, PRECISION)
    return b_acc


@triton.jit
def screen_tile(
    p_x,
    encoder,
    screen,
    scratch,
    i_latent,
    m_waiting,
    summary,
    d_in,
    d_sae,
    n_rows,
    SETTLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """U, L = z + E, z - E around the pre-activations of a tile of latents, for the rows that are not settled.

    screen_bound_n = max of L_nj over the latents j that are active for certain, and a latent is a candidate if U may be
    the maximum of a row or, for top-k, ahead of a selected latent. Candidates are appended with their U.
    """
    TOP_K: tl.constexpr = scratch.rank is not None
    o_latent, o_row = i_latent + tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_N)
    b_bound = running_maxima(scratch.screen_bound, 0, m_waiting, BLOCK_N)
    m_unsettled = unsettled_rows(m_waiting, summary, b_bound, SETTLE)
    if tl.max(m_unsettled.to(tl.int32), axis=0) > 0:
        m_latent = o_latent < d_sae
        b_z = quantised_product(screen.rows, p_x, i_latent, m_latent, m_unsettled, d_in, BLOCK_L, BLOCK_N, PRECISION)
        p_number = screen.latents + o_latent
        b_scale = tl.load(p_number, mask=m_latent, other=0.0)
        b_offset = tl.load(p_number + d_sae, mask=m_latent, other=0.0)
        b_slack = tl.load(p_number + 2 * d_sae, mask=m_latent, other=0.0)
        b_error = tl.load(p_number + 3 * d_sae, mask=m_latent, other=0.0)
        b_size = tl.load(p_number + 4 * d_sae, mask=m_latent, other=0.0)
        b_threshold = tl.load(encoder.threshold + o_latent, mask=m_latent, other=0.0)
        b_centered_norm = tl.load(scratch.norms + 2 * o_row, mask=m_unsettled, other=0.0)
        b_norm = tl.load(scratch.norms + 2 * o_row + 1, mask=m_unsettled, other=0.0)
        b_norm *= (d_in + 32) * (_SPLIT_ROUNDING if PRECISION == _SPLIT else _ROUNDING)
        b_z = b_z * b_scale[:, None] + b_offset[:, None]
        b_E = b_slack[:, None] + b_error[:, None] * b_centered_norm[None, :] + b_size[:, None] * b_norm[None, :]
        b_upper = b_z + b_E
        # A NaN bounds nothing: comparisons with it are false.
        if TOP_K:
            m_excluded = b_upper < summary.min_active[None, :]
        else:
            b_lower = b_z - b_E
            m_certain = m_latent[:, None] & (b_lower > tl.maximum(b_threshold, 0.0)[:, None])
            raise_maxima(scratch.screen_bound, o_row, m_unsettled, tl.max(tl.where(m_certain, b_lower, 0.0), axis=0))
            # By now other programs may have raised it, too.
            b_bound = running_maxima(scratch.screen_bound, 0, m_waiting, BLOCK_N)
            m_excluded = b_upper < b_bound[None, :]
            m_excluded = m_excluded | (b_upper <= tl.maximum(summary.lower_bound[None, :], b_threshold[:, None]))
        m_candidate = m_latent[:, None] & m_unsettled[None, :] & (m_excluded == 0)
        b_is_candidate = tl.max(m_candidate.to(tl.int32), axis=1)
        n_candidates = tl.sum(b_is_candidate, axis=0)
        if n_candidates > 0:
            i_first = tl.atomic_add(scratch.n_candidates, n_candidates, sem="relaxed")
            o_position = i_first + tl.cumsum(b_is_candidate, axis=0) - 1
            tl.store(scratch.candidates + o_position, o_latent, mask=b_is_candidate > 0)
            b_upper = tl.where(m_candidate, tl.where(b_upper == b_upper, b_upper, float("inf")), float("-inf"))
            m_upper = (b_is_candidate > 0)[:, None] & (o_row < n_rows)[None, :]
            tl.store(scratch.upper + o_position[:, None] * n_rows + o_row[None, :], b_upper, mask=m_upper)


@triton.jit
def evaluate_candidates(
    p_x,
    encoder,
    columns,
    p_slots,
    scratch,
    i_first,
    n_latents,
    b_state,
    m_waiting,
    summary,
    d_in,
    n_rows,
    n_slots,
    SETTLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """running_max_n = max(running_max_n, f_nj) over n_latents candidates j from i_first on, as `stream_tile`.

    Returns the number of encoder rows that were read: those whose U is not below the final bound of a row.
    """
    o_c, o_row = tl.arange(0, _BLOCK_G), tl.arange(0, BLOCK_N)
    b_bound = running_maxima(scratch.screen_bound, 0, m_waiting, BLOCK_N)
    m_unsettled = unsettled_rows(m_waiting, summary, b_bound, SETTLE)
    m_candidate = o_c < n_latents
    # Other programs wrote these.
    o_latent = tl.load(scratch.candidates + i_first + o_c, mask=m_candidate, other=0, cache_modifier=".cg")
    b_upper = tl.load(
        scratch.upper + (i_first + o_c)[:, None] * n_rows + o_row[None, :],
        mask=m_candidate[:, None] & m_unsettled[None, :],
        other=float("-inf"),
        cache_modifier=".cg",
    )
    m_latent = m_candidate & (tl.max((b_upper >= b_bound[None, :]).to(tl.int32), axis=1) > 0)
    n_read = tl.sum(m_latent.to(tl.int32), axis=0)
    if n_read > 0:
        b_pre = gathered_tile(
            encoder.rows, p_x, o_latent, m_latent, 0, m_unsettled, d_in, _BLOCK_G, BLOCK_N, BLOCK_K, PRECISION
        )
        update_rows(b_pre, encoder, columns, p_slots, scratch, o_latent, m_latent, o_row, m_unsettled, b_state, n_slots)
    return n_read
