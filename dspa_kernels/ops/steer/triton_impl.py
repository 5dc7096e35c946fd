"""`steer` in Triton: one cooperative launch of its phases, with grid barriers between them.

- *prepare* (with a lookup, a residual or normalised rows): a prompt's slots, a row's sum and normalisation.
- *select*: the row's state, its selected latents, and the large latents that bound its maximum.
- *stream*: the running maxima over the encoder, tile by tile, until every row is settled.
- *evaluate* (with a screen, whose copy is streamed instead): the running maxima over the candidates that it leaves.
- *tail*: `h + scale sum_j (f'_j - f_j) W_dec[j]`.

Phases hand results on in scratch that is written before it is read, so nothing is cleared. More rows than a tile holds
take one launch per phase.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from dspa_kernels.barriers import barrier_word
from dspa_kernels.launch import FULL, launch_parameters, precision, steer_variant
from dspa_kernels.ops.shared.triton_grid import launch_cooperative, n_programs
from dspa_kernels.ops.shared.triton_tiles import INTERPRETED
from dspa_kernels.ops.steer.contract import empty_results
from dspa_kernels.ops.steer.triton_kernel import ALL, EVALUATE, PREPARE, SELECT, STREAM, TAIL, steer_kernel
from dspa_kernels.ops.steer.triton_select import BLOCK_S
from dspa_kernels.ops.steer.triton_tail import BLOCK_D

SCREENED_ROWS = 64


class Encoder(NamedTuple):
    """The rows that are streamed; `order` only for top-k."""

    rows: Tensor
    b_enc: Tensor
    threshold: Tensor
    order: Tensor | None


class Screen(NamedTuple):
    """The screen of an `EncoderStream`, whose tensors are all there if one is."""

    rows: Tensor
    latents: Tensor | None
    mean: Tensor | None


class Columns(NamedTuple):
    """The latents that can be steered."""

    latents: Tensor
    encoder_rows: Tensor
    b_enc: Tensor
    threshold: Tensor
    W_dec: Tensor


class Record(NamedTuple):
    """The edits, where they are recorded."""

    before: Tensor
    after: Tensor
    maximum: Tensor


class Lookup(NamedTuple):
    """Counts, the map, and the scratch of a lookup, latents [B, k_prompt] and key [B, C], int32."""

    counts: Tensor
    cdmap: Tensor
    latents: Tensor
    key: Tensor


class Scratch(NamedTuple):
    """Memory in which one phase hands on to the next, written before it is read.

    Attributes:
        state: [N] int32, the plan row of each row, or why it has none.
        running_max: [N] int32, bits of the largest latent so far.
        rank: [N, S] int32, for top-k: latents that are ahead of each selected one.
        selected: [N, S] fp32, selected latents.
        partials: [P, N] fp32, the partial summaries that `summarise` describes.
        total: [N, d_in], the sums of rows that are carried in two parts, in their dtype.
        x: [N, d_in] fp32, normalised rows.
        scale: [N] fp32, what an edit of a normalised row is multiplied by.
        norms: [N, 2] fp32, for a screen, like the next four.
        screen_bound: [N] int32, bits of a lower bound on the largest latent.
        n_candidates: [1] int32.
        candidates: [d_sae] int32, of which the first n_candidates are written.
        upper: [d_sae, N] fp32, upper bounds of the candidates.
    """

    state: Tensor
    running_max: Tensor
    rank: Tensor | None
    selected: Tensor
    partials: Tensor
    total: Tensor | None
    x: Tensor | None
    scale: Tensor | None
    norms: Tensor | None
    screen_bound: Tensor | None
    n_candidates: Tensor | None
    candidates: Tensor | None
    upper: Tensor | None

    @classmethod
    def of(
        cls,
        h: Tensor,
        d_sae: int,
        n_slots: int,
        n_large: int,
        *,
        summed: bool,
        ranked: bool,
        normalised: bool,
        screened: bool,
    ) -> Scratch:
        """Allocate what a launch needs."""
        n_rows, d_in = h.shape

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=h.device)

        n_partials = 3 * triton.cdiv(n_slots, BLOCK_S) + triton.cdiv(n_large, BLOCK_S)
        return cls(
            state=empty(n_rows, dtype=torch.int32),
            running_max=empty(n_rows, dtype=torch.int32),
            rank=empty(n_rows, n_slots, dtype=torch.int32) if ranked else None,
            selected=empty(n_rows, n_slots),
            partials=empty(n_partials, n_rows),
            total=empty(n_rows, d_in, dtype=h.dtype) if summed else None,
            x=empty(n_rows, d_in) if normalised else None,
            scale=empty(n_rows) if normalised else None,
            norms=empty(n_rows, 2) if screened else None,
            screen_bound=empty(n_rows, dtype=torch.int32) if screened else None,
            n_candidates=empty(1, dtype=torch.int32) if screened else None,
            candidates=empty(d_sae, dtype=torch.int32) if screened else None,
            upper=empty(d_sae, n_rows) if screened else None,
        )


def steer(
    h: Tensor, encoder_rows: Tensor, slots: Tensor, record: bool, **arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return h', before, after and maximum."""
    out, *edits = results = empty_results(h, encoder_rows, slots.shape[1], record)
    run(h, None, out, Record(*edits) if record else None, encoder_rows=encoder_rows, slots=slots, **arguments)
    return results


