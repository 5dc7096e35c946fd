"""`steer` in CUDA C++ (`csrc/steer.cuh`) for a decoding step: one cooperative launch of select, stream and tail."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from dspa_kernels.barriers import barrier_word
from dspa_kernels.cuda_library import DTYPES, SteerArguments, fill, launch_steer
from dspa_kernels.ops.steer.contract import empty_results, entry_of

# Slots and large latents that are summarised together.
BLOCK = 16
# The version of each encoder when a launch last read it.
_versions = WeakTensorKeyDictionary()


def is_unchanged(encoder: Tensor) -> bool:
    """Return True if an earlier launch has read this encoder and nothing has written to it since.

    Only then may a launch be programmatic: it reads the encoder while the launch ahead of it may still be writing.
    Writes to an inference tensor do not show, so that it never counts as unchanged. Neither do writes through
    `encoder.data`, after which a new `EncoderStream` is needed.
    """
    if encoder.is_inference():
        return False
    unchanged: bool = _versions.get(encoder) == encoder._version
    _versions[encoder] = encoder._version
    return unchanged


def padded(n: int) -> int:
    """Round a number of 4-byte words up to whole cache lines."""
    return -(-n // 32) * 32


def steer(
    h: Tensor, encoder_rows: Tensor, slots: Tensor, record: bool, **arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return h', before, after and maximum."""
    out, *edits = results = empty_results(h, encoder_rows, slots.shape[1], record)
    run(h.contiguous(), out, edits if record else [], encoder_rows=encoder_rows, slots=slots, **arguments)
    return results


def steer_(h: Tensor, **arguments: Any) -> None:
    """Edit h and residual in place."""
    run(h, h, [], **arguments)


def run(
    h: Tensor,
    out: Tensor,
    edits: list[Tensor],
    encoder_rows: Tensor,
    k: int,
    normalize: str,
    order: Tensor | None,
    n_large: int,
    screen_rows: Tensor | None,
    screen_latents: Tensor | None,
    screen_mean: Tensor | None,
    columns: Tensor,
    columns_encoder_rows: Tensor,
    slots: Tensor,
    signs: Tensor,
    strengths: None,
    rows: Tensor | None,
    positions: Tensor | None,
    start: Tensor | None,
    alpha: float,
    alphas: Tensor | None,
    **unchanged: Tensor | None,
) -> None:
    """Write h' to `out`, and before, after and maximum to `edits`, if it has them.

    Where `out` is h itself, only the rows that change are written, and 0 to their residual. There are no `strengths`,
    which `cuda_obstacle` refuses.
    """
    (n_rows, d_in), n_slots = h.shape, slots.shape[1]
    if not n_rows:
        return

    # References keep the tensors alive until the launch is made. Addresses would not.
    tensors: dict[str, Tensor | None] = {
        **unchanged,
        **dict(zip(("before", "after", "maximum"), edits, strict=False)),
        "h": h,
        "out": out,
        "encoder_rows": encoder_rows,
        "order": order if k else None,
        "screen_rows": screen_rows,
        "screen_latents": screen_latents,
        "screen_mean": screen_mean,
        "columns": columns,
        "columns_encoder_rows": columns_encoder_rows,
        "slots": slots.contiguous(),
        "signs": signs.contiguous(),
        "rows": None if rows is None else rows.contiguous(),
        "positions": None if positions is None else positions.contiguous(),
        "start": None if start is None else start.contiguous(),
        "alphas": None if alphas is None else alphas.contiguous(),
        "barrier": barrier_word(h.device),
    }
    entry = entry_of(h, encoder_rows, k, normalize, screen_rows)
    streamed = encoder_rows if screen_rows is None else screen_rows
    arguments = SteerArguments()
    fill(
        arguments,
        **tensors,
        d_in=d_in,
        d_sae=len(encoder_rows),
        n_rows=n_rows,
        n_columns=len(columns),
        n_slots=n_slots,
        n_large=n_large,
        k=k,
        dtype=DTYPES[h.dtype],
        record=len(edits) > 0,
        programmatic=entry is not None and entry.programmatic and is_unchanged(streamed),
        ahead=entry is not None and entry.ahead,
        alpha=alpha,
    )
    n_summaries = -(-n_slots // BLOCK) - (-n_large // BLOCK)
    n_listed = 0 if screen_rows is None else len(encoder_rows)
    numbers = {
        "slot_values": n_rows * n_slots,
        "summaries": 3 * n_rows * n_summaries,
        "running_max": n_rows,
        "rank": n_rows * n_slots if k else 0,
        "screen_bound": n_rows if n_listed else 0,
        "n_candidates": 1 if n_listed else 0,
        "candidates": n_listed,
        "upper": n_rows * n_listed,
    }
    scratch = torch.empty(sum(map(padded, numbers.values())), dtype=torch.int32, device=h.device)
    starts = itertools.accumulate(map(padded, numbers.values()), initial=0)
    parts = zip(numbers.items(), starts, strict=False)
    fill(arguments, **{name: scratch.data_ptr() + 4 * start for (name, n), start in parts if n})
    launch_steer(arguments, h.device)
