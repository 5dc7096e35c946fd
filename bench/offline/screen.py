"""Bytes of the encoder that steps read with the int5 screen, counted on the CPU: `python -m bench.offline.screen`.

The two passes are computed densely, in plain PyTorch, on rows like those of a trained SAE. Bytes are shares of one read
of the encoder in bf16, in the mean over all steps, of which some read nothing. They include the latents of the map and
the large ones, which are evaluated first. No time is measured.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.harness.machine import describe
from dspa_kernels.screen import quantise, quantise_rows
from dspa_kernels.testing import Activity, realistic_activity

SHAPES = ((2304, 16_384), (4096, 65_536))
ROWS, BATCH, ALPHA = 192, 64, 0.2
ROUNDING = 2.0**-22


@dataclass(frozen=True)
class Counted:
    """Bytes that steps read.

    Attributes:
        d_in: width of the residual stream.
        d_sae: number of latents.
        streamed: share of the rows that need the screen.
        candidates: rows of the encoder that are read for each of them, in the mean.
        one_row: bytes that a step of one row reads, as a share of the encoder in bf16.
        batch: bytes that a step of 64 rows reads, likewise.
    """

    d_in: int
    d_sae: int
    streamed: float
    candidates: float
    one_row: float
    batch: float


def count(activity: Activity, case: str = "hard") -> Counted:
    """Count the bytes that the rows of an activity read, alone and in batches.

    Raises:
        AssertionError: a maximum would be lost.
    """
    sae, h, large = activity.sae, activity.h.float(), activity.hot.long()
    cdmap, plan = activity.steered(case, len(h))
    pre = h @ sae.W_enc.float() + sae.b_enc
    f = torch.where((pre > sae.threshold) & (pre > 0), pre, 0)
    selected = f.gather(1, cdmap.columns[plan.slots.long()].long())
    required_shift = selected.amax(dim=1)
    bound = torch.maximum(f[:, large].amax(dim=1), required_shift)
    streams = required_shift > ALPHA * bound

    lower, upper = bounds(activity, h)
    certain = torch.where(lower > sae.threshold.clamp(min=0), lower, 0).amax(dim=1)
    final = torch.maximum(bound, certain)
    unsettled = streams & (required_shift > ALPHA * final)
    read = (upper >= certain[:, None]) & (upper > torch.maximum(bound[:, None], sae.threshold)) & unsettled[:, None]
    M = f.amax(dim=1, keepdim=True)
    assert read[(f == M) & unsettled[:, None] & (bound[:, None] < M)].all(), "a maximum was lost"

    row = 2 * sae.d_in
    # Five numbers and the threshold of each latent come with the copy.
    copy = sae.d_sae * (quantise_rows(sae.encoder_rows[:1], sae.b_enc[:1], activity.mean)[0].nbytes + 24)
    n_slots, n_columns = plan.slots.shape[1], len(cdmap.columns)

    def share(streams: Tensor, read: Tensor, evaluated: int) -> float:
        """Share of the encoder for steps that stream, and that read these rows of it [n_steps, d_sae]."""
        return (
            float((streams * copy + read.sum(dim=1) * row).double().mean()) / (sae.d_sae * row) + evaluated / sae.d_sae
        )

    batches = zip(streams.split(BATCH), read.split(BATCH), strict=True)
    any_streams, any_read = (torch.stack(x) for x in zip(*((s.any(), r.any(dim=0)) for s, r in batches), strict=True))
    return Counted(
        d_in=sae.d_in,
        d_sae=sae.d_sae,
        streamed=float(streams.float().mean()),
        candidates=float(read.sum(dim=1)[streams].float().mean()),
        one_row=share(streams, read, n_slots + len(large)),
        batch=share(any_streams, any_read, n_columns + len(large)),
    )


def bounds(activity: Activity, h: Tensor) -> tuple[Tensor, Tensor]:
    """Return lower and upper bounds [N, d_sae] on the pre-activations of rows h [N, d_in] fp32."""
    norms, centered = h.norm(dim=1, keepdim=True), (h - activity.mean).norm(dim=1, keepdim=True)
    norms, centered = (norm * 1.001 + 1e-17 for norm in (norms, centered))
    lower, upper = [], []
    for W, b in zip(activity.sae.encoder_rows.split(4096), activity.sae.b_enc.split(4096), strict=True):
        _, (scale, offset, slack, error, size) = quantise_rows(W, b, activity.mean)
        z = h @ quantise(W)[0].float().T * scale + offset
        E = slack + error * centered + size * (norms * (h.shape[1] + 32) * ROUNDING)
        lower.append(z - E)
        upper.append(z + E)
    return torch.cat(lower, dim=1), torch.cat(upper, dim=1)


def main(
    out: Annotated[Path | None, typer.Option(help="Write results here, as JSON.")] = None,
    commit: Annotated[str, typer.Option(help="The commit that is measured, where git does not know it.")] = "",
) -> None:
    """Count at (2304, 16384) and (4096, 65536), for the latents that are ablated most often."""
    table = Table(title=f"Bytes read per step, of the encoder in bf16 ({ROWS} rows, hard case)")
    results: list[dict[str, Any]] = []
    for column in ("SAE", "rows that stream", "candidates per row", "1 row", f"{BATCH} rows"):
        table.add_column(column, justify="left" if column == "SAE" else "right")
    for d_in, d_sae in SHAPES:
        counted = count(realistic_activity(d_in, d_sae, ROWS))
        results.append(asdict(counted))
        shares = (f"{share:.3f}" for share in (counted.one_row, counted.batch))
        table.add_row(f"{d_in} x {d_sae}", f"{counted.streamed:.2f}", f"{counted.candidates:.1f}", *shares)
    Console().print(table)
    if out is not None:
        date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        out.write_text(json.dumps(describe(commit) | {"date": date, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
