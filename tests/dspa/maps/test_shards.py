"""Sparse counts of texts. Shards on disk are in test_collection.py."""

from __future__ import annotations

import torch

from dspa.maps.shards import Counts

from ..support.counts import dense


def test_counts_of_a_table() -> None:
    g = torch.Generator().manual_seed(0)
    table = torch.randint(-3, 4, (7, 5), generator=g).clamp(min=0)
    table[3] = 0
    counts = Counts.of(table, table.sum(dim=1))
    assert torch.equal(dense(counts, 5), table) and counts.lengths.tolist() == table.sum(dim=1).tolist()
    halves = Counts.join([Counts.of(part, part.sum(dim=1)) for part in (table[:3], table[3:4], table[4:])])
    assert all(torch.equal(getattr(halves, name), value) for name, value in vars(counts).items())
