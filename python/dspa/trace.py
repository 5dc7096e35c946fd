"""A record of what was edited: which token, which latents, by how much."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from dspa_kernels import Edits


@dataclass(frozen=True)
class Edit:
    """One edited token.

    call: number of the call of `generate()` or the model, from 0; row: sequence in the batch (a beam or return
    sequence counts as one); position: the token's position_id, whose residual predicts the token after it;
    maximum: `M_t`; latents of the output SAE that changed, with their values before and after.
    """

    call: int
    row: int
    position: int
    maximum: float
    latents: list[int]
    before: list[float]
    after: list[float]


@dataclass(frozen=True)
class _Step:
    call: int
    rows: Tensor
    positions: Tensor
    latents: Tensor
    edits: Edits


class Trace:
    """Edits in the order in which they were made; iterate for `Edit` records, or `save` them."""

    def __init__(self) -> None:
        self._steps: list[_Step] = []

    def add(self, call: int, rows: Tensor, positions: Tensor, latents: Tensor, edits: Edits) -> None:
        """Keep one step: plan row and position of N residual rows [N], plan latents [B, S], edits [N, S]."""
        self._steps.append(_Step(call, rows, positions, latents, edits))

    def clear(self) -> None:
        """Forget everything."""
        self._steps.clear()

    def __iter__(self) -> Iterator[Edit]:
        for step in self._steps:
            changed = step.edits.before != step.edits.after
            for n in changed.any(dim=1).nonzero().flatten().tolist():
                row, which = int(step.rows[n]), changed[n]
                yield Edit(
                    call=step.call,
                    row=row,
                    position=int(step.positions[n]),
                    maximum=float(step.edits.maximum[n]),
                    latents=step.latents[row][which].tolist(),
                    before=step.edits.before[n][which].to(torch.float32).tolist(),
                    after=step.edits.after[n][which].to(torch.float32).tolist(),
                )

    def save(self, path: str | Path) -> None:
        """Write JSON Lines, one record an edited token."""
        with open(path, "w", encoding="utf-8") as file:
            for edit in self:
                file.write(json.dumps(asdict(edit)) + "\n")
