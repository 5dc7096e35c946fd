"""The kernels of `fsrl_residual`: the changes of an adapter, tile by tile, forward and backward."""

import triton
import triton.language as tl

from dspa_kernels.ops.fsrl_residual.codes import DOWN, IDLE, NEAR, OFF, UP
from dspa_kernels.ops.shared.triton_grid import grid_arrive, grid_wait
from dspa_kernels.ops.shared.triton_ranks import count_above, kth_largest
from dspa_kernels.ops.shared.triton_tiles import dot_tile, grouped_tile, product_tile, rounded

# Where the encoder's latents f are needed: nowhere, where v < 0, or also near a threshold.
NOWHERE, BELOW, NEARBY = range(3)
_NOWHERE, _NEARBY = tl.constexpr(NOWHERE), tl.constexpr(NEARBY)
_UP, _DOWN, _OFF, _IDLE, _NEAR = (tl.constexpr(code) for code in (UP, DOWN, OFF, IDLE, NEAR))
# The interpreter runs programs one after the other, so each phase is a launch of its own there.
PARTIALS, REDUCE, ALL = range(3)
_PARTIALS, _REDUCE, _ALL = tl.constexpr(PARTIALS), tl.constexpr(REDUCE), tl.constexpr(ALL)
SIZES = ("d_sae", "n_rows", "n_programs")


@triton.jit
def within_cutoff(b_value, p_cutoff, o_row, m_row, o_latent, n_rows):
    """Return the mask of the values >= 0 [L, N] that are among the largest of their row.

    key > pivot, or key = pivot and latent <= last. The last latent itself is always included, because the launch that
    computed the cutoff has other block sizes and may have rounded its value differently.
    """
    b_pivot = tl.load(p_cutoff + o_row, mask=m_row, other=0)[None, :]
    b_last = tl.load(p_cutoff + n_rows + o_row, mask=m_row, other=-1)[None, :]
    b_key = b_value.to(tl.int32, bitcast=True)
    b_latent = o_latent[:, None]
    return (b_key > b_pivot) | ((b_key == b_pivot) & (b_latent < b_last)) | (b_latent == b_last)


