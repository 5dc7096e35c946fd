"""Sparse counts of texts. Shards on disk are in test_collection.py."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dspa import MapError, reduce
from dspa.files import read_header, read_tensors, write_tensors
from dspa.maps.shards import FORMAT, NAMES, Counts

from ..support.counts import as_collection, dense, draw


def test_counts_of_a_table() -> None:
    g = torch.Generator().manual_seed(0)
    table = torch.randint(-3, 4, (7, 5), generator=g).clamp(min=0)
    table[3] = 0
    counts = Counts.of(table, table.sum(dim=1))
    assert torch.equal(dense(counts, 5), table) and counts.lengths.tolist() == table.sum(dim=1).tolist()
    halves = Counts.join([Counts.of(part, part.sum(dim=1)) for part in (table[:3], table[3:4], table[4:])])
    assert all(torch.equal(getattr(halves, name), value) for name, value in vars(counts).items())


# What no text has, by the name of a tensor in the file and a change of it.
IMPOSSIBLE: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "a negative length": ("prompt.lengths", lambda t: t - t.max() - 1, "prompt: lengths are below 0"),
    "more than the length": ("chosen.counts", lambda t: t + 10**6, "chosen: counts are not all from 1 to the length"),
    "a count of 0": ("chosen.counts", lambda t: 0 * t, "chosen: counts are not all from 1"),
    "a latent twice": ("prompt.latents", lambda t: 0 * t, "latents of a text are not in increasing order"),
    "latents in another order": ("rejected.latents", lambda t: t.flip(0), "latents of a text are not in increasing"),
    "another SAE's latent": ("rejected.latents", lambda t: t + 10**6, "rejected: latents are not all from 0 to 17"),
    "a negative latent": ("prompt.latents", lambda t: t - 20, "prompt: latents are not all from 0 to 13"),
    "starts beyond": ("prompt.starts", lambda t: t + 1, "prompt: starts do not lead from 0"),
    "starts that go back": ("prompt.starts", lambda t: t[[0, 2, 1, *range(3, len(t))]], "prompt: starts do not lead"),
    "special tokens beyond all": ("prompt_special.lengths", lambda t: t + 100, "prompt: more on special tokens"),
    "a number twice": ("index", lambda t: 0 * t, "index has numbers below 0, or one twice"),
    "a negative number": ("index", lambda t: t - 1, "index has numbers below 0"),
    "three responses": ("cut", lambda t: t + 3, "cut is above 2"),
    "negative maxima": ("maxima", lambda t: t - 1, "maxima are below 0"),
    "maxima of no token": ("looked", lambda t: 0 * t, "maxima are below 0, or more than"),
    "another width": ("maxima", lambda t: t[:-1], "maxima is torch.int64 [17], not torch.int64 [18]"),
    "another type": ("prompt.counts", lambda t: t.float(), "prompt: counts are torch.float32"),
    "fewer texts": ("prompt.lengths", lambda t: t[:-1], "prompt: lengths are torch.int64 [4]"),
}


@pytest.mark.parametrize(("name", "change", "message"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_a_checksum_is_no_proof_of_sense(
    tmp_path: Path, name: str, change: Callable[[Tensor], Tensor], message: str
) -> None:
    counts = as_collection(draw(5, seed=3), folder=tmp_path)
    path = counts.path(0)
    tensors = read_tensors(path, NAMES, read_header(path))
    write_tensors(path, tensors | {name: change(tensors[name])}, {"format": FORMAT, "triples": "0"})
    for read in (counts.verify, lambda: counts.read(path), lambda: reduce(counts), lambda: counts.has(0, "0")):
        with pytest.raises(MapError, match=re.escape(message)):
            read()


def test_counts_on_special_tokens_are_among_the_others() -> None:
    lengths = torch.tensor([4, 4])
    counts = Counts.of(torch.tensor([[0, 2, 3], [4, 0, 0]]), lengths)
    for part, held in (
        ([[0, 2, 0], [4, 0, 0]], True),
        ([[0, 3, 0], [0, 0, 0]], False),
        ([[1, 0, 0], [0, 0, 0]], False),
    ):
        assert counts.holds(Counts.of(torch.tensor(part), lengths), 3) is held
    assert counts.holds(Counts.of(torch.zeros(2, 3, dtype=torch.int32), lengths), 3)
    assert not Counts.of(torch.zeros(2, 3, dtype=torch.int32), lengths).holds(counts, 3)
