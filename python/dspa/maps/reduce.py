"""From counts to the map, without the model: in blocks of columns, exactly, and for any number of triples up to 2^20.

Every sum is of multiples of QUANTUM, so that it is exact in fp64 in any order: the same triples give the same map bit
for bit, however they were sharded, batched or ordered.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from tqdm import tqdm

from dspa.errors import MapError
from dspa.maps.cdmap import GATE_RULES, ConditionalDifferenceMap, MapMeta
from dspa.maps.shards import ROW_QUANTUM, Collection
from dspa.maps.table import COUNT_TOKENS, QUANTUM, Array, DensityTable, Matrix
from dspa.version import __version__

# What is held at once: entries of a block of columns; rows and columns of a product, and elements of a column block
# that is held dense; values of a map.
ENTRIES_PER_BLOCK = 1 << 25
ROWS_PER_TILE = 256
COLUMNS_PER_TILE = 8192
ELEMENTS_PER_TILE = 1 << 25
MOST_VALUES = 1 << 30
# A matrix product is faster than a sparse one from about this fraction of entries that are not zero.
DENSE = 0.1


def reduce(
    counts: Collection | str | Path,
    *,
    percentile: float = 90.0,
    gate_rule: str = "published",
    count_tokens: str = "all",
    k_diff: int = 16,
    sparsify: bool = True,
    subset: Sequence[int] | Tensor | None = None,
    progress: bool = False,
) -> ConditionalDifferenceMap:
    """The map of collected counts (DSPA, conditional-difference map).

    Args:
        counts: what `collect` returned, or its work_dir.
        percentile: of each prompt latent's density, from which its gate opens (published: 90), exactly.
        gate_rule: "published", or "active": a gate opens only where its latent is active at all.
        count_tokens: "all" tokens, as published, or "text": special tokens left out.
        k_diff: entries at each end of a row that set the cut of the sparsification (published: 16).
        sparsify: set entries below the cut to 0, as published.
        subset: numbers of the triples to use, from 0, or a mask over all; one that is given twice counts twice.
            Default: all.
        progress: show a bar.

    Raises:
        MapError: counts that are not complete or damaged, a map that is empty or does not fit.
    """
    collection = counts if isinstance(counts, Collection) else Collection.open(counts)
    check_settings(percentile, gate_rule, k_diff, collection.settings.d_sae_out, count_tokens)
    collection.verify()
    table = DensityTable(collection, count_tokens, subset)
    return reduce_table(table, percentile, gate_rule, k_diff, sparsify, progress)


def check_settings(percentile: float, gate_rule: str, k_diff: int, d_sae_out: int | None, count_tokens: str) -> None:
    """Raise `ValueError` for a setting of `reduce` that is none; `d_sae_out` may be unknown yet."""
    if not 0 <= percentile <= 100:
        raise ValueError(f"`percentile` is {percentile!r}; accepted: 0 to 100 (published: 90).")
    if gate_rule not in GATE_RULES:
        raise ValueError(f"`gate_rule` is {gate_rule!r}; accepted: {', '.join(GATE_RULES)}.")
    if count_tokens not in COUNT_TOKENS:
        raise ValueError(f"`count_tokens` is {count_tokens!r}; accepted: {', '.join(COUNT_TOKENS)}.")
    if not 1 <= k_diff <= (d_sae_out or k_diff):
        raise ValueError(f"`k_diff` is {k_diff!r}; accepted: 1 to the output SAE's width, {d_sae_out or 'd_sae'}.")


@dataclass(frozen=True)
class Gates:
    """Which gates are open on which of N triples.

    n_open [d_sae_in] int64. latents [R]: those whose gate is open on some triples and not on all; open [R, N]: where.
    """

    n_triples: int
    n_open: Array
    latents: Array
    open: Matrix

    def packed(self) -> Tensor:
        """`open` as bits, [R, ceil(N / 8)] uint8, the triples in the order of their gates: theirs does not show."""
        by_triple = self.open.T.tocsr()
        blocks = [by_triple[n : n + ROWS_PER_TILE].toarray() for n in range(0, self.n_triples, ROWS_PER_TILE)]
        keys = np.concatenate([np.packbits(block, axis=1) for block in blocks])
        place = np.empty(self.n_triples, dtype=np.int64)
        place[sorted(range(self.n_triples), key=lambda n: keys[n].tobytes())] = np.arange(self.n_triples)
        rows = np.zeros((len(self.latents), -(-self.n_triples // 8)), dtype=np.uint8)
        for row, (start, end) in zip(rows, pairwise(self.open.indptr), strict=True):
            bits = np.zeros(self.n_triples, dtype=np.uint8)
            bits[place[self.open.indices[start:end]]] = 1
            row[:] = np.packbits(bits, bitorder="little")
        return torch.from_numpy(rows)


def find_gates(table: DensityTable, percentile: float, gate_rule: str) -> Gates:
    """`g_i(x) = 1[rho_i(x) >= tau_i]`, tau_i the percentile over the prompts, by linear interpolation."""
    n = table.n_triples
    entries = table.entries("prompt")
    # Where a latent is active on so few prompts that the percentile is 0, all gates are open as published.
    n_open = np.full(len(entries), n if gate_rule == "published" else 0, dtype=np.int64)
    latents, places = [], []
    for block in _blocks(np.arange(len(entries)), entries):
        columns = table.densities("prompt", block).tocsc()
        for latent, start, end in zip(block, columns.indptr, columns.indptr[1:], strict=False):
            rho = columns.data[start:end]
            tau = _percentile(rho, n - len(rho), percentile)
            if tau > 0 or gate_rule == "active":
                at = columns.indices[start:end][rho >= tau]
                n_open[latent] = len(at)
                if 0 < len(at) < n:
                    latents.append(latent)
                    places.append(at)
    ends = np.cumsum([0, *map(len, places)])
    at = np.concatenate(places) if places else np.zeros(0, dtype=np.int32)
    opened = sparse.csr_array((np.ones(len(at), dtype=np.uint8), at, ends), shape=(len(latents), n))
    return Gates(n, n_open, np.array(latents, dtype=np.int64), opened)


def _percentile(values: Array, n_zeros: int, percentile: float) -> float:
    """Of positive `values` and so many zeros."""
    place = percentile * (n_zeros + len(values) - 1) / 100
    below, above = math.floor(place), math.ceil(place)
    if above < n_zeros:
        return 0.0
    ordered = np.sort(values)
    low, high = (0.0 if k < n_zeros else float(ordered[k - n_zeros]) for k in (below, above))
    return low + (high - low) * (place - below)


def _blocks(latents: Array, entries: Array) -> Iterator[Array]:
    """Neighbours that have about ENTRIES_PER_BLOCK entries together."""
    block_of = np.cumsum(entries[latents]) // ENTRIES_PER_BLOCK
    for start, end in pairwise([0, *(np.flatnonzero(np.diff(block_of)) + 1).tolist(), len(latents)]):
        yield latents[start:end]


# Takes A[rows, latents]: of rows, and of latents and rows.
Take: TypeAlias = Callable[[slice, Array], None]
Visit: TypeAlias = Callable[[Array, slice, Array], None]


class _Product:
    """`A = g^T difference / N` by blocks. Gates that are open on all triples share one row, which comes last."""

    def __init__(self, table: DensityTable, gates: Gates, progress: bool) -> None:
        self.table, self.progress = table, progress
        ones = sparse.csr_array(np.ones((1, table.n_triples), dtype=np.uint8))
        always = bool((gates.n_open == table.n_triples).any())
        self.open = sparse.vstack([gates.open, ones], format="csr") if always else gates.open
        # Row of each latent, -1 for a gate that is never open.
        self.row = np.full(len(gates.n_open), -1, dtype=np.int64)
        self.row[gates.latents] = np.arange(len(gates.latents))
        self.row[gates.n_open == table.n_triples] = self.open.shape[0] - 1
        self.entries = table.entries("chosen") + table.entries("rejected")

    def sweep(self, latents: Array, visit: Visit, title: str) -> None:
        """Call `visit(latents, rows, A[rows, latents])` for blocks of A that cover some columns, maybe from threads."""
        # Full columns first: a matrix product suits them, a sparse one the others.
        latents = latents[np.argsort(-self.entries[latents], kind="stable")]
        bar = tqdm(total=len(latents), unit="column", desc=title, leave=False, disable=not self.progress)
        with bar, ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for block in _blocks(latents, self.entries):
                ascending = np.argsort(block)
                columns = self.table.difference(block[ascending]).tocsc()[:, np.argsort(ascending)]
                for start, end, multiply in self._tiles(columns):
                    tile = slice(start, end)
                    multiply(columns[:, tile], functools.partial(visit, block[tile]), pool)
                    bar.update(end - start)

    def _tiles(self, columns: Matrix) -> Iterator[tuple[int, int, Callable[[Matrix, Take, Executor], None]]]:
        """First and last column of each tile, and what multiplies it."""
        n_triples, width = columns.shape
        n_full = int((np.diff(columns.indptr) > DENSE * n_triples).sum())
        n_wide = max(1, ELEMENTS_PER_TILE // n_triples)
        for start in range(0, n_full, n_wide):
            yield start, min(start + n_wide, n_full), self._dense
        for start in range(n_full, width, COLUMNS_PER_TILE):
            yield start, min(start + COLUMNS_PER_TILE, width), self._sparse

    def _dense(self, columns: Matrix, take: Take, pool: Executor) -> None:
        del pool  # A matrix product has threads of its own.
        factor = torch.from_numpy(columns.toarray())
        for rows in self._row_blocks():
            gates = torch.from_numpy(self.open[rows].toarray()).double()
            take(rows, (gates @ factor).numpy() / self.table.n_triples)

    def _sparse(self, columns: Matrix, take: Take, pool: Executor) -> None:
        factor = columns.tocsr()

        def one(rows: slice) -> None:
            gates = self.open[rows].astype(np.float64)
            take(rows, (gates @ factor).toarray() / self.table.n_triples)

        for _ in pool.map(one, self._row_blocks()):
            pass

    def _row_blocks(self) -> Iterator[slice]:
        n_rows = self.open.shape[0]
        return (slice(n, min(n + ROWS_PER_TILE, n_rows)) for n in range(0, n_rows, ROWS_PER_TILE))


class _Survey:
    """The k largest and k smallest entries of each row, and the largest size in each column [width]."""

    def __init__(self, n_rows: int, width: int, n_empty: int, k: int) -> None:
        self.largest, self._lock = np.zeros(width), threading.Lock()
        # Columns without an entry, which are not visited, are zeros.
        start = torch.full((n_rows, k), -torch.inf, dtype=torch.float64)
        start[:, :n_empty] = 0
        self._ends = {True: start, False: -start}

    def visit(self, latents: Array, rows: slice, block: Array) -> None:
        """Look at A[rows, latents]."""
        found = torch.from_numpy(block)
        for largest, ends in self._ends.items():
            known = ends[rows]
            # Few rows have anything beyond what full columns gave them.
            beyond = found.amax(dim=1) > known[:, -1] if largest else found.amin(dim=1) < known[:, -1]
            joined = torch.cat((known[beyond], found[beyond]), dim=1)
            known[beyond] = joined.topk(ends.shape[1], dim=1, largest=largest).values
        sizes = np.maximum(block.max(axis=0), -block.min(axis=0))
        with self._lock:
            self.largest[latents] = np.maximum(self.largest[latents], sizes)

    def cut(self) -> float:
        """The smallest size, 0 aside, among the entries at the ends of all rows; infinite where there is none."""
        ends = torch.cat(tuple(self._ends.values())).abs()
        ends = ends[(ends > QUANTUM / 2) & ends.isfinite()]
        return float(ends.min()) if ends.numel() else math.inf


def reduce_table(
    table: DensityTable, percentile: float, gate_rule: str, k_diff: int, sparsify: bool, progress: bool = False
) -> ConditionalDifferenceMap:
    """The map of a table; settings as for `reduce`, which checks them."""
    s, gates = table.settings, find_gates(table, percentile, gate_rule)
    product = _Product(table, gates, progress)
    seen = np.flatnonzero(product.entries)
    survey = _Survey(product.open.shape[0], s.d_sae_out, s.d_sae_out - len(seen), k_diff)
    product.sweep(seen, survey.visit, "survey")
    # What rounding may have made of a zero is a zero, and of a tie with the cut, a tie.
    above = max(survey.cut() - QUANTUM if sparsify else 0.0, QUANTUM / 2)
    latents = np.flatnonzero(survey.largest > above)
    if not len(latents):
        raise MapError(
            "The map is empty: no output latent differs between chosen and rejected responses where a gate is open. "
            "Check that the triples prefer something, and that the SAEs are active on this model."
        )
    if (size := s.d_sae_in * len(latents)) > MOST_VALUES:
        raise MapError(
            f"The map would hold {s.d_sae_in} x {len(latents)} values, {4e-9 * size:.0f} GB; accepted: at most "
            f"{4e-9 * MOST_VALUES:.0f} GB. Let it be sparsified (sparsify=True), with a smaller k_diff."
        )
    meta = MapMeta(
        **{name: getattr(s, name) for name in MapMeta.__annotations__ if hasattr(s, name)},
        n_triples=table.n_triples,
        n_cut=table.n_cut,
        count_tokens=table.count_tokens,
        percentile=percentile,
        gate_rule=gate_rule,
        k_diff=k_diff,
        sparsify=sparsify,
        package=__version__,
    )
    hot, hot_counts, mean = _calibration(table.collection)
    return ConditionalDifferenceMap(
        columns=torch.from_numpy(latents).to(torch.int32),
        values=_values(product, latents, above),
        n_open=torch.from_numpy(gates.n_open).to(torch.int32),
        variance=_variance(table, latents),
        gate_latents=torch.from_numpy(gates.latents).to(torch.int32),
        gates=gates.packed(),
        meta=meta,
        hot=hot,
        hot_counts=hot_counts,
        mean=mean,
    )


def _values(product: _Product, latents: Array, above: float) -> Tensor:
    """`A[:, latents]` [d_sae_in, C] fp32, with 0 for entries that are not above the cut."""
    found = np.zeros((product.open.shape[0] + 1, len(latents)), dtype=np.float32)
    place = np.zeros(product.table.settings.d_sae_out, dtype=np.int64)
    place[latents] = np.arange(len(latents))

    def visit(some: Array, rows: slice, block: Array) -> None:
        found[rows, place[some]] = np.where(np.abs(block) > above, block, 0)

    product.sweep(latents, visit, "values")
    # The last row, -1, stays zero: gates that are never open.
    return torch.from_numpy(found[product.row])


def _variance(table: DensityTable, latents: Array) -> Tensor:
    """Of `rho~` over all responses, [C] fp32."""
    blocks = []
    width = max(1, ELEMENTS_PER_TILE // (2 * table.n_triples))
    for start in range(0, len(latents), width):
        some = latents[start : start + width]
        rho = np.concatenate([table.densities(part, some).toarray() for part in ("chosen", "rejected")])
        # Sorted, so that sums run in one order.
        rho.sort(axis=0)
        blocks.append(rho.var(axis=0))
    return torch.from_numpy(np.concatenate(blocks)).float()


def _calibration(collection: Collection) -> tuple[Tensor, Tensor, Tensor]:
    """Of all that was collected: output latents that ever held a token's maximum, [H] int32, most often first and of
    equals the smaller; how often they did, [H] int64; and the mean residual [d_in] fp32 of the same tokens, normalised,
    as exact as bf16: what batching does to the last bits of hidden states should not show in a map."""
    samples = list(collection.shards("maxima", "looked", "totals"))
    held, looked, total = (sum((each[name] for each in samples[1:]), samples[0][name]) for name in samples[0])
    order = held.argsort(descending=True, stable=True)[: int((held > 0).sum())]
    mean = total.double() * ROW_QUANTUM / max(1, int(looked))
    return order.to(torch.int32), held[order], mean.to(torch.bfloat16).float()