def steer_(h: Tensor, residual: Tensor | None, **arguments: Any) -> None:
    """Edit h and residual in place."""
    run(h, residual, None, None, **arguments)


def run(
    h: Tensor,
    residual: Tensor | None,
    out: Tensor | None,
    record: Record | None,
    encoder_rows: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    k: int,
    normalize: str,
    order: Tensor | None,
    n_large: int,
    screen_rows: Tensor | None,
    screen_latents: Tensor | None,
    screen_mean: Tensor | None,
    columns: Tensor,
    columns_encoder_rows: Tensor,
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
    alphas: Tensor | None,
    strengths: Tensor | None = None,
    lookup: dict[str, Any] | None = None,
) -> None:
    """Write h' to `out`, or without it edit h and residual in place. With `lookup`, first fill slots and signs."""
    (n_rows, d_in), d_sae = h.shape, len(encoder_rows)
    n_prompts, n_slots = slots.shape
    if not n_rows and lookup is None:
        return

    shape = (d_in, d_sae, precision(h, encoder_rows, normalize), h.device)
    stream, screen = launch_parameters(steer_variant(k, screen_rows), n_rows, *shape), None
    # By instruction counts, products in fp32 and of more rows take longer than the read that a screen could spare.
    if screen_rows is not None:
        if shape[2] < FULL and n_rows <= min(stream.BLOCK_N, SCREENED_ROWS):
            screen = Screen(screen_rows, screen_latents, screen_mean)
        else:
            stream = launch_parameters(steer_variant(k, None), n_rows, *shape)
    arguments: dict[str, Any] = {
        "p_h": h.contiguous(),
        "p_residual": residual,
        "p_out": out,
        "encoder": Encoder(encoder_rows, b_enc, threshold, order if k else None),
        "screen": screen,
        "columns": Columns(columns, columns_encoder_rows, columns_b_enc, columns_threshold, columns_W_dec),
        "p_slots": slots.contiguous(),
        "p_signs": signs.contiguous(),
        "p_rows": None if rows is None else rows.contiguous(),
        "p_positions": None if positions is None else positions.contiguous(),
        "p_start": None if start is None else start.contiguous(),
        "p_strengths": None if strengths is None else strengths.contiguous(),
        "p_alphas": None if alphas is None else alphas.contiguous(),
        "p_paths": paths,
        "record": record,
        "lookup": None,
        "scratch": Scratch.of(
            h,
            d_sae,
            n_slots,
            n_large,
            summed=residual is not None,
            ranked=k > 0,
            normalised=normalize != "none",
            screened=screen is not None,
        ),
        "p_barrier": barrier_word(h.device),
        "alpha": alpha,
        "k": k,
        "d_in": d_in,
        "d_sae": d_sae,
        "d_sae_in": 0,
        "n_rows": n_rows,
        "n_prompts": n_prompts,
        "n_columns": len(columns),
        "n_slots": n_slots,
        "n_large": n_large,
        "k_prompt": 0,
        "k_diff": 0,
        "NORMALIZE": normalize,
        "PRECISION": shape[2],
        **(lookup or {}),
    }
    programs = n_programs(h.device, stream.programs)
    # The interpreter runs programs one after the other, so that none can wait for another.
    if n_rows <= stream.BLOCK_N and not INTERPRETED:
        launch_cooperative(steer_kernel, programs, **arguments, PHASE=ALL, **stream.kernel_options())
        return

    few = launch_parameters(steer_variant(k, None), 1, *shape)
    streams = strengths is None or k > 0
    prepares = lookup is not None or residual is not None or normalize != "none"
    n_large_items = triton.cdiv(n_large, BLOCK_S) * triton.cdiv(n_rows, few.BLOCK_N)
    for phase, n_items, launch in (
        (PREPARE, max(n_rows, n_prompts) if prepares else 0, few),
        (SELECT, n_large_items + n_rows * (1 + triton.cdiv(n_slots, BLOCK_S)), few),
        (STREAM, programs if streams else 0, stream),
        (EVALUATE, programs if streams and screen else 0, stream),
        (TAIL, n_rows * triton.cdiv(d_in, BLOCK_D), few),
    ):
        if n_items:
            grid = min(n_items, programs) if INTERPRETED else n_items
            many = n_rows > launch.BLOCK_N
            options = launch.kernel_options()
            steer_kernel[(grid,)](**arguments, n_programs=grid, PHASE=phase, MANY_ROWS=many, **options)
