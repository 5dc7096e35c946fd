"""Record of edits."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TextIO

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dspa.data.records import read_records
from dspa.data.token_texts import token_text
from dspa.errors import TraceError, refusal
from dspa.outputs import replacing
from dspa.schemas import check
from dspa.steering.edits import N_NAMES, Edit, SteeredText, Summary
from dspa_kernels import Edits


class Trace:
    """Edits in the order in which they were made. Iterate for `Edit` records, `print` a summary, or `save` them.

    Attributes:
        tokenizer: the model's tokenizer, which gives edits their text. It can be set at any time.
        promoted: the tokens that latents promote most, which show what latents mean; those of the map, if it has them.
        map_digest: `ConditionalDifferenceMap.digest` of the map, "" where it is not known.
        texts: the texts that `end` was told of.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        promoted: Mapping[int, list[str]] | None = None,
        map_digest: str = "",
    ) -> None:
        self.tokenizer, self.promoted, self.map_digest = tokenizer, promoted or {}, map_digest
        self.texts: list[SteeredText] = []
        self._edits: list[Edit] = []
        self._call = 0

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
        self._call = call
        changed = edits.before != edits.after
        for n in changed.any(dim=1).nonzero().flatten().tolist():
            row, which = n if rows is None else int(rows[n]), changed[n]
            self._edits.append(
                Edit(
                    call=call,
                    row=row,
                    position=int(positions[n]),
                    maximum=None if edits.maximum is None else edits.maximum[n].item(),
                    latents=latents[row][which].tolist(),
                    before=edits.before[n][which].tolist(),
                    after=edits.after[n][which].tolist(),
                    token=None if tokens is None else int(tokens[n]),
                )
            )

    def end(self, firsts: Sequence[int], n_tokens: Sequence[int]) -> None:
        """Note where the texts of the latest call end, and remove its edits after that.

        A batch runs until its longest text has ended, and what comes after the end of a text is padding.

        Args:
            firsts: position of the first token that each row predicted with steering.
            n_tokens: number of tokens that each row predicted with steering.
        """
        ends = [first + n for first, n in zip(firsts, n_tokens, strict=True)]
        self._edits = [edit for edit in self._edits if edit.call != self._call or edit.position < ends[edit.row]]
        self.texts += [SteeredText(self._call, row, n, self.map_digest) for row, n in enumerate(n_tokens)]

    def clear(self) -> None:
        """Remove all edits and texts."""
        self._edits.clear()
        self.texts.clear()

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
        """Write JSON Lines, one record per edited token, and one per text that has ended."""
        with replacing(Path(path)) as made, made.open("w", encoding="utf-8") as file:
            self.write(file)

    def write(self, file: TextIO) -> None:
        """Write the same to an open file, as to keep the traces of many calls."""
        for record in (*self, *self.texts):
            file.write(json.dumps(asdict(record)) + "\n")


def read_trace(path: str | Path) -> tuple[list[Edit], list[SteeredText]]:
    """Read what `Trace.save` or `dspa generate --trace` wrote: edits, and the texts that have ended.

    Raises:
        TraceError: a file that is not a trace, or a damaged record.
    """
    edits, texts = list[Edit](), list[SteeredText]()
    for name, record in read_records(path, TraceError):
        if isinstance(record, Mapping) and "latents" in record:
            edit = check(Edit, record, TraceError, name)
            if not len(edit.latents) == len(edit.before) == len(edit.after):
                raise refusal(TraceError, name, "damaged: its lists differ in length", "one value per latent")
            edits.append(edit)
        elif isinstance(record, Mapping) and "n_tokens" in record:
            texts.append(check(SteeredText, record, TraceError, name))
        else:
            raise refusal(TraceError, name, repr(record)[:60], "a record that dspa generate --trace wrote")
    return edits, texts
