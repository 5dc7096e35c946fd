"""Tables of densities, triples by latents, read from shards one block of columns at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from dspa.errors import MapError, refusal
from dspa.maps.collection import Collection
from dspa.maps.shards import FIELDS

# Differences of densities are rounded to multiples of this, so that sums of up to MOST_TRIPLES of them are exact in
# fp64, in any order. An entry of the map is then known to half of it, and equal entries differ by at most one of it.
QUANTUM = 2.0**-32
MOST_TRIPLES = 1 << 20
# Largest number of entries of a block of columns, which is held at once.
ENTRIES_PER_BLOCK = 1 << 25

Matrix: TypeAlias = Any  # scipy.sparse.csr_array
Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


class DensityTable:
    """Densities of a subset of triples, read from shards one block of columns at a time.

    Rows are triples, in the order of the shards, and the same for every part.

    Args:
        collection: the counts.
        count_tokens: "all" tokens or "text", as for `reduce`.
        subset: as for `reduce`.
    """

    def __init__(self, collection: Collection, count_tokens: str, subset: Sequence[int] | Tensor | None) -> None:
        self.collection, self.settings, self.count_tokens = collection, collection.settings, count_tokens
        self._rows = _subset_rows([shard["index"].numpy() for shard in collection.shards("index")], subset)
        self.n_triples = sum(map(len, self._rows))
        if self.n_triples > MOST_TRIPLES:
            got, advice = f"{self.n_triples}", "Beyond that, sums would not be exact."
            raise refusal(MapError, "The number of triples", got, f"at most {MOST_TRIPLES}", advice)
        cut = zip(collection.shards("cut"), self._rows, strict=True)
        self.n_cut = sum(int(shard["cut"].numpy()[rows].sum()) for shard, rows in cut)

    def width(self, part: str) -> int:
        """Return the width of the SAE whose latents are counted on a part."""
        return self.settings.d_sae_in if part == "prompt" else self.settings.d_sae_out

    def prompt_counts(self) -> Tensor:
        """Return the dense counts [N, d_sae_in] int32 of the prompts, for a table of few triples."""
        position = np.arange(self.settings.d_sae_in, dtype=np.int32)
        return torch.from_numpy(
            sparse.vstack([counts for counts, _ in self._read_counts("prompt", position)]).toarray()
        )

    def entries(self, part: str) -> Array:
        """Return the number of triples on which each latent is active, [width] int64."""
        width = self.width(part)
        total = np.zeros(width, dtype=np.int64)
        for counts, _ in self._read_counts(part, np.arange(width, dtype=np.int32)):
            total += np.bincount(counts.indices, minlength=width)
        return total

    def densities(self, part: str, latents: Array) -> Matrix:
        """Return `rho`, the fractions of each text's tokens on which some latents are active.

        Args:
            part: "prompt", "chosen" or "rejected".
            latents: in increasing order.

        Returns:
            [N, len(latents)] fp64.
        """
        position = np.full(self.width(part), -1, dtype=np.int32)
        position[latents] = np.arange(len(latents), dtype=np.int32)
        blocks = []
        for counts, lengths in self._read_counts(part, position, len(latents)):
            # At least 1, because a text whose tokens are all special has no text tokens to count.
            n_tokens = np.repeat(np.maximum(lengths, 1), np.diff(counts.indptr))
            blocks.append(sparse.csr_array((counts.data / n_tokens, counts.indices, counts.indptr), shape=counts.shape))
        return sparse.vstack(blocks, format="csr")

    def difference(self, latents: Array) -> Matrix:
        """Return `rho~(y+) - rho~(y-)` [N, len(latents)] in fp64, rounded to multiples of QUANTUM."""
        difference = self.densities("chosen", latents) - self.densities("rejected", latents)
        difference.data = np.round(difference.data / QUANTUM) * QUANTUM
        return difference

    def _read_counts(self, part: str, position: Array, width: int | None = None) -> Iterator[tuple[Matrix, Array]]:
        """Yield the counts [n, width] and the lengths [n] of each shard, where `position` is the column of a latent."""
        names = [part, f"{part}_special"] if self.count_tokens == "text" else [part]
        fields = [f"{name}.{field}" for name in names for field in FIELDS]
        for shard, rows in zip(self.collection.shards(*fields), self._rows, strict=True):
            tables = [_csr({f: shard[f"{name}.{f}"].numpy() for f in FIELDS}, position, width) for name in names]
            lengths = [shard[f"{name}.lengths"].numpy() for name in names]
            counts, length = tables[0], lengths[0]
            if len(names) > 1:
                counts, length = counts - tables[1], length - lengths[1]
            if not np.array_equal(rows, np.arange(len(length))):
                counts, length = counts[rows], length[rows]
            yield counts, length


def split_by_entries(latents: Array, entries: Array) -> Iterator[Array]:
    """Yield blocks of neighbouring latents with about ENTRIES_PER_BLOCK entries each."""
    block_of = np.cumsum(entries[latents]) // ENTRIES_PER_BLOCK
    for start, end in pairwise([0, *(np.flatnonzero(np.diff(block_of)) + 1).tolist(), len(latents)]):
        yield latents[start:end]


def _csr(counts: dict[str, Array], position: Array, width: int | None) -> Matrix:
    """Return the counts as a sparse matrix, without the latents whose position is -1."""
    columns = position[counts["latents"]]
    kept = columns >= 0
    starts = np.concatenate(([0], np.cumsum(kept)))[counts["starts"]]
    shape = (len(starts) - 1, len(position) if width is None else width)
    return sparse.csr_array((counts["counts"][kept], columns[kept], starts), shape=shape)


def _subset_rows(index: Sequence[Array], subset: Sequence[int] | Tensor | None) -> list[Array]:
    """Return the rows of each shard that are in the subset, repeats kept.

    Args:
        index: numbers of the triples of each shard.
        subset: numbers of triples, or a mask. Default: all.

    Raises:
        MapError: numbers of no triples.
    """
    if subset is None:
        return [np.arange(len(numbers)) for numbers in index]
    given, n_triples = np.asarray(subset), sum(map(len, index))
    if given.dtype == bool and given.shape == (n_triples,):
        given = np.flatnonzero(given)
    wanted = np.sort(given.ravel())
    whole = wanted.dtype.kind in "iu"
    if not given.ndim or not len(wanted) or not whole or wanted[0] < 0 or wanted[-1] >= n_triples:
        kind = "numbers" if whole else wanted.dtype
        got = f"{kind} from {wanted[0]} to {wanted[-1]}" if len(wanted) else "empty"
        accepted = f"several numbers of triples, 0 to {n_triples - 1}, or a mask of {n_triples}"
        raise refusal(MapError, "`subset`", got, accepted)
    repeats = (
        np.searchsorted(wanted, numbers, "right") - np.searchsorted(wanted, numbers, "left") for numbers in index
    )
    return [np.repeat(np.arange(len(times)), times) for times in repeats]
