"""Triples and rankings as token ids that TRL need not tokenize. Importing this needs the package datasets."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dspa.data.rankings import Ranking
from dspa.data.tokens import response_tokens
from dspa.data.triples import Example


class Rows(Dataset):  # type: ignore[misc]
    """Triples with the columns `prompt_ids`, `chosen_ids`, `rejected_ids`, or rankings with those of `_columns`."""

    def map(self, *_args: Any, **_kwargs: Any) -> Rows:
        """Return the rows as they are."""
        return self


@dataclass(frozen=True)
class ExampleRows:
    """Token ids of triples or rankings for a trainer.

    Attributes:
        rows: the examples.
        noun: "triple" or "ranking".
        sha256: hash of the token ids, and of the rewards of rankings.
        n_full: number of responses that fill all of max_length, because they were cut or just fit.
    """

    rows: Rows
    noun: str
    sha256: str
    n_full: int

    @classmethod
    def read(
        cls,
        examples: Iterable[Example],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        progress: bool,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        *,
        noun: str = "triple",
    ) -> ExampleRows:
        """Read and tokenize examples.

        Raises:
            PreferenceError: a bad example.
        """
        sha, n_full = hashlib.sha256(), 0
        columns: dict[str, list[Any]] = defaultdict(list)
        for example in tqdm(examples, unit=noun, desc="tokenise", disable=not progress):
            ids = response_tokens(example, tokenizer, max_length=max_length, chat_template_kwargs=chat_template_kwargs)
            n_full += sum(len(ids[0]) + len(response) == max_length for response in ids[1:])
            arrays = [np.array(part, dtype=np.int32) for part in ids]
            for array in arrays:
                sha.update(len(array).to_bytes(4, "little") + array.tobytes())
            if isinstance(example, Ranking):
                sha.update(np.array(example.rewards, dtype="<f8").tobytes())
            for name, value in _columns(example, arrays).items():
                columns[name].append(value)
        return cls(Rows.from_dict(columns), noun, sha.hexdigest(), n_full)

    @property
    def counts(self) -> dict[str, int]:
        """Numbers for the training's record."""
        return {f"n_{self.noun}s": len(self.rows), "n_full": self.n_full}


def _columns(example: Example, ids: Sequence[np.ndarray[Any, Any]]) -> dict[str, Any]:
    prompt, *responses = ids
    if isinstance(example, Ranking):
        rewards = [float(reward) for reward in example.rewards]
        return {"prompt_ids": prompt, "response_ids": responses, "rewards": rewards}
    chosen, rejected = responses
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
