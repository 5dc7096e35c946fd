"""Counts as tables of densities, triples by latents, read from shards a block of columns at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from dspa.errors import MapError
from dspa.maps.shards import FIELDS, Collection

COUNT_TOKENS = ("all", "text")
# Differences of densities become multiples of this, so that sums of up to MOST_TRIPLES of them are exact in fp64 in
# any order. An entry of the map is then known to half of it, and two equal ones are within one of it.
QUANTUM = 2.0**-32
MOST_TRIPLES = 1 << 20

Matrix: TypeAlias = Any  # scipy.sparse.csr_array
Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


class DensityTable:
    """Densities of a subset of triples, read from shards a block of columns at a time. Rows are triples, in the order
    of the shards, the same for every part."""

    def __init__(self, collection: Collection, count_tokens: str, subset: Sequence[int] | Tensor | None) -> None:
        self.collection, self.settings, self.count_tokens = collection, collection.settings, count_tokens
        self._rows = _chosen([shard["index"].numpy().copy() for shard in collection.shards("index")], subset)
        self.n_triples = sum(map(len, self._rows))
        if self.n_triples > MOST_TRIPLES:
            raise MapError(f"{self.n_triples} triples are more than {MOST_TRIPLES}, up to which sums are exact.")
        cut = zip(collection.shards("cut"), self._rows, strict=True)
        self.n_cut = sum(int(shard["cut"].numpy()[rows].sum()) for shard, rows in cut)

    def width(self, part: str) -> int:
        """Latents that a part is counted of."""
        return self.settings.d_sae_in if part == "prompt" else self.settings.d_sae_out

    def prompt_counts(self) -> Tensor:
        """Counts [N, d_sae_in] int32 of the prompts, dense: for a table of few triples."""
        place = np.arange(self.settings.d_sae_in, dtype=np.int32)
        return torch.from_numpy(sparse.vstack([counts for counts, _ in self._read("prompt", place)]).toarray())

    def entries(self, part: str) -> Array:
        """On how many triples each latent is active, [width] int64."""
        width = self.width(part)
        total = np.zeros(width, dtype=np.int64)
        for counts, _ in self._read(part, np.arange(width, dtype=np.int32)):
            total += np.bincount(counts.indices, minlength=width)
        return total

    def densities(self, part: str, latents: Array) -> Matrix:
        """`rho` [N, len(latents)] in fp64: the fraction of each text's tokens on which each of some latents, in
        increasing order, is active."""
        place = np.full(self.width(part), -1, dtype=np.int32)
        place[latents] = np.arange(len(latents), dtype=np.int32)
        blocks = []
        for counts, lengths in self._read(part, place, len(latents)):
            # A text whose tokens are all special has no text tokens to count.
            each = np.repeat(np.maximum(lengths, 1), np.diff(counts.indptr))
            blocks.append(sparse.csr_array((counts.data / each, counts.indices, counts.indptr), shape=counts.shape))
        return sparse.vstack(blocks, format="csr")

    def difference(self, latents: Array) -> Matrix:
        """`rho~(y+) - rho~(y-)` [N, len(latents)] in fp64, multiples of QUANTUM."""
        found = self.densities("chosen", latents) - self.densities("rejected", latents)
        found.data = np.round(found.data / QUANTUM) * QUANTUM
        return found

    def _read(self, part: str, place: Array, width: int | None = None) -> Iterator[tuple[Matrix, Array]]:
        """Of each shard, the counts [n, width] of latents at their place, where that is not -1, and lengths [n]."""
        names = [part, f"{part}_special"] if self.count_tokens == "text" else [part]
        fields = [f"{name}.{field}" for name in names for field in FIELDS]
        for shard, rows in zip(self.collection.shards(*fields), self._rows, strict=True):
            tables = [_csr({f: shard[f"{name}.{f}"].numpy() for f in FIELDS}, place, width) for name in names]
            lengths = [shard[f"{name}.lengths"].numpy() for name in names]
            counts, length = tables[0], lengths[0]
            if len(names) > 1:
                counts, length = counts - tables[1], length - lengths[1]
            if not np.array_equal(rows, np.arange(len(length))):
                counts, length = counts[rows], length[rows]
            yield counts, length


def _csr(counts: dict[str, Array], place: Array, width: int | None) -> Matrix:
    columns = place[counts["latents"]]
    kept = columns >= 0
    starts = np.concatenate(([0], np.cumsum(kept)))[counts["starts"]]
    shape = (len(starts) - 1, len(place) if width is None else width)
    return sparse.csr_array((counts["counts"][kept], columns[kept], starts), shape=shape)


def _chosen(index: Sequence[Array], subset: Sequence[int] | Tensor | None) -> list[Array]:
    """Which rows of each shard are in the subset, as often as they are. Raises `MapError` for numbers that are none."""
    if subset is None:
        return [np.arange(len(each)) for each in index]
    given, n_triples = np.asarray(subset), sum(map(len, index))
    if given.dtype == bool and given.shape == (n_triples,):
        given = np.flatnonzero(given)
    wanted = np.sort(given.ravel())
    whole = wanted.dtype.kind in "iu"
    if not given.ndim or not len(wanted) or not whole or wanted[0] < 0 or wanted[-1] >= n_triples:
        kind = "numbers" if whole else wanted.dtype
        told = f"{kind} from {wanted[0]} to {wanted[-1]}" if len(wanted) else "empty"
        raise MapError(
            f"`subset` is {told}; accepted: several numbers of triples, 0 to {n_triples - 1}, or a mask of {n_triples}."
        )
    times = (np.searchsorted(wanted, each, "right") - np.searchsorted(wanted, each, "left") for each in index)
    return [np.repeat(np.arange(len(each)), each) for each in times]
