"""The kernels of `fsrl_residual`: what an adapter moves, tile by tile, forward and backward."""

import triton
import triton.language as tl

from dspa_kernels.ops.fsrl_residual.codes import DOWN, IDLE, NEAR, OFF, UP
from dspa_kernels.ops.shared.triton_grid import grid_arrive, grid_wait
from dspa_kernels.ops.shared.triton_ranks import count_above, kth_largest
from dspa_kernels.ops.shared.triton_tiles import dot_tile, grouped_tile, product_tile, rounded

# Where the latents of the encoder are needed: nowhere, where v < 0, and where a threshold is near as well.
NOWHERE, BELOW, NEARBY = range(3)
_NOWHERE, _NEARBY = tl.constexpr(NOWHERE), tl.constexpr(NEARBY)
_UP, _DOWN, _OFF, _IDLE, _NEAR = (tl.constexpr(code) for code in (UP, DOWN, OFF, IDLE, NEAR))
# The interpreter runs programs one after the other, so that each phase is a launch of its own there.
MOVE, SUM, ALL = range(3)
_MOVE, _SUM, _ALL = tl.constexpr(MOVE), tl.constexpr(SUM), tl.constexpr(ALL)
SIZES = ("d_sae", "n_rows", "n_programs")


@triton.jit
def within_cut(b_value, p_cut, o_row, m_row, o_latent, n_rows):
    """Where a value >= 0 [L, N] is above the level of its row, or at it and no later than the last latent that is.

    That last one is inside whatever its bits are: a launch of other blocks, which found it, may round it differently.
    """
    b_level = tl.load(p_cut + o_row, mask=m_row, other=0)[None, :]
    b_last = tl.load(p_cut + n_rows + o_row, mask=m_row, other=-1)[None, :]
    b_key = b_value.to(tl.int32, bitcast=True)
    b_latent = o_latent[:, None]
    return (b_key > b_level) | ((b_key == b_level) & (b_latent < b_last)) | (b_latent == b_last)


