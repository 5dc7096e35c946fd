"""`steer` in Triton: one cooperative launch of select, stream and tail, with a grid barrier between them.

- *lookup* (`lookup_and_steer` alone): a program a prompt chooses its slots.
- *select*: the values of each row's selected latents, and of the large latents that bound its maximum.
- *stream*: where some row still needs its maximum, the encoder, tile by tile, until every row is settled.
- *tail*: `h + scale sum_j (f'_j - f_j) W_dec[j]`.

What a phase leaves for the next lies in scratch that is written before it is read, so nothing is cleared.
"""

from __future__ import annotations

import collections
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dspa_kernels.launch import launch_parameters
from dspa_kernels.ops.map_lookup.triton_impl import lookup_prompt
from dspa_kernels.ops.steer.triton_select import latent_values, plan_rows, prepare_row
from dspa_kernels.ops.steer.triton_stream import stream_tile, waiting_rows
from dspa_kernels.ops.steer.triton_tail import edit_row
from dspa_kernels.ops.triton_common import INTERPRETED, grid_arrive, grid_wait, n_programs, precision
from dspa_kernels.weights import N_BARRIERS

# The interpreter runs programs one after the other, so that each phase is a launch of its own there.
LOOKUP, SELECT, STREAM, TAIL, ALL = range(5)
_LOOKUP, _SELECT, _STREAM = tl.constexpr(LOOKUP), tl.constexpr(SELECT), tl.constexpr(STREAM)
_TAIL, _ALL = tl.constexpr(TAIL), tl.constexpr(ALL)
# Latents that one program of the select phase evaluates together, and how much of a row it reads at a time.
BLOCK_S, BLOCK_C = 8, 512
# Slots that are looked at together, and columns that one program of the tail writes.
BLOCK_SLOTS, BLOCK_D = 16, 256


SIZES = ("k", "d_sae", "d_sae_in", "n_rows", "n_prompts", "n_columns", "n_slots", "n_large", "k_prompt", "k_diff")


@triton.jit(do_not_specialize=[*SIZES, "n_programs"])
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
    MANY: tl.constexpr,
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

    n_waiting = n_rows
    if PHASE == _ALL or PHASE == _STREAM:
        n_read = 0
        n_tiles = tl.cdiv(d_sae, BLOCK_L)
        if MANY:
            # Tile by tile, so that an encoder row comes from memory once for all rows.
            for i_tile in range(i_program, n_tiles, n_programs):
                for i_first in range(0, n_rows, BLOCK_N):
                    b_plan, m_waiting, b_need, b_least, b_bound = waiting_rows(
                        p_rows,
                        p_positions,
                        p_start,
                        p_signs,
                        p_finite,
                        p_value,
                        i_first,
                        alpha,
                        n_rows,
                        n_slots,
                        n_large,
                        SETTLE,
                        BLOCK_N,
                        BLOCK_SLOTS,
                    )
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
                        m_waiting,
                        b_need,
                        b_least,
                        b_bound,
                        alpha,
                        d_in,
                        d_sae,
                        n_slots,
                        n_large,
                        SETTLE,
                        TOP_K,
                        PRECISION,
                        BLOCK_N,
                        BLOCK_L,
                        BLOCK_K,
                    )
        else:
            b_plan, m_waiting, b_need, b_least, b_bound = waiting_rows(
                p_rows,
                p_positions,
                p_start,
                p_signs,
                p_finite,
                p_value,
                0,
                alpha,
                n_rows,
                n_slots,
                n_large,
                SETTLE,
                BLOCK_N,
                BLOCK_SLOTS,
            )
            n_waiting = tl.sum(m_waiting.to(tl.int32), axis=0)
            if n_waiting > 0:
                for i_tile in range(i_program, n_tiles, n_programs):
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
                        0,
                        b_plan,
                        m_waiting,
                        b_need,
                        b_least,
                        b_bound,
                        alpha,
                        d_in,
                        d_sae,
                        n_slots,
                        n_large,
                        SETTLE,
                        TOP_K,
                        PRECISION,
                        BLOCK_N,
                        BLOCK_L,
                        BLOCK_K,
                    )
        if p_paths is not None:
            tl.atomic_add(p_paths + 5, tl.cast(n_read, tl.int64), sem="relaxed")
    if PHASE == _ALL:
        b_ticket = grid_arrive(p_barrier, n_programs)
        # Every program finds the same: where no row waited for a stream there is nothing to wait for.
        if n_waiting > 0:
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
_captures: collections.Counter[int] = collections.Counter()


def barrier_of(barriers: Tensor) -> Tensor:
    """The word on which this launch's programs wait for each other.

    One a stream, since launches of two streams may run at the same time; one a captured launch, since a graph
    may be replayed on any stream. Where all are taken, a new one.
    """
    half = N_BARRIERS // 2
    if INTERPRETED:
        return barriers[0]
    if torch.cuda.is_current_stream_capturing():
        owner = barriers.data_ptr()
        _captures[owner] += 1
        i = half + _captures[owner] - 1
        return barriers[i] if i < N_BARRIERS else torch.zeros_like(barriers[0])
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
        "p_maximum": scratch(triton.cdiv(n_rows, launch.BLOCK_N) * launch.BLOCK_N),
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
        "MANY": n_rows > launch.BLOCK_N,
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


NO_LOOKUP = dict.fromkeys(("p_counts", "p_values", "p_prompt", "p_key")) | dict.fromkeys(
    ("d_sae_in", "k_prompt", "k_diff"), 0
)


def steer(**arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h', before, after, maximum."""
    return launch_steer(**arguments)
