"""Gates of a map: on which triples the rows of input latents are open."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from dspa.maps.table import Array, DensityTable, Matrix, split_by_entries

# Triples whose gates are held dense at once.
TRIPLES_PER_BLOCK = 256


@dataclass(frozen=True)
class Gates:
    """Open gates of N triples.

    Attributes:
        n_triples: number N of triples.
        n_open: number of triples on which each gate is open, [d_sae_in] int64.
        latents: latents whose gate is open on some triples and not on all, [R] int64.
        open: the triples on which those gates are open, [R, N].
        n_inactive: number of latents that are active on no prompt.
        n_zero_percentile: number of latents whose percentile is 0.
    """

    n_triples: int
    n_open: Array
    latents: Array
    open: Matrix
    n_inactive: int
    n_zero_percentile: int

    def packed(self) -> Tensor:
        """Return `open` as bits, [R, ceil(N / 8)] uint8, with the triples sorted by their gates.

        Sorting makes the bits independent of the order of the data.
        """
        by_triple = self.open.T.tocsr()
        blocks = [by_triple[n : n + TRIPLES_PER_BLOCK].toarray() for n in range(0, self.n_triples, TRIPLES_PER_BLOCK)]
        keys = np.concatenate([np.packbits(block, axis=1) for block in blocks])
        position = np.empty(self.n_triples, dtype=np.int64)
        position[sorted(range(self.n_triples), key=lambda n: keys[n].tobytes())] = np.arange(self.n_triples)
        rows = np.zeros((len(self.latents), -(-self.n_triples // 8)), dtype=np.uint8)
        for row, (start, end) in zip(rows, pairwise(self.open.indptr), strict=True):
            bits = np.zeros(self.n_triples, dtype=np.uint8)
            bits[position[self.open.indices[start:end]]] = 1
            row[:] = np.packbits(bits, bitorder="little")
        return torch.from_numpy(rows)


def find_gates(table: DensityTable, percentile: float, gate_rule: str) -> Gates:
    """Return the gates `g_i(x) = 1[rho_i(x) >= tau_i]`, with tau_i the percentile over the prompts.

    Args:
        table: densities.
        percentile: as for `reduce`, by linear interpolation.
        gate_rule: as for `reduce`.
    """
    n = table.n_triples
    entries = table.entries("prompt")
    # As published, a gate is always open where its latent is active on so few prompts that the percentile is 0.
    n_open = np.full(len(entries), n if gate_rule == "published" else 0, dtype=np.int64)
    latents, triples_of_latent, n_above_zero = [], [], 0
    for block in split_by_entries(np.arange(len(entries)), entries):
        columns = table.densities("prompt", block).tocsc()
        for latent, start, end in zip(block, columns.indptr, columns.indptr[1:], strict=False):
            rho = columns.data[start:end]
            tau = _percentile(rho, n - len(rho), percentile)
            n_above_zero += tau > 0
            if tau > 0 or gate_rule == "active":
                triples = columns.indices[start:end][rho >= tau]
                n_open[latent] = len(triples)
                if 0 < len(triples) < n:
                    latents.append(latent)
                    triples_of_latent.append(triples)
    starts = np.cumsum([0, *map(len, triples_of_latent)])
    indices = np.concatenate(triples_of_latent) if triples_of_latent else np.zeros(0, dtype=np.int32)
    is_open = sparse.csr_array((np.ones(len(indices), dtype=np.uint8), indices, starts), shape=(len(latents), n))
    return Gates(
        n_triples=n,
        n_open=n_open,
        latents=np.array(latents, dtype=np.int64),
        open=is_open,
        n_inactive=int((entries == 0).sum()),
        n_zero_percentile=len(entries) - n_above_zero,
    )


def _percentile(values: Array, n_zeros: int, percentile: float) -> float:
    """Return a percentile of positive `values` and `n_zeros` zeros."""
    place = percentile * (n_zeros + len(values) - 1) / 100
    below, above = math.floor(place), math.ceil(place)
    if above < n_zeros:
        return 0.0
    ordered = np.sort(values)
    low, high = (0.0 if k < n_zeros else float(ordered[k - n_zeros]) for k in (below, above))
    return low + (high - low) * (place - below)