@triton.jit
def moved_tile(
    p_h,
    p_x,
    p_encoder_rows,
    p_b_enc,
    p_sae_threshold,
    p_rank,
    p_W_a,
    p_b_a,
    p_threshold,
    p_mask,
    p_top,
    i_latent,
    i_row,
    d_in,
    d_sae,
    n_rows,
    bandwidth,
    ACTIVATION: tl.constexpr,
    LATENTS: tl.constexpr,
    ADAPTER: tl.constexpr,
    ENCODER: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """v = act(h W_a^T + b_a) of a tile [L, N], 0 where it is not kept; f where it matters; where u is near a jump.

    Comparisons are such that a NaN of u is one of v.

    LATENTS says where f is needed: where v < 0, or also where |u - threshold| <= bandwidth / 2. Only those rows of the
    encoder are read for which that is so on some row of the tile.
    """
    o_latent, o_row = i_latent + tl.arange(0, BLOCK_L), i_row + tl.arange(0, BLOCK_N)
    m_row, m_latent = o_row < n_rows, o_latent < d_sae
    if p_mask is not None:
        m_latent = tl.load(p_mask + o_latent, mask=m_latent, other=0) != 0
    b_u = product_tile(p_W_a, p_h, i_latent, m_latent, i_row, m_row, d_in, BLOCK_L, BLOCK_N, BLOCK_K, ADAPTER)
    b_u += tl.load(p_b_a + o_latent, mask=m_latent, other=0.0)[:, None]
    m_tile = m_latent[:, None] & m_row[None, :]
    b_u = tl.where(m_tile, b_u, 0.0)
    m_near = m_tile & False
    if ACTIVATION == "relu":
        b_v = tl.where(b_u <= 0, 0.0, b_u)
    else:
        b_threshold = tl.load(p_threshold + o_latent, mask=m_latent, other=0.0)[:, None]
        if ACTIVATION == "jumprelu":
            b_v = tl.where(b_u <= b_threshold, 0.0, b_u)
            if LATENTS == _NEARBY:
                m_near = m_tile & (tl.abs(b_u - b_threshold) <= bandwidth / 2)
        else:
            b_v = tl.where(tl.abs(b_u) <= b_threshold, 0.0, b_u - tl.where(b_u > 0, b_threshold, -b_threshold))
    if p_top is not None:
        m_top = within_cut(tl.abs(b_v), p_top, o_row, m_row, o_latent, n_rows)
        b_v = tl.where(m_top, b_v, 0.0)
        m_near = m_near & m_top
    b_f = tl.zeros([BLOCK_L, BLOCK_N], dtype=tl.float32)
    if LATENTS != _NOWHERE:
        m_matters = (b_v < 0) | m_near
        m_read = tl.max(m_matters.to(tl.int32), axis=1) > 0
        if tl.max(m_read.to(tl.int32), axis=0) > 0:
            b_pre = product_tile(
                p_encoder_rows, p_x, i_latent, m_read, i_row, m_row, d_in, BLOCK_L, BLOCK_N, BLOCK_K, ENCODER
            )
            b_pre += tl.load(p_b_enc + o_latent, mask=m_read, other=0.0)[:, None]
            m_active = m_matters & (b_pre > 0)
            if p_rank is not None:
                m_active = m_active & within_cut(tl.maximum(b_pre, 0.0), p_rank, o_row, m_row, o_latent, n_rows)
            else:
                m_active = m_active & (b_pre > tl.load(p_sae_threshold + o_latent, mask=m_read, other=0.0)[:, None])
            b_f = tl.where(m_active, b_pre, 0.0)
    return b_v, b_f, m_near


@triton.jit
def changed(b_v, b_f):
    """c = ReLU(f + v) - f, which is v wherever v >= 0."""
    return tl.where(b_v < 0, tl.maximum(b_v, -b_f), b_v)


@triton.jit
def store_codes(p_codes, d_codes, o_row, m_row, o_latent, d_sae, b_v, b_f, m_near):
    """What became of each latent of a tile [L, N], as `codes.py` has it."""
    m_on = b_f + b_v > 0
    b_code = tl.where(m_on, _DOWN, tl.where(b_f > 0, _OFF, _IDLE))
    b_code = tl.where(b_v > 0, _UP, tl.where(b_v < 0, b_code, 0)) + tl.where(m_near & m_on, _NEAR, 0)
    p_place = p_codes + o_row.to(tl.int64)[None, :] * d_codes + o_latent[:, None]
    tl.store(p_place, b_code.to(tl.uint8), mask=m_row[None, :] & (o_latent < d_sae)[:, None])


@triton.jit(do_not_specialize=SIZES)
def change_kernel(
    p_h,
    p_x,
    p_encoder_rows,
    p_b_enc,
    p_sae_threshold,
    p_rank,
    p_W_a,
    p_b_a,
    p_threshold,
    p_mask,
    p_top,
    p_c,
    p_l1,
    p_l0,
    p_codes,
    bandwidth,
    d_codes,
    d_in,
    d_sae,
    width,
    n_rows,
    n_programs,
    SIZE: tl.constexpr,
    LATENTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ADAPTER: tl.constexpr,
    ENCODER: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
):
    """c_nj = ReLU(f_nj + v_nj) - f_nj, or with SIZE |v_nj|, 0 in columns beyond d_sae; and for each tile of latents the
    sums over it of |v_nj| and of v_nj != 0. Codes for the backward where there is a place for them."""
    n_row_tiles, n_latent_tiles = tl.cdiv(n_rows, BLOCK_N), tl.cdiv(d_sae, BLOCK_L)
    for i in range(tl.program_id(0), n_row_tiles * n_latent_tiles, n_programs):
        i_row_tile, i_latent_tile = grouped_tile(i, n_row_tiles, n_latent_tiles, GROUP_SIZE)
        i_row, i_latent = i_row_tile * BLOCK_N, i_latent_tile * BLOCK_L
        o_row, o_latent = i_row + tl.arange(0, BLOCK_N), i_latent + tl.arange(0, BLOCK_L)
        m_row = o_row < n_rows
        b_v, b_f, m_near = moved_tile(
            p_h,
            p_x,
            p_encoder_rows,
            p_b_enc,
            p_sae_threshold,
            p_rank,
            p_W_a,
            p_b_a,
            p_threshold,
            p_mask,
            p_top,
            i_latent,
            i_row,
            d_in,
            d_sae,
            n_rows,
            bandwidth,
            ACTIVATION,
            LATENTS,
            ADAPTER,
            ENCODER,
            BLOCK_N,
            BLOCK_L,
            BLOCK_K,
        )
        b_size = tl.abs(b_v)
        b_c = b_size if SIZE else changed(b_v, b_f)
        p_place = p_c + o_row.to(tl.int64)[None, :] * width + o_latent[:, None]
        m_place = m_row[None, :] & (o_latent < width)[:, None]
        tl.store(p_place, rounded(b_c, p_c.dtype.element_ty), mask=m_place)
        if p_codes is not None:
            store_codes(p_codes, d_codes, o_row, m_row, o_latent, d_sae, b_v, b_f, m_near)
        p_sum = i_latent_tile.to(tl.int64) * n_rows + o_row
        tl.store(p_l1 + p_sum, tl.sum(b_size, axis=0), mask=m_row)
        tl.store(p_l0 + p_sum, tl.sum((b_v != 0).to(tl.int32), axis=0), mask=m_row)


@triton.jit(do_not_specialize=SIZES)
def gradient_kernel(
    p_grad,
    p_grad_l1,
    p_codes,
    p_W_dec,
    p_threshold,
    p_du,
    p_df,
    p_db_a,
    p_dthreshold,
    bandwidth,
    d_codes,
    d_in,
    d_sae,
    width,
    n_rows,
    n_programs,
    JUMPS: tl.constexpr,
    DECODER: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
):
    """With g the gradient of h': dc = g W_dec^T; dv = dc [f + v > 0] + dl1 sign(v); du = dv where v is not 0; df = -dc
    where f > 0 and f + v <= 0.

    For each tile of rows, the sums over it of du (for b_a), and for the thresholds of -sign(v) du (soft threshold) or
    -(threshold / bandwidth) dv where |u - threshold| <= bandwidth / 2 (JumpReLU).
    """
    n_row_tiles, n_latent_tiles = tl.cdiv(n_rows, BLOCK_N), tl.cdiv(d_sae, BLOCK_L)
    for i in range(tl.program_id(0), n_row_tiles * n_latent_tiles, n_programs):
        i_row_tile, i_latent_tile = grouped_tile(i, n_row_tiles, n_latent_tiles, GROUP_SIZE)
        i_row, i_latent = i_row_tile * BLOCK_N, i_latent_tile * BLOCK_L
        o_row, o_latent = i_row + tl.arange(0, BLOCK_N), i_latent + tl.arange(0, BLOCK_L)
        m_row, m_latent = o_row < n_rows, o_latent < d_sae
        p_code = p_codes + o_row.to(tl.int64)[None, :] * d_codes + o_latent[:, None]
        # A byte each until the product is there, which takes the registers.
        b_code = tl.load(p_code, mask=m_row[None, :] & m_latent[:, None], other=0)
        m_read = tl.max(b_code.to(tl.int32), axis=1) > 0
        b_du = tl.zeros([BLOCK_L, BLOCK_N], dtype=tl.float32)
        b_df = tl.zeros([BLOCK_L, BLOCK_N], dtype=tl.float32)
        b_dthreshold = tl.zeros([BLOCK_L], dtype=tl.float32)
        if tl.max(m_read.to(tl.int32), axis=0) > 0:
            b_dc = product_tile(
                p_W_dec, p_grad, i_latent, m_read, i_row, m_row, d_in, BLOCK_L, BLOCK_N, BLOCK_K, DECODER
            )
            b_moved = b_code.to(tl.int32) % _NEAR
            b_sign = tl.where(b_moved == _UP, 1.0, tl.where(b_moved > _UP, -1.0, 0.0))
            b_dl1 = tl.load(p_grad_l1 + o_row, mask=m_row, other=0.0).to(tl.float32)[None, :]
            b_du = tl.where((b_moved == _UP) | (b_moved == _DOWN), b_dc, 0.0) + b_dl1 * b_sign
            b_df = tl.where(b_moved == _OFF, -b_dc, 0.0)
            if JUMPS:
                b_dv = tl.where(b_moved > 0, b_du, b_dc)
                b_threshold = tl.load(p_threshold + o_latent, mask=m_latent, other=0.0)
                b_dthreshold = -b_threshold / bandwidth * tl.sum(tl.where(b_code >= _NEAR, b_dv, 0.0), axis=1)
            else:
                b_dthreshold = -tl.sum(b_sign * b_du, axis=1)
        p_place = o_row.to(tl.int64)[None, :] * width + o_latent[:, None]
        m_place = m_row[None, :] & (o_latent < width)[:, None]
        tl.store(p_du + p_place, rounded(b_du, p_du.dtype.element_ty), mask=m_place)
        if p_df is not None:
            tl.store(p_df + p_place, rounded(b_df, p_df.dtype.element_ty), mask=m_place)
        p_sum = i_row_tile.to(tl.int64) * d_sae + o_latent
        tl.store(p_db_a + p_sum, tl.sum(b_du, axis=1), mask=m_latent)
        if p_dthreshold is not None:
            tl.store(p_dthreshold + p_sum, b_dthreshold, mask=m_latent)


@triton.jit(do_not_specialize=["n_rows"])
def cut_kernel(p_value, p_keep, p_cut, width, n_rows, BLOCK: tl.constexpr):
    """For each row of values >= 0, the level that its `keep` largest reach, and the last of the latents at the level
    that are among them, ties to the smaller index; -1 where there is none. A program a row."""
    i_row = tl.program_id(0).to(tl.int64)
    p_key, b_keep = p_value + i_row * width, tl.load(p_keep + i_row)
    b_level = kth_largest(p_key, width, b_keep, BLOCK)
    b_room = b_keep - count_above(p_key, width, b_level, BLOCK)
    b_ties, b_last = tl.zeros([], dtype=tl.int32), tl.full([], -1, dtype=tl.int32)
    o = tl.arange(0, BLOCK)
    for i in range(0, width, BLOCK):
        m_tie = tl.load(p_key + i + o, mask=o < width - i, other=-1) == b_level
        m_in = m_tie & (tl.cumsum(m_tie.to(tl.int32), axis=0) + b_ties <= b_room)
        b_last = tl.maximum(b_last, tl.max(tl.where(m_in, i + o, -1), axis=0))
        b_ties += tl.sum(m_tie.to(tl.int32), axis=0)
    tl.store(p_cut + i_row, b_level)
    tl.store(p_cut + n_rows + i_row, b_last)


@triton.jit(do_not_specialize=SIZES)
def step_kernel(
    p_h,
    p_x,
    p_encoder_rows,
    p_b_enc,
    p_sae_threshold,
    p_rank,
    p_W_dec,
    p_W_a,
    p_b_a,
    p_threshold,
    p_mask,
    p_top,
    p_part,
    p_part_l1,
    p_part_l0,
    p_out,
    p_l1,
    p_l0,
    p_codes,
    p_barrier,
    bandwidth,
    d_codes,
    d_in,
    d_sae,
    n_rows,
    n_programs,
    PHASE: tl.constexpr,
    ADD: tl.constexpr,
    LATENTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ADAPTER: tl.constexpr,
    ENCODER: tl.constexpr,
    DECODER: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """out = h + sum_j (ReLU(f_j + v_j) - f_j) W_dec[j] for at most BLOCK_N rows, without h where ADD is false.

    *move*: each program sums over the tiles of latents that are its own, in scratch of its own [n_rows, d_in], and
    tells by its L0 of a row whether it moved anything of that. *sum*: these are added up, in the order of the programs.
    """
    i_program = tl.program_id(0)
    o_row = tl.arange(0, BLOCK_N)
    m_row = o_row < n_rows
    if PHASE == _ALL or PHASE == _MOVE:
        b_l1 = tl.zeros([BLOCK_N], dtype=tl.float32)
        b_l0 = tl.zeros([BLOCK_N], dtype=tl.int32)
        b_begun = tl.zeros([], dtype=tl.int32)
        o_d = tl.arange(0, BLOCK_D)
        o_mine = i_program * n_rows + o_row
        p_mine = p_part + o_mine.to(tl.int64)[None, :] * d_in
        for i_latent in range(i_program * BLOCK_L, d_sae, n_programs * BLOCK_L):
            b_v, b_f, m_near = moved_tile(
                p_h,
                p_x,
                p_encoder_rows,
                p_b_enc,
                p_sae_threshold,
                p_rank,
                p_W_a,
                p_b_a,
                p_threshold,
                p_mask,
                p_top,
                i_latent,
                0,
                d_in,
                d_sae,
                n_rows,
                bandwidth,
                ACTIVATION,
                LATENTS,
                ADAPTER,
                ENCODER,
                BLOCK_N,
                BLOCK_L,
                BLOCK_K,
            )
            o_latent = i_latent + tl.arange(0, BLOCK_L)
            if p_codes is not None:
                store_codes(p_codes, d_codes, o_row, m_row, o_latent, d_sae, b_v, b_f, m_near)
            b_l1 += tl.sum(tl.abs(b_v), axis=0)
            b_moved = tl.sum((b_v != 0).to(tl.int32), axis=0)
            b_l0 += b_moved
            if tl.max(b_moved, axis=0) > 0:
                b_c = changed(b_v, b_f)
                m_read = tl.max((b_c != 0).to(tl.int32), axis=1) > 0
                p_w = p_W_dec + o_latent.to(tl.int64)[None, :] * d_in
                for i_d in range(0, d_in, BLOCK_D):
                    m_d = (i_d + o_d < d_in)[:, None]
                    b_w = tl.load(p_w + i_d + o_d[:, None], mask=m_read[None, :] & m_d, other=0.0)
                    p_sum, m_sum = p_mine + i_d + o_d[:, None], m_row[None, :] & m_d
                    b_sum = tl.load(p_sum, mask=m_row[None, :] & (i_d + o_d < d_in * b_begun)[:, None], other=0.0)
                    tl.store(p_sum, dot_tile(b_w, b_c, b_sum, DECODER), mask=m_sum)
                b_begun = tl.full([], 1, dtype=tl.int32)
                # What one thread stored of the sums, another may read for the next tile.
                tl.debug_barrier()
        tl.store(p_part_l1 + o_mine, b_l1, mask=m_row)
        tl.store(p_part_l0 + o_mine, b_l0, mask=m_row)
    if PHASE == _ALL:
        grid_wait(p_barrier, grid_arrive(p_barrier, n_programs))
    if PHASE == _ALL or PHASE == _SUM:
        n_chunks = tl.cdiv(d_in, BLOCK_D)
        o_program = tl.arange(0, BLOCK_P)
        for i in range(i_program, n_rows * n_chunks, n_programs):
            i_row, i_chunk = i // n_chunks, i % n_chunks
            o_d = i_chunk * BLOCK_D + tl.arange(0, BLOCK_D)
            m_d = o_d < d_in
            b_delta = tl.zeros([BLOCK_D], dtype=tl.float32)
            b_sum, b_count = tl.zeros([BLOCK_P], dtype=tl.float32), tl.zeros([BLOCK_P], dtype=tl.int32)
            for i_first in range(0, n_programs, BLOCK_P):
                o_other = i_first + o_program
                m_other = o_other < n_programs
                # What other programs wrote is looked for past the first-level cache.
                o_theirs = o_other * n_rows + i_row
                b_sum += tl.load(p_part_l1 + o_theirs, mask=m_other, other=0.0, cache_modifier=".cg")
                b_theirs = tl.load(p_part_l0 + o_theirs, mask=m_other, other=0, cache_modifier=".cg")
                b_count += b_theirs
                p_theirs = p_part + o_theirs.to(tl.int64)[:, None] * d_in + o_d[None, :]
                m_theirs = (b_theirs > 0)[:, None] & m_d[None, :]
                b_delta += tl.sum(tl.load(p_theirs, mask=m_theirs, other=0.0, cache_modifier=".cg"), axis=0)
            if ADD:
                b_h = tl.load(p_h + i_row * d_in + o_d, mask=m_d, other=0.0)
                b_all = tl.sum(b_count, axis=0)
                b_out = rounded(b_h.to(tl.float32) + b_delta, b_h.dtype)
                # A row of which nothing is moved stays as it came, bit for bit.
                tl.store(p_out + i_row * d_in + o_d, tl.where(b_all > 0, b_out, b_h), mask=m_d)
            else:
                tl.store(p_out + i_row * d_in + o_d, b_delta, mask=m_d)
            if i_chunk == 0:
                tl.store(p_l1 + i_row, tl.sum(b_sum, axis=0))
                tl.store(p_l0 + i_row, tl.sum(b_count, axis=0))
