"""Triples as token ids that TRL's trainers need not tokenize. Importing this needs the package datasets."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dspa.data.tokens import response_tokens
from dspa.data.triples import Triple, load_triples


class Rows(Dataset):  # type: ignore[misc]
    """Triples with the columns `prompt_ids`, `chosen_ids`, `rejected_ids`."""

    def map(self, *_args: Any, **_kwargs: Any) -> Rows:
        """Return the rows as they are."""
        return self


@dataclass(frozen=True)
class TripleRows:
    """Token ids of triples for a trainer.

    Attributes:
        rows: the triples.
        sha256: hash of the token ids.
        n_full: number of responses that fill all of max_length, because they were cut or just fit.
    """

    rows: Rows
    sha256: str
    n_full: int

    @classmethod
    def read(
        cls,
        source: Iterable[Triple | Mapping[str, Any]] | str | Path,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        progress: bool,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> TripleRows:
        """Read and tokenize triples.

        Raises:
            PreferenceError: a bad triple.
        """
        sha, n_full = hashlib.sha256(), 0
        columns: dict[str, list[Any]] = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
        for triple in tqdm(load_triples(source), unit="triple", desc="tokenise", disable=not progress):
            parts = response_tokens(triple, tokenizer, max_length=max_length, chat_template_kwargs=chat_template_kwargs)
            n_full += sum(len(parts[0]) + len(response) == max_length for response in parts[1:])
            for column, ids in zip(columns.values(), parts, strict=True):
                column.append(np.array(ids, dtype=np.int32))
                sha.update(len(ids).to_bytes(4, "little") + column[-1].tobytes())
        return cls(Rows.from_dict(columns), sha.hexdigest(), n_full)

    @property
    def counts(self) -> dict[str, int]:
        """Numbers for the training's record."""
        return {"n_triples": len(self.rows), "n_full": self.n_full}