@triton.jit
def adapter_tile(
    p_h,
    p_x,
    p_encoder_rows,
    p_b_enc,
    p_sae_threshold,
    p_encoder_cutoff,
    p_W_a,
    p_b_a,
    p_threshold,
    p_mask,
    p_rows,
    p_adapter_cutoff,
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
    """v = act(u) with u = h W_a^T + b_a of a tile [L, N], 0 where it is not kept; f; the mask of u near a jump.

    Rows outside of p_rows keep nothing, and a tile of such rows alone reads neither the adapter nor the encoder. There
    is no NEARBY with p_rows, which has no backward.

    Comparisons are such that a NaN of u is a NaN of v. f is 0 where LATENTS does not need it. It is needed where v < 0
    or, with NEARBY, also where |u - threshold| <= bandwidth / 2. Only encoder rows that some row of the tile needs are
    read.
    """
    o_latent, o_row = i_latent + tl.arange(0, BLOCK_L), i_row + tl.arange(0, BLOCK_N)
    m_row = o_row < n_rows
    if p_rows is not None:
        b_moves = tl.load(p_rows + o_row, mask=m_row, other=0).to(tl.int32)
        # A tile in which no row moves is past the last latent.
        o_latent = tl.where(tl.max(b_moves, axis=0) > 0, o_latent, d_sae)
    m_latent = o_latent < d_sae
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
    if p_adapter_cutoff is not None:
        m_kept = within_cutoff(tl.abs(b_v), p_adapter_cutoff, o_row, m_row, o_latent, n_rows)
        b_v = tl.where(m_kept, b_v, 0.0)
        m_near = m_near & m_kept
    if p_rows is not None:
        # Not in the masks above: the compiler then keeps the flags in registers throughout the product.
        b_v = tl.where((b_moves > 0)[None, :], b_v, 0.0)
    b_f = tl.zeros([BLOCK_L, BLOCK_N], dtype=tl.float32)
    if LATENTS != _NOWHERE:
        m_needed = (b_v < 0) | m_near
        m_read = tl.max(m_needed.to(tl.int32), axis=1) > 0
        if tl.max(m_read.to(tl.int32), axis=0) > 0:
            b_pre = product_tile(
                p_encoder_rows, p_x, i_latent, m_read, i_row, m_row, d_in, BLOCK_L, BLOCK_N, BLOCK_K, ENCODER
            )
            b_pre += tl.load(p_b_enc + o_latent, mask=m_read, other=0.0)[:, None]
            m_active = m_needed & (b_pre > 0)
            if p_encoder_cutoff is not None:
                m_active = m_active & within_cutoff(
                    tl.maximum(b_pre, 0.0), p_encoder_cutoff, o_row, m_row, o_latent, n_rows
                )
            else:
                m_active = m_active & (b_pre > tl.load(p_sae_threshold + o_latent, mask=m_read, other=0.0)[:, None])
            b_f = tl.where(m_active, b_pre, 0.0)
    return b_v, b_f, m_near


@triton.jit
def clamped_change(b_v, b_f):
    """c = max(v, -f) = ReLU(f + v) - f, which is v where v >= 0."""
    return tl.where(b_v < 0, tl.maximum(b_v, -b_f), b_v)


@triton.jit
def store_codes(p_codes, d_codes, o_row, m_row, o_latent, d_sae, b_v, b_f, m_near):
    """Store the code of each latent of a tile [L, N], as `codes.py` defines them."""
    m_on = b_f + b_v > 0
    b_code = tl.where(m_on, _DOWN, tl.where(b_f > 0, _OFF, _IDLE))
    b_code = tl.where(b_v > 0, _UP, tl.where(b_v < 0, b_code, 0)) + tl.where(m_near & m_on, _NEAR, 0)
    p_tile = p_codes + o_row.to(tl.int64)[None, :] * d_codes + o_latent[:, None]
    tl.store(p_tile, b_code.to(tl.uint8), mask=m_row[None, :] & (o_latent < d_sae)[:, None])


@triton.jit(do_not_specialize=SIZES)
def change_kernel(
    p_h,
    p_x,
    p_encoder_rows,
    p_b_enc,
    p_sae_threshold,
    p_encoder_cutoff,
    p_W_a,
    p_b_a,
    p_threshold,
    p_mask,
    p_rows,
    p_adapter_cutoff,
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
    ABS_V: tl.constexpr,
    LATENTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ADAPTER: tl.constexpr,
    ENCODER: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
):
    """c_nj = ReLU(f_nj + v_nj) - f_nj, or |v_nj| with ABS_V, and 0 in columns after d_sae.

    For each tile of latents also l1 = sum |v_nj| and l0 = sum (v_nj != 0), and with p_codes the codes for the backward.
    """
    n_row_tiles, n_latent_tiles = tl.cdiv(n_rows, BLOCK_N), tl.cdiv(d_sae, BLOCK_L)
    for i in range(tl.program_id(0), n_row_tiles * n_latent_tiles, n_programs):
        i_row_tile, i_latent_tile = grouped_tile(i, n_row_tiles, n_latent_tiles, GROUP_SIZE)
        i_row, i_latent = i_row_tile * BLOCK_N, i_latent_tile * BLOCK_L
        o_row, o_latent = i_row + tl.arange(0, BLOCK_N), i_latent + tl.arange(0, BLOCK_L)
        m_row = o_row < n_rows
        b_v, b_f, m_near = adapter_tile(
            p_h,
            p_x,
            p_encoder_rows,
            p_b_enc,
            p_sae_threshold,
            p_encoder_cutoff,
            p_W_a,
            p_b_a,
            p_threshold,
            p_mask,
            p_rows,
            p_adapter_cutoff,
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
        b_abs_v = tl.abs(b_v)
        b_c = b_abs_v if ABS_V else clamped_change(b_v, b_f)
        p_tile = p_c + o_row.to(tl.int64)[None, :] * width + o_latent[:, None]
        m_store = m_row[None, :] & (o_latent < width)[:, None]
        tl.store(p_tile, rounded(b_c, p_c.dtype.element_ty), mask=m_store)
        if p_codes is not None:
            store_codes(p_codes, d_codes, o_row, m_row, o_latent, d_sae, b_v, b_f, m_near)
        p_sum = i_latent_tile.to(tl.int64) * n_rows + o_row
        tl.store(p_l1 + p_sum, tl.sum(b_abs_v, axis=0), mask=m_row)
        tl.store(p_l0 + p_sum, tl.sum((b_v != 0).to(tl.int32), axis=0), mask=m_row)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["p_grad_l1"])
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
    """dc = g W_dec^T with g the gradient of h'; dv = dc [f + v > 0] + dl1 sign(v).

    du = dv where v is not 0, and df = -dc where f > 0 and f + v <= 0. For each tile of rows also the sums of du (for
    b_a) and, for the thresholds, of -sign(v) du (soft threshold) or of -(threshold / bandwidth) dv where
    |u - threshold| <= bandwidth / 2 (JumpReLU).
    """
    n_row_tiles, n_latent_tiles = tl.cdiv(n_rows, BLOCK_N), tl.cdiv(d_sae, BLOCK_L)
    for i in range(tl.program_id(0), n_row_tiles * n_latent_tiles, n_programs):
        i_row_tile, i_latent_tile = grouped_tile(i, n_row_tiles, n_latent_tiles, GROUP_SIZE)
        i_row, i_latent = i_row_tile * BLOCK_N, i_latent_tile * BLOCK_L
        o_row, o_latent = i_row + tl.arange(0, BLOCK_N), i_latent + tl.arange(0, BLOCK_L)
        m_row, m_latent = o_row < n_rows, o_latent < d_sae
        p_code = p_codes + o_row.to(tl.int64)[None, :] * d_codes + o_latent[:, None]
        # Kept as bytes until the product is complete, because that takes most registers.
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
        p_tile = o_row.to(tl.int64)[None, :] * width + o_latent[:, None]
        m_store = m_row[None, :] & (o_latent < width)[:, None]
        tl.store(p_du + p_tile, rounded(b_du, p_du.dtype.element_ty), mask=m_store)
        if p_df is not None:
            tl.store(p_df + p_tile, rounded(b_df, p_df.dtype.element_ty), mask=m_store)
        p_sum = i_row_tile.to(tl.int64) * d_sae + o_latent
        tl.store(p_db_a + p_sum, tl.sum(b_du, axis=1), mask=m_latent)
        if p_dthreshold is not None:
            tl.store(p_dthreshold + p_sum, b_dthreshold, mask=m_latent)


@triton.jit(do_not_specialize=["n_rows"])
def cutoff_kernel(p_value, p_keep, p_cutoff, width, n_rows, BLOCK: tl.constexpr):
    """cutoff = the pivot of the `keep` largest values >= 0 of each row, and the last latent equal to it among them.

    Ties by smaller index; the last latent is -1 if there is none. One program per row.
    """
    i_row = tl.program_id(0).to(tl.int64)
    p_key, b_keep = p_value + i_row * width, tl.load(p_keep + i_row)
    b_pivot = kth_largest(p_key, width, b_keep, BLOCK)
    b_n_ties = b_keep - count_above(p_key, width, b_pivot, BLOCK)
    b_ties_seen, b_last = tl.zeros([], dtype=tl.int32), tl.full([], -1, dtype=tl.int32)
    o = tl.arange(0, BLOCK)
    for i in range(0, width, BLOCK):
        m_tie = tl.load(p_key + i + o, mask=o < width - i, other=-1) == b_pivot
        m_selected = m_tie & (tl.cumsum(m_tie.to(tl.int32), axis=0) + b_ties_seen <= b_n_ties)
        b_last = tl.maximum(b_last, tl.max(tl.where(m_selected, i + o, -1), axis=0))
        b_ties_seen += tl.sum(m_tie.to(tl.int32), axis=0)
    tl.store(p_cutoff + i_row, b_pivot)
    tl.store(p_cutoff + n_rows + i_row, b_last)


@triton.jit(do_not_specialize=SIZES)
def step_kernel(
    p_h,
    p_x,
    p_encoder_rows,
    p_b_enc,
    p_sae_threshold,
    p_encoder_cutoff,
    p_W_dec,
    p_W_a,
    p_b_a,
    p_threshold,
    p_mask,
    p_rows,
    p_adapter_cutoff,
    p_partials,
    p_partials_l1,
    p_partials_l0,
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

    PARTIALS: each program sums over its own tiles of latents into its own partials [n_rows, d_in]. Partials of a row
    are valid only if the program's L0 of the row is not 0. REDUCE: partials are added in the order of the programs.
    """
    i_program = tl.program_id(0)
    o_row = tl.arange(0, BLOCK_N)
    m_row = o_row < n_rows
    if PHASE == _ALL or PHASE == _PARTIALS:
        b_l1 = tl.zeros([BLOCK_N], dtype=tl.float32)
        b_l0 = tl.zeros([BLOCK_N], dtype=tl.int32)
        b_has_partial = tl.zeros([], dtype=tl.int32)
        o_d = tl.arange(0, BLOCK_D)
        o_own = i_program * n_rows + o_row
        p_own = p_partials + o_own.to(tl.int64)[None, :] * d_in
        for i_latent in range(i_program * BLOCK_L, d_sae, n_programs * BLOCK_L):
            b_v, b_f, m_near = adapter_tile(
                p_h,
                p_x,
                p_encoder_rows,
                p_b_enc,
                p_sae_threshold,
                p_encoder_cutoff,
                p_W_a,
                p_b_a,
                p_threshold,
                p_mask,
                p_rows,
                p_adapter_cutoff,
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
                b_c = clamped_change(b_v, b_f)
                m_read = tl.max((b_c != 0).to(tl.int32), axis=1) > 0
                p_w = p_W_dec + o_latent.to(tl.int64)[None, :] * d_in
                for i_d in range(0, d_in, BLOCK_D):
                    m_d = (i_d + o_d < d_in)[:, None]
                    b_w = tl.load(p_w + i_d + o_d[:, None], mask=m_read[None, :] & m_d, other=0.0)
                    p_sum, m_sum = p_own + i_d + o_d[:, None], m_row[None, :] & m_d
                    b_sum = tl.load(p_sum, mask=m_row[None, :] & (i_d + o_d < d_in * b_has_partial)[:, None], other=0.0)
                    tl.store(p_sum, dot_tile(b_w, b_c, b_sum, DECODER), mask=m_sum)
                b_has_partial = tl.full([], 1, dtype=tl.int32)
                # For the next tile, other threads may load the partials that a thread has stored.
                tl.debug_barrier()
        tl.store(p_partials_l1 + o_own, b_l1, mask=m_row)
        tl.store(p_partials_l0 + o_own, b_l0, mask=m_row)
    if PHASE == _ALL:
        grid_wait(p_barrier, grid_arrive(p_barrier, n_programs))
    if PHASE == _ALL or PHASE == _REDUCE:
        n_column_tiles = tl.cdiv(d_in, BLOCK_D)
        o_program = tl.arange(0, BLOCK_P)
        for i in range(i_program, n_rows * n_column_tiles, n_programs):
            i_row, i_column_tile = i // n_column_tiles, i % n_column_tiles
            o_d = i_column_tile * BLOCK_D + tl.arange(0, BLOCK_D)
            m_d = o_d < d_in
            b_delta = tl.zeros([BLOCK_D], dtype=tl.float32)
            b_sum, b_count = tl.zeros([BLOCK_P], dtype=tl.float32), tl.zeros([BLOCK_P], dtype=tl.int32)
            for i_first in range(0, n_programs, BLOCK_P):
                o_source = i_first + o_program
                m_source = o_source < n_programs
                # Other programs wrote these, so the loads bypass the L1 cache.
                o_partial = o_source * n_rows + i_row
                b_sum += tl.load(p_partials_l1 + o_partial, mask=m_source, other=0.0, cache_modifier=".cg")
                b_partial_l0 = tl.load(p_partials_l0 + o_partial, mask=m_source, other=0, cache_modifier=".cg")
                b_count += b_partial_l0
                p_partial = p_partials + o_partial.to(tl.int64)[:, None] * d_in + o_d[None, :]
                m_partial = (b_partial_l0 > 0)[:, None] & m_d[None, :]
                b_delta += tl.sum(tl.load(p_partial, mask=m_partial, other=0.0, cache_modifier=".cg"), axis=0)
            if ADD:
                b_h = tl.load(p_h + i_row * d_in + o_d, mask=m_d, other=0.0)
                b_total = tl.sum(b_count, axis=0)
                b_out = rounded(b_h.to(tl.float32) + b_delta, b_h.dtype)
                # A row without changes keeps its bits.
                tl.store(p_out + i_row * d_in + o_d, tl.where(b_total > 0, b_out, b_h), mask=m_d)
            else:
                tl.store(p_out + i_row * d_in + o_d, b_delta, mask=m_d)
            if i_column_tile == 0:
                tl.store(p_l1 + i_row, tl.sum(b_sum, axis=0))
                tl.store(p_l0 + i_row, tl.sum(b_count, axis=0))
