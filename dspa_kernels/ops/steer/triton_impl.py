"""`steer` in Triton: one cooperative launch of select, stream and tail, with a grid barrier between them.

- *lookup* (`lookup_and_steer` alone): a program a prompt chooses its slots.
- *select*: the values of each row's selected latents, and of the large latents that bound its maximum.
- *stream*: where some row still needs its maximum, the encoder, tile by tile, until every row is settled.
- *tail*: `h + scale sum_j (f'_j - f_j) W_dec[j]`.

What a phase leaves for the next lies in scratch that is written before it is read, so nothing is cleared.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dspa_kernels.launch import launch_parameters
from dspa_kernels.ops.map_lookup.triton_impl import lookup_prompt
from dspa_kernels.ops.triton_common import (
    INTERPRETED,
    NATIVE,
    grid_arrive,
    grid_wait,
    n_programs,
    precision,
    product_tile,
    rounded,
    row_chunk,
    row_scale,
)
from dspa_kernels.weights import N_BARRIERS

# The interpreter runs programs one after the other, so that each phase is a launch of its own there.
LOOKUP, SELECT, STREAM, TAIL, ALL = range(5)
_LOOKUP, _SELECT, _STREAM = tl.constexpr(LOOKUP), tl.constexpr(SELECT), tl.constexpr(STREAM)
_TAIL, _ALL = tl.constexpr(TAIL), tl.constexpr(ALL)
# Latents that one program of the select phase evaluates together, and how much of a row it reads at a time.
BLOCK_S, BLOCK_C = 8, 512
# Slots that are looked at together, and columns that one program of the tail writes.
BLOCK_SLOTS, BLOCK_D = 16, 256


@triton.jit
def plan_rows(p_rows, p_positions, p_start, o_row, m_row):
    """Plan row of each residual row, -1 where it is not steered."""
    b_plan = o_row
    if p_rows is not None:
        b_plan = tl.load(p_rows + o_row, mask=m_row, other=-1)
    if p_positions is not None:
        b_start = tl.load(p_start + b_plan, mask=m_row & (b_plan >= 0), other=0)
        b_plan = tl.where(tl.load(p_positions + o_row, mask=m_row, other=0) >= b_start, b_plan, -1)
    return tl.where(m_row, b_plan, -1)


@triton.jit
def prepare_row(
    p_row,
    p_normalised,
    p_scale,
    p_norms,
    p_mean,
    p_finite,
    p_maximum,
    p_beaten,
    i_row,
    d_in,
    n_slots,
    NORMALIZE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):
    """finite = all of h is; n(h), its scale, ||n(h) - mean|| and ||n(h)|| where needed; maximum and beaten 0."""
    b_mean, b_divisor, b_scale = row_scale(p_row, d_in, NORMALIZE, BLOCK_C)
    o_k = tl.arange(0, BLOCK_C)
    b_infinite = tl.zeros([BLOCK_C], dtype=tl.int32)
    b_near, b_size = tl.zeros([BLOCK_C], dtype=tl.float32), tl.zeros([BLOCK_C], dtype=tl.float32)
    for i_k in range(0, d_in, BLOCK_C):
        m_k = o_k < d_in - i_k
        b_h = row_chunk(p_row, i_k, o_k, d_in, b_mean, b_divisor, "none")
        # A NaN compares false.
        b_infinite |= tl.where(tl.abs(b_h) < float("inf"), 0, 1)
        if NORMALIZE != "none":
            b_h = row_chunk(p_row, i_k, o_k, d_in, b_mean, b_divisor, NORMALIZE)
            tl.store(p_normalised + i_row * d_in + i_k + o_k, b_h, mask=m_k)
        if p_norms is not None:
            b_off = tl.where(m_k, b_h - tl.load(p_mean + i_k + o_k, mask=m_k, other=0.0), 0.0)
            b_near += b_off * b_off
            b_size += b_h * b_h
    if NORMALIZE != "none":
        tl.store(p_scale + i_row, b_scale)
    if p_norms is not None:
        # Upwards: the relative error of the sums, and what squares lose that are too small to be numbers.
        tl.store(p_norms + 2 * i_row, tl.sqrt_rn(tl.sum(b_near, axis=0)) * 1.001 + 1e-17)
        tl.store(p_norms + 2 * i_row + 1, tl.sqrt_rn(tl.sum(b_size, axis=0)) * 1.001 + 1e-17)
    tl.store(p_finite + i_row, 1 - tl.max(b_infinite, axis=0))
    tl.store(p_maximum + i_row, 0)
    if p_beaten is not None:
        for i in range(0, n_slots, BLOCK_SLOTS):
            o_slot = i + tl.arange(0, BLOCK_SLOTS)
            tl.store(p_beaten + i_row * n_slots + o_slot, tl.zeros([BLOCK_SLOTS], tl.int32), mask=o_slot < n_slots)


@triton.jit
def latent_values(
    p_row,
    p_W_enc,
    p_b_enc,
    p_threshold,
    o_latent,
    m_latent,
    d_in,
    NORMALIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """f_j = pre_j where latent j of the row is active, else 0, [BLOCK_S]; for top-k where pre_j > 0."""
    b_mean, b_divisor, _ = row_scale(p_row, d_in, NORMALIZE, BLOCK_C)
    o_k = tl.arange(0, BLOCK_C)
    p_w = p_W_enc + o_latent.to(tl.int64)[:, None] * d_in + o_k[None, :]
    b_acc = tl.zeros([BLOCK_S, BLOCK_C], dtype=tl.float32)
    for i_k in range(0, d_in, BLOCK_C):
        b_x = row_chunk(p_row, i_k, o_k, d_in, b_mean, b_divisor, NORMALIZE)
        b_w = tl.load(p_w + i_k, mask=m_latent[:, None] & (o_k < d_in - i_k)[None, :], other=0.0)
        b_acc += b_w.to(tl.float32) * b_x[None, :]
    b_pre = tl.sum(b_acc, axis=1) + tl.load(p_b_enc + o_latent, mask=m_latent, other=0.0)
    m_active = m_latent & (b_pre > 0)
    if not TOP_K:
        m_active = m_active & (b_pre > tl.load(p_threshold + o_latent, mask=m_latent, other=0.0))
    return tl.where(m_active, b_pre, 0.0)


@triton.jit
def summarise(
    p_signs, p_finite, p_value, o_row, b_plan, n_slots, n_large, BLOCK_N: tl.constexpr, BLOCK_SLOTS: tl.constexpr
):
    """Of BLOCK_N rows: whether finite; need, the value that alpha M has to reach to send all their active
    latents to 0 (inf where one augments, 0 where none is active); the least active value; a lower bound on M."""
    o_slot = tl.arange(0, BLOCK_SLOTS)
    m_steered = b_plan >= 0
    m_finite = m_steered & (tl.load(p_finite + o_row, mask=m_steered, other=0) == 1)
    p_f = p_value + o_row.to(tl.int64)[:, None] * (n_slots + n_large)
    p_sign = p_signs + b_plan.to(tl.int64)[:, None] * n_slots
    b_need, b_bound = tl.zeros([BLOCK_N], dtype=tl.float32), tl.zeros([BLOCK_N], dtype=tl.float32)
    b_least = b_need + float("inf")
    for i in range(0, n_slots, BLOCK_SLOTS):
        m_slot = m_finite[:, None] & (o_slot < n_slots - i)[None, :]
        b_f = tl.load(p_f + i + o_slot[None, :], mask=m_slot, other=0.0)
        b_sign = tl.load(p_sign + i + o_slot[None, :], mask=m_slot, other=0)
        b_reach = tl.where(b_f > 0, tl.where(b_sign > 0, float("inf"), b_f), 0.0)
        b_need = tl.maximum(b_need, tl.max(b_reach, axis=1))
        b_least = tl.minimum(b_least, tl.min(tl.where(b_f > 0, b_f, float("inf")), axis=1))
        b_bound = tl.maximum(b_bound, tl.max(b_f, axis=1))
    for i in range(0, n_large, BLOCK_SLOTS):
        m_large = m_finite[:, None] & (o_slot < n_large - i)[None, :]
        b_f = tl.load(p_f + n_slots + i + o_slot[None, :], mask=m_large, other=0.0)
        b_bound = tl.maximum(b_bound, tl.max(b_f, axis=1))
    return m_finite, b_need, b_least, b_bound


@triton.jit
def stream_tile(
    p_x,
    p_W_enc,
    p_b_enc,
    p_threshold,
    p_order,
    p_screen_W,
    p_screen,
    p_norms,
    p_columns,
    p_slots,
    p_value,
    p_maximum,
    p_beaten,
    i_latent,
    i_row,
    b_plan,
    m_open,
    b_least,
    b_bound,
    d_in,
    d_sae,
    n_slots,
    n_large,
    TOP_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """maximum_n = max(maximum_n, f_nj) over the latents j of a tile; returns how many rows were read in full.

    Screened, an upper bound on each pre-activation decides which rows could raise a maximum (or, for top-k, beat
    the least of the row's selected latents); only those are read, through the same products.
    """
    o_latent, o_row = i_latent + tl.arange(0, BLOCK_L), i_row + tl.arange(0, BLOCK_N)
    m_latent = o_latent < d_sae
    b_threshold = tl.load(p_threshold + o_latent, mask=m_latent, other=0.0)
    if p_screen_W is not None:
        b_z = product_tile(p_screen_W, p_x, i_latent, m_latent, i_row, m_open, d_in, BLOCK_L, BLOCK_N, BLOCK_K, PRECISION)
        b_s = tl.load(p_screen + o_latent, mask=m_latent, other=0.0)
        b_offset = tl.load(p_screen + d_sae + o_latent, mask=m_latent, other=0.0)
        b_error = tl.load(p_screen + 2 * d_sae + o_latent, mask=m_latent, other=0.0)
        b_size = tl.load(p_screen + 3 * d_sae + o_latent, mask=m_latent, other=0.0)
        b_near = tl.load(p_norms + 2 * o_row, mask=m_open, other=0.0)
        b_norm = tl.load(p_norms + 2 * o_row + 1, mask=m_open, other=0.0) * ((d_in + 32) * 0.0000002384185791015625)
        b_upper = b_z * b_s[:, None] + b_offset[:, None]
        b_upper += b_error[:, None] * b_near[None, :] + b_size[:, None] * b_norm[None, :]
        if TOP_K:
            m_out = b_upper < b_least[None, :]
        else:
            m_out = b_upper <= tl.maximum(b_bound[None, :], b_threshold[:, None])
        # What is not a number could be anything.
        m_candidate = m_open[None, :] & ~m_out
        m_latent = m_latent & (tl.max(m_candidate.to(tl.int32), axis=1) > 0)
    b_read = tl.sum(m_latent.to(tl.int32), axis=0)
    if b_read > 0:
        b_pre = product_tile(p_W_enc, p_x, i_latent, m_latent, i_row, m_open, d_in, BLOCK_L, BLOCK_N, BLOCK_K, PRECISION)
        b_pre += tl.load(p_b_enc + o_latent, mask=m_latent, other=0.0)[:, None]
        m_active = m_latent[:, None] & (b_pre > 0)
        if not TOP_K:
            m_active = m_active & (b_pre > b_threshold[:, None])
        b_most = tl.max(tl.where(m_active, b_pre, 0.0), axis=0)
        # Numbers >= 0 order like their bits, so that the order of the blocks does not matter.
        tl.atomic_max(p_maximum + o_row, b_most.to(tl.int32, bitcast=True), mask=m_open & (b_most > 0), sem="relaxed")
        if TOP_K:
            b_index = o_latent
            if p_order is not None:
                b_index = tl.load(p_order + o_latent, mask=m_latent, other=0)
            for i_slot in range(n_slots):
                b_slot = tl.load(p_slots + b_plan.to(tl.int64) * n_slots + i_slot, mask=m_open, other=-1)
                b_f = tl.load(p_value + o_row.to(tl.int64) * (n_slots + n_large) + i_slot, mask=m_open, other=0.0)
                b_own = tl.load(p_columns + b_slot, mask=m_open & (b_slot >= 0), other=-1)
                m_ahead = (b_pre > b_f[None, :]) | ((b_pre == b_f[None, :]) & (b_index[:, None] < b_own[None, :]))
                m_ahead = m_ahead & m_latent[:, None] & (b_index[:, None] != b_own[None, :])
                b_ahead = tl.sum(m_ahead.to(tl.int32), axis=0)
                tl.atomic_add(p_beaten + o_row * n_slots + i_slot, b_ahead, mask=m_open & (b_f > 0), sem="relaxed")
    return b_read


@triton.jit
def edit_row(
    p_h,
    p_out,
    p_columns_W_dec,
    p_slots,
    p_signs,
    p_scale,
    p_value,
    p_maximum,
    p_beaten,
    p_finite,
    p_before,
    p_after,
    p_most,
    p_paths,
    i_row,
    i_chunk,
    b_plan,
    alpha,
    k,
    d_in,
    n_slots,
    n_large,
    RECORD: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out = h + scale sum_j (f'_j - f_j) W_dec[j] at BLOCK_D columns; f' = f + alpha M or max(f - alpha M, 0).

    The first chunk of a row also tells what became of it.
    """
    m_finite, b_need, _, b_bound = summarise(
        p_signs, p_finite, p_value, i_row + tl.arange(0, 1), b_plan + tl.arange(0, 1), n_slots, n_large, 1, BLOCK_SLOTS
    )
    b_bound, b_need = tl.sum(b_bound, axis=0), tl.sum(b_need, axis=0)
    b_finite = tl.sum(m_finite.to(tl.int32), axis=0)
    # What other programs wrote is looked for past the first-level cache.
    b_most = tl.load(p_maximum + i_row, mask=b_finite == 1, other=0, cache_modifier=".cg").to(tl.float32, bitcast=True)
    b_most = tl.maximum(b_most, b_bound)
    b_step = alpha * b_most

    o_d = i_chunk * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < d_in
    b_delta = tl.zeros([BLOCK_D], dtype=tl.float32)
    b_changed, b_active = tl.zeros([], dtype=tl.float32), tl.zeros([], dtype=tl.float32)
    for i in range(0, n_slots, BLOCK_SLOTS):
        o_slot = i + tl.arange(0, BLOCK_SLOTS)
        m_slot = o_slot < n_slots * b_finite
        b_f = tl.load(p_value + i_row * (n_slots + n_large) + o_slot, mask=m_slot, other=0.0)
        if p_beaten is not None:
            b_beaten = tl.load(p_beaten + i_row * n_slots + o_slot, mask=m_slot, other=0, cache_modifier=".cg")
            b_f = tl.where(b_beaten < k, b_f, 0.0)
        b_slot = tl.load(p_slots + b_plan.to(tl.int64) * n_slots + o_slot, mask=m_slot, other=-1)
        b_sign = tl.load(p_signs + b_plan.to(tl.int64) * n_slots + o_slot, mask=m_slot, other=0)
        b_edited = tl.where(b_sign > 0, b_f + b_step, tl.maximum(b_f - b_step, 0.0))
        b_edited = tl.where(b_f > 0, b_edited, 0.0)
        b_change = b_edited - b_f
        p_w = p_columns_W_dec + b_slot.to(tl.int64)[:, None] * d_in + o_d[None, :]
        b_w = tl.load(p_w, mask=(b_change != 0)[:, None] & m_d[None, :], other=0.0)
        b_delta += tl.sum(b_change[:, None] * b_w.to(tl.float32), axis=0)
        b_changed = tl.maximum(b_changed, tl.max(tl.abs(b_change), axis=0))
        b_active = tl.maximum(b_active, tl.max(b_f, axis=0))
        if RECORD:
            if i_chunk == 0:
                tl.store(p_before + i_row * n_slots + o_slot, b_f, mask=o_slot < n_slots)
                tl.store(p_after + i_row * n_slots + o_slot, b_edited, mask=o_slot < n_slots)

    if p_scale is not None:
        b_delta *= tl.load(p_scale + i_row, mask=b_finite == 1, other=0.0)
    b_h = tl.load(p_h + i_row * d_in + o_d, mask=m_d, other=0.0)
    b_out = rounded(b_h.to(tl.float32) + b_delta, b_h.dtype)
    tl.store(p_out + i_row * d_in + o_d, tl.where(b_changed > 0, b_out, b_h), mask=m_d)

    if i_chunk == 0:
        if RECORD:
            b_lost = (b_plan >= 0) & (b_finite == 0)
            tl.store(p_most + i_row, tl.where(b_lost, float("nan"), tl.where(b_active > 0, b_most, 0.0)))
        if p_paths is not None:
            b_path = tl.where(b_need > 0, 4, 2)
            if not RECORD and p_beaten is None:
                b_path = tl.where((b_need > 0) & (b_need <= alpha * b_bound), 3, b_path)
            b_path = tl.where(b_plan < 0, 0, tl.where(b_finite == 0, 1, b_path))
            tl.atomic_add(p_paths + b_path, 1, sem="relaxed")


@triton.jit(
    do_not_specialize=["k", "d_sae", "d_sae_in", "n_rows", "n_prompts", "n_columns", "n_slots", "n_large"]
    + ["k_prompt", "k_diff", "n_programs"]
)
def steer_kernel(
    p_h,
    p_W_enc,
    p_b_enc,
    p_threshold,
    p_order,
    p_screen_W,
    p_screen,
    p_mean,
    p_columns,
    p_columns_W_enc,
    p_columns_b_enc,
    p_columns_threshold,
    p_columns_W_dec,
    p_slots,
    p_signs,
    p_rows,
    p_positions,
    p_start,
    p_paths,
    p_out,
    p_before,
    p_after,
    p_most,
    p_normalised,
    p_scale,
    p_norms,
    p_value,
    p_finite,
    p_maximum,
    p_beaten,
    p_counts,
    p_values,
    p_prompt,
    p_key,
    p_barrier,
    alpha,
    k,
    d_in,
    d_sae,
    d_sae_in,
    n_rows,
    n_prompts,
    n_columns,
    n_slots,
    n_large,
    k_prompt,
    k_diff,
    n_programs,
    PHASE: tl.constexpr,
    RECORD: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    AUGMENT: tl.constexpr = False,
    ABLATE: tl.constexpr = False,
    BLOCK: tl.constexpr = 16,
    BLOCK_PROMPT: tl.constexpr = 16,
    CHUNK_PROMPT: tl.constexpr = 16,
    BLOCK_DIFF: tl.constexpr = 16,
    CHUNK_DIFF: tl.constexpr = 16,
):
    """h'_n = h_n + scale_n sum_j (f'_j - f_j) W_dec[j] over the active selected latents j of row n, where
    f'_j = f_j + alpha M (augment) or max(f_j - alpha M, 0) (ablate) and M = max over all latents of f."""
    TOP_K: tl.constexpr = p_beaten is not None
    SETTLE: tl.constexpr = not RECORD and not TOP_K
    i_program = tl.program_id(0)
    p_x = p_h if NORMALIZE == "none" else p_normalised

    if p_counts is not None:
        if PHASE == _ALL or PHASE == _LOOKUP:
            for i in range(i_program, n_prompts, n_programs):
                i_prompt = tl.cast(i, tl.int64)
                lookup_prompt(
                    p_counts + i_prompt * d_sae_in,
                    p_values,
                    p_prompt + i_prompt * k_prompt,
                    p_key + i_prompt * n_columns,
                    p_slots + i_prompt * n_slots,
                    p_signs + i_prompt * n_slots,
                    d_sae_in,
                    n_columns,
                    k_prompt,
                    k_diff,
                    AUGMENT,
                    ABLATE,
                    BLOCK,
                    BLOCK_PROMPT,
                    CHUNK_PROMPT,
                    BLOCK_DIFF,
                    CHUNK_DIFF,
                )
        if PHASE == _ALL:
            # Four arrivals in all, as without a lookup two.
            grid_wait(p_barrier, grid_arrive(p_barrier, n_programs))
            b_ticket = grid_arrive(p_barrier, n_programs)
            grid_wait(p_barrier, b_ticket)

    if PHASE == _ALL or PHASE == _SELECT:
        n_selected = tl.cdiv(n_slots, BLOCK_S)
        n_groups = 1 + n_selected + tl.cdiv(n_large, BLOCK_S)
        for i in range(i_program, n_rows * n_groups, n_programs):
            i_row = (i // n_groups).to(tl.int64)
            i_group = i % n_groups
            p_row = p_h + i_row * d_in
            b_plan = plan_rows(p_rows, p_positions, p_start, i_row, i_row < n_rows)
            if b_plan >= 0:
                if i_group == 0:
                    prepare_row(
                        p_row,
                        p_normalised,
                        p_scale,
                        p_norms,
                        p_mean,
                        p_finite,
                        p_maximum,
                        p_beaten,
                        i_row,
                        d_in,
                        n_slots,
                        NORMALIZE,
                        BLOCK_C,
                        BLOCK_SLOTS,
                    )
                elif i_group <= n_selected:
                    o_slot = (i_group - 1) * BLOCK_S + tl.arange(0, BLOCK_S)
                    m_slot = o_slot < n_slots
                    b_slot = tl.load(p_slots + b_plan.to(tl.int64) * n_slots + o_slot, mask=m_slot, other=-1)
                    b_f = latent_values(
                        p_row,
                        p_columns_W_enc,
                        p_columns_b_enc,
                        p_columns_threshold,
                        b_slot,
                        b_slot >= 0,
                        d_in,
                        NORMALIZE,
                        TOP_K,
                        BLOCK_S,
                        BLOCK_C,
                    )
                    tl.store(p_value + i_row * (n_slots + n_large) + o_slot, b_f, mask=m_slot)
                else:
                    o_large = (i_group - 1 - n_selected) * BLOCK_S + tl.arange(0, BLOCK_S)
                    m_large = o_large < n_large
                    b_f = latent_values(
                        p_row,
                        p_W_enc,
                        p_b_enc,
                        p_threshold,
                        o_large,
                        m_large,
                        d_in,
                        NORMALIZE,
                        TOP_K,
                        BLOCK_S,
                        BLOCK_C,
                    )
                    tl.store(p_value + i_row * (n_slots + n_large) + n_slots + o_large, b_f, mask=m_large)
    if PHASE == _ALL:
        grid_wait(p_barrier, grid_arrive(p_barrier, n_programs))

    n_streamed = 0
    if PHASE == _ALL or PHASE == _STREAM:
        n_read = 0
        n_tiles = tl.cdiv(d_sae, BLOCK_L)
        for i_first in range(0, n_rows, BLOCK_N):
            o_row = i_first + tl.arange(0, BLOCK_N)
            b_plan = plan_rows(p_rows, p_positions, p_start, o_row, o_row < n_rows)
            m_finite, b_need, b_least, b_bound = summarise(
                p_signs, p_finite, p_value, o_row, b_plan, n_slots, n_large, BLOCK_N, BLOCK_SLOTS
            )
            m_waiting = b_need > 0
            if SETTLE:
                m_waiting = m_waiting & (b_need > alpha * b_bound)
            b_waiting = tl.sum(m_waiting.to(tl.int32), axis=0)
            n_streamed += b_waiting
            if b_waiting > 0:
                for i_tile in range(i_program, n_tiles, n_programs):
                    m_open = m_waiting
                    # Others may have raised it: past the first-level cache, which would not see that.
                    b_now = tl.load(p_maximum + o_row, mask=m_waiting, other=0, cache_modifier=".cg")
                    b_floor = tl.maximum(b_bound, b_now.to(tl.float32, bitcast=True))
                    if SETTLE:
                        m_open = m_waiting & (b_need > alpha * b_floor)
                    if tl.max(m_open.to(tl.int32), axis=0) > 0:
                        n_read += stream_tile(
                            p_x,
                            p_W_enc,
                            p_b_enc,
                            p_threshold,
                            p_order,
                            p_screen_W,
                            p_screen,
                            p_norms,
                            p_columns,
                            p_slots,
                            p_value,
                            p_maximum,
                            p_beaten,
                            i_tile * BLOCK_L,
                            i_first,
                            b_plan,
                            m_open,
                            b_least,
                            b_floor,
                            d_in,
                            d_sae,
                            n_slots,
                            n_large,
                            TOP_K,
                            PRECISION,
                            BLOCK_N,
                            BLOCK_L,
                            BLOCK_K,
                        )
        if p_paths is not None:
            tl.atomic_add(p_paths + 5, n_read.to(tl.int64), sem="relaxed")
    if PHASE == _ALL:
        b_ticket = grid_arrive(p_barrier, n_programs)
        # Every program finds the same: without a stream there is nothing to wait for.
        if n_streamed > 0:
            grid_wait(p_barrier, b_ticket)

    if PHASE == _ALL or PHASE == _TAIL:
        n_chunks = tl.cdiv(d_in, BLOCK_D)
        for i in range(i_program, n_rows * n_chunks, n_programs):
            i_row = (i // n_chunks).to(tl.int64)
            edit_row(
                p_h,
                p_out,
                p_columns_W_dec,
                p_slots,
                p_signs,
                p_scale,
                p_value,
                p_maximum,
                p_beaten,
                p_finite,
                p_before,
                p_after,
                p_most,
                p_paths,
                i_row,
                i % n_chunks,
                plan_rows(p_rows, p_positions, p_start, i_row, i_row < n_rows),
                alpha,
                k,
                d_in,
                n_slots,
                n_large,
                RECORD,
                BLOCK_SLOTS,
                BLOCK_D,
            )


_streams: dict[tuple[int | None, int], int] = {}
_captures = itertools.count()


def barrier_of(barriers: Tensor) -> Tensor:
    """The word on which this launch's programs wait for each other.

    One a stream, since launches of two streams may run at the same time; one a captured launch, since a graph
    may be replayed on any stream (after 32 the first is taken again).
    """
    half = N_BARRIERS // 2
    if INTERPRETED:
        return barriers[0]
    if torch.cuda.is_current_stream_capturing():
        return barriers[half + next(_captures) % half]
    stream = (barriers.device.index, torch.cuda.current_stream(barriers.device).cuda_stream)
    i = _streams.setdefault(stream, len(_streams))
    return barriers[i] if i < half else torch.zeros_like(barriers[0])


def launch_steer(
    h: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    k: int,
    normalize: str,
    order: Tensor | None,
    n_large: int,
    screen_W_enc: Tensor | None,
    screen_latents: Tensor | None,
    screen_mean: Tensor | None,
    barriers: Tensor,
    columns: Tensor,
    columns_W_enc: Tensor,
    columns_b_enc: Tensor,
    columns_threshold: Tensor,
    columns_W_dec: Tensor,
    slots: Tensor,
    signs: Tensor,
    rows: Tensor | None,
    positions: Tensor | None,
    start: Tensor | None,
    paths: Tensor | None,
    alpha: float,
    record: bool,
    lookup: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One launch; with `lookup`, which first fills slots and signs, of `lookup_and_steer`."""
    (n_rows, d_in), d_sae = h.shape, len(W_enc)
    n_prompts, n_slots = slots.shape
    out = torch.empty_like(h, memory_format=torch.contiguous_format)
    full = h.new_empty((n_rows if record else 0), n_slots, dtype=torch.float32), n_rows if record else 0
    before, after, most = full[0], torch.empty_like(full[0]), h.new_empty(full[1], dtype=torch.float32)
    if not n_rows and lookup is None:
        return out, before, after, most

    def scratch(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=h.device)

    normalised = normalize != "none"
    multiply = precision(h, W_enc, normalize)
    kernel = "steer" + ("_topk" if k else "") + ("" if screen_W_enc is None else "_int8")
    launch = launch_parameters(kernel, n_rows, d_in, d_sae, multiply, h.device)
    arguments: dict[str, Any] = {
        "p_h": h.contiguous(),
        "p_W_enc": W_enc,
        "p_b_enc": b_enc,
        "p_threshold": threshold,
        "p_order": order if k else None,
        "p_screen_W": screen_W_enc,
        "p_screen": screen_latents,
        "p_mean": screen_mean,
        "p_columns": columns,
        "p_columns_W_enc": columns_W_enc,
        "p_columns_b_enc": columns_b_enc,
        "p_columns_threshold": columns_threshold,
        "p_columns_W_dec": columns_W_dec,
        "p_slots": slots.contiguous(),
        "p_signs": signs.contiguous(),
        "p_rows": None if rows is None else rows.contiguous(),
        "p_positions": None if positions is None else positions.contiguous(),
        "p_start": None if start is None else start.contiguous(),
        "p_paths": paths,
        "p_out": out,
        "p_before": before if record else None,
        "p_after": after if record else None,
        "p_most": most if record else None,
        "p_normalised": scratch(n_rows, d_in, dtype=torch.float32) if normalised else None,
        "p_scale": scratch(n_rows, dtype=torch.float32) if normalised else None,
        "p_norms": None if screen_W_enc is None else scratch(n_rows, 2, dtype=torch.float32),
        "p_value": scratch(n_rows, n_slots + n_large, dtype=torch.float32),
        "p_finite": scratch(n_rows),
        "p_maximum": scratch(n_rows),
        "p_beaten": scratch(n_rows, n_slots) if k else None,
        "p_barrier": barrier_of(barriers),
        "alpha": alpha,
        "k": k,
        "d_in": d_in,
        "d_sae": d_sae,
        "n_rows": n_rows,
        "n_prompts": n_prompts,
        "n_columns": len(columns),
        "n_slots": n_slots,
        "n_large": n_large,
        "RECORD": record,
        "NORMALIZE": normalize,
        "PRECISION": multiply,
        "BLOCK_S": BLOCK_S,
        "BLOCK_C": BLOCK_C,
        "BLOCK_D": BLOCK_D,
        "BLOCK_SLOTS": BLOCK_SLOTS,
        **(lookup or NO_LOOKUP),
    }
    programs = n_programs(h.device, launch.programs)
    for phase in (LOOKUP, SELECT, STREAM, TAIL) if INTERPRETED else (ALL,):
        steer_kernel[(programs,)](
            **arguments, n_programs=programs, PHASE=phase, **launch.kernel_options(), launch_cooperative_grid=True
        )
    return out, before, after, most


NO_LOOKUP = {"p_counts": None, "p_values": None, "p_prompt": None, "p_key": None} | {
    name: 0 for name in ("d_sae_in", "k_prompt", "k_diff")
}


def steer(**arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h', before, after, maximum."""
    return launch_steer(**arguments)
