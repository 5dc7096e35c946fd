"""Residuals of layers for a file of text: documents are streamed through the model, and their rows shuffled.

The order depends only on the file, the settings and a seed. Rows are shuffled block by block, so that the stream can go
on from any place by reading only the block of that place again. The rows of a layer, and their order, are the same
whether it is read alone or with others.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from itertools import count, islice
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dspa.data.texts import TextFile, tokenize_entry
from dspa.errors import TextError, refusal
from dspa.models.layers import base_model, check_finite, device_of
from dspa.models.reading import read_layers
from dspa.saes.outliers import typical_rows
from dspa.schemas import Count, schema


@schema
class Position:
    """A place in the stream of a layer.

    Attributes:
        block: number of the block.
        entry: entry of the file with which the block begins.
        batch: batches of the block before this place.
        n_left_out: rows of outlying norm that were left out up to the end of the block.
    """

    block: Count = 0
    entry: Count = 0
    batch: Count = 0
    n_left_out: Count = 0


class Activations:
    """Residuals at the outputs of decoder layers, one row per token of the documents of a file.

    A document is tokenised as the model reads it (`tokenizer(text)`, `tokenize_triple`) and cut to `max_length` at
    its end. Its special tokens are read by the model. `exclude_special_tokens` leaves them out of the rows.

    Args:
        model, tokenizer: the model, in evaluation mode.
        texts: the file.
        indices: the decoder layers, from 0. One pass of the model reads them all.
        max_length: tokens per document.
        exclude_special_tokens: leave special tokens out of the rows.
        batch_tokens: padded tokens per forward pass.
        max_norm_ratio: leave rows with more than this many times the median norm of their block and layer out of the
            batches; 0 keeps all.
        layers: dotted path of the list of decoder layers, for an unknown architecture.
        progress: show a bar while the model reads, with the tokens read.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        texts: TextFile,
        indices: Sequence[int],
        *,
        max_length: int,
        exclude_special_tokens: bool,
        batch_tokens: int,
        max_norm_ratio: float = 0.0,
        layers: str | None = None,
        progress: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.texts, self.indices, self.layers = model, tokenizer, texts, indices, layers
        self.max_length, self.batch_tokens, self.max_norm_ratio = max_length, batch_tokens, max_norm_ratio
        self.progress = progress
        self.left_out = set(tokenizer.all_special_ids) if exclude_special_tokens else set()

    def held_out(self, n_tokens: int) -> tuple[dict[int, Tensor], int]:
        """Return the rows of the first entries of the file, and the number of these entries.

        The rows are [N, d_in] per layer, N >= n_tokens.
        Rows of any norm are among them: `evaluate_sae` leaves out and counts those of outlying norm.

        Raises:
            TextError: nothing would be left to train on.
        """
        documents, end = self._block(islice(self._entries(0, 0), self.texts.n_entries), n_tokens)
        if end >= self.texts.n_entries:
            raise TextError(
                f"{self.texts.path} has {self.texts.n_entries} entries, and {n_tokens} held-out tokens take them all; "
                "accepted: more text than is held out. Add text, or lower `held_out_tokens`."
            )
        return self.rows(documents, "reading held-out text"), end

    def batches(
        self,
        n_held_out: int,
        batch_size: int,
        buffer_tokens: int,
        seed: int,
        starts: Mapping[int, Position | None] | None = None,
    ) -> Iterator[tuple[int, Position, Tensor]]:
        """Yield batches [batch_size, d_in] fp32 without end, each with its layer and the layer's place right after it.

        They are rows of the entries after the first `n_held_out`, which are read over and over. A block is as many
        whole entries as give `buffer_tokens` rows. It gives the batches of the first layer, then those of the next.
        The rows of a layer are shuffled by themselves, without those of outlying norm. Rows at the end of a block that
        fill no batch are left out.

        Args:
            n_held_out: entries at the start of the file to leave out.
            batch_size: rows per batch.
            buffer_tokens: rows per block and layer.
            seed: seed of the order.
            starts: place of each layer from which to go on as an earlier call did; None for its beginning. A layer that
                is ahead of the others waits for them.
        """
        places = {index: (starts or {}).get(index) or Position(entry=n_held_out) for index in self.indices}
        begin = min(places.values(), key=lambda place: place.block)
        entries = self._entries(begin.entry, n_held_out)
        # At least half of the rows have a typical norm, so that a block always gives a batch.
        n_tokens = max(buffer_tokens, 2 * batch_size if self.max_norm_ratio else batch_size)
        for block in count(begin.block):
            documents, end = self._block(entries, n_tokens)
            read = self.rows(documents, "filling shuffle buffer")
            for index in [index for index in self.indices if places[index].block == block]:
                reached = places[index]
                for reached, batch in self._shuffled(read.pop(index), places[index], batch_size, seed):
                    yield index, reached, batch
                places[index] = Position(block + 1, end, n_left_out=reached.n_left_out)

    def _shuffled(self, rows: Tensor, at: Position, batch_size: int, seed: int) -> Iterator[tuple[Position, Tensor]]:
        """Yield the batches of a block's rows [N, d_in] from a place in it on, each with the place right after it."""
        typical = typical_rows(rows, self.max_norm_ratio)
        # A place within a block has counted the block.
        n_left_out = at.n_left_out + (0 if at.batch else int((~typical).sum()))
        rows = rows[typical]
        # torch would use only a part of a number beyond 32 bits.
        shuffle = torch.Generator().manual_seed(random.Random(f"{seed}/{at.block}").getrandbits(32))
        order = torch.randperm(len(rows), generator=shuffle).to(rows.device)
        for i in range(at.batch, len(rows) // batch_size):
            batch = rows[order[i * batch_size : (i + 1) * batch_size]].float()
            yield Position(at.block, at.entry, i + 1, n_left_out), batch

    def rows(self, documents: Sequence[list[int]], purpose: str = "reading") -> dict[int, Tensor]:
        """Return the residuals [N, d_in] of documents' tokens per layer, in the model's dtype.

        Args:
            documents: token ids of each document.
            purpose: description in front of the bar.

        Raises:
            ModelError: residuals that are not finite.
        """
        rows: dict[int, list[Tensor]] = {index: [] for index in self.indices}
        shown = {"unit": "token", "unit_scale": True, "leave": False, "disable": not self.progress}
        with tqdm(total=sum(map(len, documents)), desc=purpose, **shown) as bar:
            for batch in batches_by_length(documents, self.batch_tokens):
                for index, residuals in self._read(batch).items():
                    rows[index].append(residuals)
                bar.update(sum(map(len, batch)))
        return {index: torch.cat(rows.pop(index)) for index in self.indices}

    def _read(self, documents: Sequence[list[int]]) -> dict[int, Tensor]:
        tokens = torch.zeros(len(documents), max(map(len, documents)), dtype=torch.long)
        kept = torch.zeros(tokens.shape, dtype=torch.bool)
        for i, ids in enumerate(documents):
            # Padded on the right, where a causal model cannot see it.
            tokens[i, : len(ids)] = torch.tensor(ids)
            kept[i, : len(ids)] = torch.tensor([token not in self.left_out for token in ids])
        device = device_of(base_model(self.model).get_input_embeddings())
        read = read_layers(self.model, self.indices, self.layers, input_ids=tokens.to(device))
        rows = {index: h[kept.to(h.device)] for index, h in read.items()}
        for index in self.indices:
            check_finite(rows[index], index)
        return rows

    def _entries(self, entry: int, first: int) -> Iterator[tuple[int, list[list[int]]]]:
        """Yield the documents of each entry, with the number of the entry after it.

        Begins at `entry`, and after the last entry of the file again at `first`, without end.

        Raises:
            TextError: no entry from `first` on has a token for a row.
        """
        while True:
            has_rows, whole = False, entry <= first
            for number, content in enumerate(islice(self.texts.entries(), entry, None), start=entry + 1):
                documents = tokenize_entry(content, self.tokenizer, self.max_length)
                has_rows = has_rows or self._n_rows(documents) > 0
                yield number, documents
            if whole and not has_rows:
                raise refusal(
                    TextError,
                    f"{self.texts.path}: its text after the {first} held-out entries",
                    "without a token to train on: all of them are special tokens",
                    "text that has other tokens",
                    "Add text, or train on special tokens too: `exclude_special_tokens=False`.",
                )
            entry = first

    def _n_rows(self, documents: Iterable[list[int]]) -> int:
        return sum(token not in self.left_out for ids in documents for token in ids)

    def _block(self, entries: Iterator[tuple[int, list[list[int]]]], n_tokens: int) -> tuple[list[list[int]], int]:
        """Return the documents of the next entries, enough for `n_tokens` rows, and the number of the entry after."""
        block: list[list[int]] = []
        n_rows = end = 0
        while n_rows < n_tokens and (entry := next(entries, None)):
            end, documents = entry
            block += documents
            n_rows += self._n_rows(documents)
        return block, end


T = TypeVar("T", bound=Sized)


def batches_by_length(documents: Iterable[T], batch_tokens: int) -> Iterator[list[T]]:
    """Yield batches of documents of similar length, as many as fit `batch_tokens`, and at least one."""
    batch: list[T] = []
    for document in sorted(filter(len, documents), key=len):
        if batch and (len(batch) + 1) * len(document) > batch_tokens:
            yield batch
            batch = []
        batch.append(document)
    if batch:
        yield batch
