"""Reduction of counts to a map, without the model: in blocks of columns, exactly, for up to 2^20 triples.

All summands are multiples of QUANTUM, so that sums are exact in fp64 in any order. The same triples give the same map
bit for bit, however they were sharded, batched or ordered.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from tqdm import tqdm

from dspa.costs import Meter
from dspa.errors import MapError
from dspa.maps.cdmap import COUNT_TOKENS, GATE_RULES, ConditionalDifferenceMap, MapMeta
from dspa.maps.collection import Collection
from dspa.maps.gates import Gates, find_gates
from dspa.maps.shards import ROW_QUANTUM, SAMPLE_NAMES
from dspa.maps.table import QUANTUM, Array, DensityTable, Matrix, split_by_entries
from dspa.schemas import Flag, OneOf, Percentile, PositiveInt, check, whole
from dspa.version import __version__

# Largest sizes that are held at once: rows and columns of a product, elements of a dense block of columns, values of a
# map.
ROWS_PER_TILE = 256
COLUMNS_PER_TILE = 8192
ELEMENTS_PER_TILE = 1 << 25
MOST_VALUES = 1 << 30
# From about this fraction of nonzero entries on, a dense product is faster than a sparse one.
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
    """Make the map of collected counts (DSPA, conditional-difference map).

    Args:
        counts: what `collect` returned, or its `work_dir`.
        percentile: exact percentile of each prompt latent's density from which its gate opens. The
            publication names none; 90 is the choice here.
        gate_rule: "published", or "active": a gate opens only where its latent is active at all.
        count_tokens: "all" tokens, as published, or "text": without special tokens.
        k_diff: entries at each end of a row that set the cut of the sparsification (published: 16).
        sparsify: set entries below the cut to 0, as published.
        subset: numbers of the triples to use, from 0, or a mask over all. A number that is given twice counts twice.
            Default: all.
        progress: show a bar.

    Raises:
        MapError: counts that are incomplete or damaged, or a map that is empty or too large.
        ValueError: an invalid setting.
    """
    collection = counts if isinstance(counts, Collection) else Collection.open(counts)
    check_settings(percentile, gate_rule, k_diff, collection.settings.d_sae_out, count_tokens)
    check(Flag, sparsify, ValueError, "`sparsify`")
    meter = Meter(torch.device("cpu"))
    collection.verify()
    table = DensityTable(collection, count_tokens, subset)
    cdmap = reduce_table(table, percentile, gate_rule, k_diff, sparsify, progress)
    for name, promoted in collection.promoted.items():
        cdmap.promoted[name] = {latent: promoted[latent] for latent in cdmap.latents()[name]}
    if subset is None and (costs := collection.costs):
        # On the processor, wherever the counts are from.
        taken, before = meter.measured(), costs.measured
        peak = max(before.peak_rss_bytes, taken.peak_rss_bytes)
        measured = replace(before, seconds=before.seconds + taken.seconds, peak_rss_bytes=peak)
        cdmap.costs = replace(costs, measured=measured)
    return cdmap


def check_settings(percentile: float, gate_rule: str, k_diff: int, d_sae_out: int | None, count_tokens: str) -> None:
    """Raise `ValueError` for an invalid `reduce` setting.

    Args:
        percentile: as for `reduce`.
        gate_rule: as for `reduce`.
        k_diff: as for `reduce`.
        d_sae_out: width of the output SAE, or None where it is not known yet.
        count_tokens: as for `reduce`.
    """
    width = f"1 to the output SAE's width, {d_sae_out}"
    settings: list[tuple[str, object, Any]] = [
        ("percentile", percentile, Percentile),
        ("gate_rule", gate_rule, Annotated[str, OneOf(GATE_RULES)]),
        ("count_tokens", count_tokens, Annotated[str, OneOf(COUNT_TOKENS)]),
        ("k_diff", k_diff, PositiveInt if d_sae_out is None else whole(1, d_sae_out, width)),
    ]
    for name, value, kind in settings:
        check(kind, value, ValueError, f"`{name}`")


# Called with rows and A[rows, some latents].
Take: TypeAlias = Callable[[slice, Array], None]
# Called with latents, rows and A[rows, latents].
Visit: TypeAlias = Callable[[Array, slice, Array], None]


class _Product:
    """The product `A = g^T difference / N` in blocks. Gates that are open on all triples share one row, the last."""

    def __init__(self, table: DensityTable, gates: Gates, progress: bool) -> None:
        self.table, self.progress = table, progress
        ones = sparse.csr_array(np.ones((1, table.n_triples), dtype=np.uint8))
        always = bool((gates.n_open == table.n_triples).any())
        self.open = sparse.vstack([gates.open, ones], format="csr") if always else gates.open
        # Row of each latent, or -1 for a gate that is never open.
        self.row = np.full(len(gates.n_open), -1, dtype=np.int64)
        self.row[gates.latents] = np.arange(len(gates.latents))
        self.row[gates.n_open == table.n_triples] = self.open.shape[0] - 1
        self.entries = table.entries("chosen") + table.entries("rejected")

    def sweep(self, latents: Array, visit: Visit, title: str) -> None:
        """Call `visit` for the blocks of some columns of A, possibly from several threads.

        Args:
            latents: columns to cover.
            visit: called with latents, rows and A[rows, latents].
            title: of the progress bar.
        """
        # Full columns first, for dense products; sparse products suit the others.
        latents = latents[np.argsort(-self.entries[latents], kind="stable")]
        bar = tqdm(total=len(latents), unit="column", desc=title, leave=False, disable=not self.progress)
        with bar, ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for block in split_by_entries(latents, self.entries):
                ascending = np.argsort(block)
                columns = self.table.difference(block[ascending]).tocsc()[:, np.argsort(ascending)]
                for start, end, multiply in self._tiles(columns):
                    tile = slice(start, end)
                    multiply(columns[:, tile], functools.partial(visit, block[tile]), pool)
                    bar.update(end - start)

    def _tiles(self, columns: Matrix) -> Iterator[tuple[int, int, Callable[[Matrix, Take, Executor], None]]]:
        """Yield the first column, the end and the multiplication of each tile of columns."""
        n_triples, width = columns.shape
        n_full = int((np.diff(columns.indptr) > DENSE * n_triples).sum())
        n_wide = max(1, ELEMENTS_PER_TILE // n_triples)
        for start in range(0, n_full, n_wide):
            yield start, min(start + n_wide, n_full), self._multiply_dense
        for start in range(n_full, width, COLUMNS_PER_TILE):
            yield start, min(start + COLUMNS_PER_TILE, width), self._multiply_sparse

    def _multiply_dense(self, columns: Matrix, take: Take, pool: Executor) -> None:
        del pool  # A dense product has threads of its own.
        factor = torch.from_numpy(columns.toarray())
        for rows in self._row_blocks():
            gates = torch.from_numpy(self.open[rows].toarray()).double()
            take(rows, (gates @ factor).numpy() / self.table.n_triples)

    def _multiply_sparse(self, columns: Matrix, take: Take, pool: Executor) -> None:
        factor = columns.tocsr()

        def multiply(rows: slice) -> None:
            gates = self.open[rows].astype(np.float64)
            take(rows, (gates @ factor).toarray() / self.table.n_triples)

        for _ in pool.map(multiply, self._row_blocks()):
            pass

    def _row_blocks(self) -> Iterator[slice]:
        n_rows = self.open.shape[0]
        return (slice(n, min(n + ROWS_PER_TILE, n_rows)) for n in range(0, n_rows, ROWS_PER_TILE))


class _Survey:
    """The k largest and k smallest entries of each row, and the largest absolute value of each column [width]."""

    def __init__(self, n_rows: int, width: int, n_empty: int, k: int) -> None:
        self.largest, self._lock = np.zeros(width), threading.Lock()
        # Columns without an entry are not visited: they are zeros.
        start = torch.full((n_rows, k), -torch.inf, dtype=torch.float64)
        start[:, :n_empty] = 0
        self._ends = {True: start, False: -start}

    def visit(self, latents: Array, rows: slice, block: Array) -> None:
        """Take A[rows, latents] into account."""
        entries = torch.from_numpy(block)
        for largest, ends in self._ends.items():
            known = ends[rows]
            # Few rows have an entry beyond those of the full columns.
            beyond = entries.amax(dim=1) > known[:, -1] if largest else entries.amin(dim=1) < known[:, -1]
            joined = torch.cat((known[beyond], entries[beyond]), dim=1)
            known[beyond] = joined.topk(ends.shape[1], dim=1, largest=largest).values
        sizes = np.maximum(block.max(axis=0), -block.min(axis=0))
        with self._lock:
            self.largest[latents] = np.maximum(self.largest[latents], sizes)

    def cut(self) -> float:
        """Return the smallest nonzero absolute value at the ends of all rows, infinite where there is none."""
        ends = torch.cat(tuple(self._ends.values())).abs()
        ends = ends[(ends > QUANTUM / 2) & ends.isfinite()]
        return float(ends.min()) if ends.numel() else math.inf


def reduce_table(
    table: DensityTable, percentile: float, gate_rule: str, k_diff: int, sparsify: bool, progress: bool = False
) -> ConditionalDifferenceMap:
    """Make the map of a table.

    Args:
        table: densities.
        percentile: as for `reduce`, which checks this and the other settings.
        gate_rule: as for `reduce`.
        k_diff: as for `reduce`.
        sparsify: as for `reduce`.
        progress: show a bar.

    Raises:
        MapError: the map is empty or too large.
    """
    s, gates = table.settings, find_gates(table, percentile, gate_rule)
    product = _Product(table, gates, progress)
    active = np.flatnonzero(product.entries)
    survey = _Survey(product.open.shape[0], s.d_sae_out, s.d_sae_out - len(active), k_diff)
    product.sweep(active, survey.visit, "survey")
    # The margins keep a zero a zero, and a tie with the cut a tie, whatever rounding made of them.
    above = max(survey.cut() - QUANTUM if sparsify else 0.0, QUANTUM / 2)
    latents = np.flatnonzero(survey.largest > above)
    if not len(latents):
        raise MapError(
            "The map is empty: no output latent differs between chosen and rejected responses where a gate is open. "
            "Check that the triples express a preference, and that the SAEs are active on this model."
        )
    if (size := s.d_sae_in * len(latents)) > MOST_VALUES:
        raise MapError(
            f"The map would hold {s.d_sae_in} x {len(latents)} values, {4e-9 * size:.0f} GB; accepted: at most "
            f"{4e-9 * MOST_VALUES:.0f} GB. Sparsify it, with `sparsify` and a smaller `k_diff`."
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
        n_inactive=gates.n_inactive,
        n_zero_percentile=gates.n_zero_percentile,
    )
    hot, hot_counts, mean = _calibration(table.collection)
    return ConditionalDifferenceMap(
        columns=torch.from_numpy(latents).to(torch.int32),
        values=_values_above(product, latents, above),
        n_open=torch.from_numpy(gates.n_open).to(torch.int32),
        variance=_response_variance(table, latents),
        gate_latents=torch.from_numpy(gates.latents).to(torch.int32),
        gates=gates.packed(),
        meta=meta,
        sources=table.collection.sources,
        hot=hot,
        hot_counts=hot_counts,
        mean=mean,
    )


def _values_above(product: _Product, latents: Array, above: float) -> Tensor:
    """Return `A[:, latents]` [d_sae_in, C] fp32, with 0 for entries whose absolute value is not above `above`."""
    values = np.zeros((product.open.shape[0] + 1, len(latents)), dtype=np.float32)
    position = np.zeros(product.table.settings.d_sae_out, dtype=np.int64)
    position[latents] = np.arange(len(latents))

    def visit(some: Array, rows: slice, block: Array) -> None:
        values[rows, position[some]] = np.where(np.abs(block) > above, block, 0)

    product.sweep(latents, visit, "values")
    # The last row, -1, stays zero, for gates that are never open.
    return torch.from_numpy(values[product.row])


def _response_variance(table: DensityTable, latents: Array) -> Tensor:
    """Return the variance of `rho~` over all responses, [C] fp32."""
    blocks = []
    width = max(1, ELEMENTS_PER_TILE // (2 * table.n_triples))
    for start in range(0, len(latents), width):
        some = latents[start : start + width]
        rho = np.concatenate([table.densities(part, some).toarray() for part in ("chosen", "rejected")])
        # Sorted, so that the order of summation does not depend on the data's.
        rho.sort(axis=0)
        blocks.append(rho.var(axis=0))
    return torch.from_numpy(np.concatenate(blocks)).float()


def _calibration(collection: Collection) -> tuple[Tensor, Tensor, Tensor]:
    """Return the calibration of all that was collected.

    The mean is rounded to bf16, so that the effect of batching on the last bits of hidden states does not show in maps.

    Returns:
        hot [H] int32, the output latents that were ever a sampled token's largest, most often first (ties: smaller
        index); hot_counts [H] int64, the number of tokens of each; mean [d_in] fp32, the mean normalised residual.
    """
    samples = list(collection.shards(*SAMPLE_NAMES.values()))
    max_counts, n_sampled, residual_sum = (
        sum((sample[name] for sample in samples[1:]), samples[0][name]) for name in SAMPLE_NAMES.values()
    )
    hot = max_counts.argsort(descending=True, stable=True)[: int((max_counts > 0).sum())]
    mean = residual_sum.double() * ROW_QUANTUM / max(1, int(n_sampled))
    return hot.to(torch.int32), max_counts[hot], mean.to(torch.bfloat16).float()
