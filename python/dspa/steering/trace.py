"""Record of edits: which token, which latents, by how much."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from torch import Tensor

from dspa_kernels import Edits


@dataclass(frozen=True)
class Edit:
    """One edited token.

    Attributes:
        call: number of the call of `generate()` or the model, from 0.
        row: sequence in the batch. A beam or return sequence counts as one.
        position: position_id of the token, whose residual predicts the token after it.
        maximum: `M_t`, the token's largest latent.
        latents: latents of the output SAE that changed.
        before, after: their values.
    """

    call: int
    row: int
    position: int
    maximum: float
    latents: list[int]
    before: list[float]
    after: list[float]


class Trace:
    """Edits in the order in which they were made. Iterate for `Edit` records, or `save` them."""

    def __init__(self) -> None:
        self._edits: list[Edit] = []

    def add(self, call: int, rows: Tensor | None, positions: Tensor, latents: Tensor, edits: Edits) -> None:
        """Add the edits of one step. Waits for the device.

        Args:
            call: number of the call.
            rows: plan row of each of N residual rows [N]; None if row n has plan row n.
            positions: position of each residual row [N].
            latents: latents of each plan row [B, S].
            edits: values of the latents before and after [N, S].
        """
        changed = edits.before != edits.after
        for n in changed.any(dim=1).nonzero().flatten().tolist():
            row, which = n if rows is None else int(rows[n]), changed[n]
            self._edits.append(
                Edit(
                    call=call,
                    row=row,
                    position=int(positions[n]),
                    maximum=float(edits.maximum[n]),
                    latents=latents[row][which].tolist(),
                    before=edits.before[n][which].tolist(),
                    after=edits.after[n][which].tolist(),
                )
            )

    def clear(self) -> None:
        """Remove all edits."""
        self._edits.clear()

    def __repr__(self) -> str:
        return f"Trace({len(self)} edited tokens)"

    def __len__(self) -> int:
        return len(self._edits)

    def __iter__(self) -> Iterator[Edit]:
        return iter(self._edits)

    def save(self, path: str | Path) -> None:
        """Write JSON Lines, one record per edited token."""
        with open(path, "w", encoding="utf-8") as file:
            self.write(file)

    def write(self, file: TextIO) -> None:
        """Write JSON Lines to an open file, one record per edited token, as to keep the traces of many calls."""
        for edit in self:
            file.write(json.dumps(asdict(edit)) + "\n")
