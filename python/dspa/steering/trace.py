"""Record of edits."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TextIO

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dspa.data.token_texts import token_text
from dspa.outputs import replacing
from dspa.steering.edits import N_NAMES, Edit, Summary
from dspa_kernels import Edits


class Trace:
    """Edits in the order in which they were made. Iterate for `Edit` records, `print` a summary, or `save` them.

    Attributes:
        tokenizer: the model's tokenizer, which gives edits their text. It can be set at any time.
        promoted: the tokens that latents promote most, which show what latents mean; those of the map, if it has them.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | None = None, promoted: Mapping[int, list[str]] | None = None
    ) -> None:
        self.tokenizer, self.promoted = tokenizer, promoted or {}
        self._edits: list[Edit] = []

    def add(
        self,
        call: int,
        rows: Tensor | None,
        positions: Tensor,
        tokens: Tensor | None,
        latents: Tensor,
        edits: Edits,
    ) -> None:
        """Add the edits of one step. Waits for the device.

        Args:
            call: number of the call.
            rows: plan row of each of N residual rows [N]; None if row n has plan row n.
            positions: position of each residual row [N].
            tokens: token id of each residual row [N]; None if they are unknown.
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
                    maximum=edits.maximum[n].item(),
                    latents=latents[row][which].tolist(),
                    before=edits.before[n][which].tolist(),
                    after=edits.after[n][which].tolist(),
                    token=None if tokens is None else int(tokens[n]),
                )
            )

    def clear(self) -> None:
        """Remove all edits."""
        self._edits.clear()

    def __repr__(self) -> str:
        return f"Trace({len(self)} edited tokens)"

    def __str__(self) -> str:
        return Summary.of(self, self.promoted).text()

    def _repr_html_(self) -> str:
        return Summary.of(self, self.promoted).html()

    def __len__(self) -> int:
        return len(self._edits)

    def __iter__(self) -> Iterator[Edit]:
        texts: dict[int, str] = {}
        for edit in self._edits:
            if self.promoted:
                edit = replace(edit, promoted=[self.promoted.get(latent, [])[:N_NAMES] for latent in edit.latents])
            if self.tokenizer is not None and edit.token is not None:
                if edit.token not in texts:
                    texts[edit.token] = token_text(self.tokenizer, edit.token)
                edit = replace(edit, text=texts[edit.token])
            yield edit

    def save(self, path: str | Path) -> None:
        """Write JSON Lines, one record per edited token."""
        with replacing(Path(path)) as made, made.open("w", encoding="utf-8") as file:
            self.write(file)

    def write(self, file: TextIO) -> None:
        """Write JSON Lines to an open file, one record per edited token, as to keep the traces of many calls."""
        for edit in self:
            file.write(json.dumps(asdict(edit)) + "\n")
