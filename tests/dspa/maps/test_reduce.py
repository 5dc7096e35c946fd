"""`dspa.maps.reduce.reduce` against SPEC.md, section 2, written out in exact fractions and plain NumPy."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse

from dspa import ConditionalDifferenceMap, MapError, reduce
from dspa.maps import gates as gate_table
from dspa.maps import reduce as reduction
from dspa.maps import table as count_table
from dspa.maps.cdmap import COUNT_TOKENS, GATE_RULES, N_LARGE, TENSORS
from dspa.maps.gates import find_gates
from dspa.maps.reduce import _Product
from dspa.maps.table import QUANTUM, DensityTable, split_by_entries
from dspa.testing import L_IN, L_OUT
from dspa.version import __version__

from ...rounding import rounding
from ..support.counts import (
    BAD_SETTINGS,
    D_IN,
    D_OUT,
    DYADIC,
    ODD,
    as_collection,
    draw,
    fractions,
    naive,
    rows_of,
    same_bits,
)


def check(cdmap: ConditionalDifferenceMap, gates: np.ndarray, A: np.ndarray, exact: bool) -> None:
    """Check that a map is that of these gates and this A, stored as its non-empty columns."""
    full, expected = cdmap.dense().numpy(), A.astype(np.float64).astype(np.float32)
    assert np.array_equal(full != 0, A != 0)
    assert np.abs(full - expected).max() <= (0 if exact else QUANTUM + np.spacing(np.abs(expected).max()))
    assert cdmap.columns.tolist() == np.flatnonzero((A != 0).any(axis=0)).tolist()
    n_open = gates.sum(axis=0)
    assert cdmap.n_open.tolist() == n_open.tolist()
    assert cdmap.gate_latents.tolist() == np.flatnonzero((n_open > 0) & (n_open < len(gates))).tolist()


def test_by_hand() -> None:
    """Prompt densities 1/4 3/4 | 1/2 0 | 3/4 0; differences 1/2 0 1/4 | -1/4 1/4 0 | 1/4 -3/4 1/8."""
    prompt = np.array([[1, 3], [2, 0], [3, 0]])
    chosen = np.array([[4, 2, 2], [0, 4, 0], [4, 2, 1]])
    rejected = np.array([[0, 2, 0], [2, 2, 0], [2, 8, 0]])
    counts = as_collection([prompt, chosen, rejected, np.array([[4] * 3, [8] * 3, [8] * 3])])
    # tau = 0.7 0.6: gate 0 opens on prompt 2, gate 1 on prompt 0. The ends of the rows are 1/12 and -1/4, 1/6 and
    # 0, so that the cut is 1/12: the 1/24 of row 0 goes, the 1/12 of row 1 stays.
    cdmap = reduce(counts, k_diff=1)
    assert cdmap.n_open.tolist() == [1, 1]
    assert torch.equal(cdmap.dense(), torch.tensor([[1 / 12, -1 / 4, 0], [1 / 6, 0, 1 / 12]]))
    # tau = 1/2 0: gate 0 opens on prompts 1 and 2, gate 1 on all three, two of them without its latent.
    cdmap = reduce(counts, percentile=50, k_diff=1, sparsify=False)
    assert cdmap.n_open.tolist() == [2, 3] and cdmap.gate_latents.tolist() == [0]
    assert torch.equal(cdmap.dense(), torch.tensor([[0, -1 / 6, 1 / 24], [1 / 6, -1 / 6, 1 / 8]]))
    cdmap = reduce(counts, percentile=50, k_diff=1, sparsify=False, gate_rule="active")
    assert cdmap.n_open.tolist() == [2, 1] and cdmap.gate_latents.tolist() == [0, 1]
    assert torch.equal(cdmap.dense(), torch.tensor([[0, -1 / 6, 1 / 24], [1 / 6, 0, 1 / 12]]))


# Gates


@pytest.mark.parametrize("rule", GATE_RULES)
@pytest.mark.parametrize("percentile", [0, 37.5, 90, 100])
@pytest.mark.parametrize("n", [1, 2, 9, 40])
def test_gates_and_map(n: int, percentile: float, rule: str) -> None:
    data = draw(n, seed=n)
    gates, A = naive(data, percentile, rule, sparsify=False)
    check(reduce(as_collection(data), percentile=percentile, gate_rule=rule, sparsify=False), gates, A, exact=True)


@pytest.mark.parametrize("rule", GATE_RULES)
def test_gates_that_are_always_open_and_never(rule: str) -> None:
    """Latents 0, 1 and 4 of the prompts: never active, always on all tokens, always on some."""
    data = draw(20, seed=3)
    data[0][:, 4] = 1
    data[3][0] = 8
    data[0][:, 1] = 8
    gates, A = naive(data, 90, rule, sparsify=False)
    assert gates.sum(axis=0)[[0, 1, 4]].tolist() == [20 if rule == "published" else 0, 20, 20]
    assert 0 < gates.sum(axis=0)[2] < 20
    check(reduce(as_collection(data), gate_rule=rule, sparsify=False), gates, A, exact=True)
    gates, A = naive(data, 90, rule, k=2)
    check(reduce(as_collection(data), gate_rule=rule, k_diff=2), gates, A, exact=True)


def test_no_gate_is_partly_open() -> None:
    data = draw(6, seed=5)
    cdmap = reduce(as_collection(data), percentile=0, k_diff=2)
    assert cdmap.n_open.tolist() == [6] * D_IN and cdmap.gates.shape == (0, 1) and not len(cdmap.gate_latents)
    check(cdmap, *naive(data, 0, k=2), exact=True)


def test_percentile_on_a_prompt_is_that_prompt() -> None:
    """7 % of 101 prompts is the 8th smallest; in binary, 0.07 * 100 is a little more than 7."""
    n = 101
    prompt = np.arange(n)[:, None]
    response = np.ones((n, 1), int)
    counts = as_collection([prompt, response, 0 * response, np.array([[128] * n, [1] * n, [1] * n])])
    assert reduce(counts, percentile=7, k_diff=1).n_open.tolist() == [n - 7]


@pytest.mark.parametrize("n", [1, 7, 8, 9, 40, 300])
def test_gates_as_bits(n: int) -> None:
    """One bit per prompt, the rest of the last byte empty. The order is that of the gates, so compare as multisets."""
    data = draw(n, seed=n)
    cdmap = reduce(as_collection(data), percentile=50, gate_rule="active", k_diff=1)
    gates, _ = naive(data, 50, "active", sparsify=False)
    gates = gates[:, cdmap.gate_latents.tolist()]
    assert cdmap.gates.shape == (gates.shape[1], math.ceil(n / 8)) and (n == 1 or gates.shape[1] > 5)
    unpacked = np.unpackbits(cdmap.gates.numpy(), axis=1, bitorder="little").T
    assert not unpacked[n:].any()
    assert sorted(unpacked[:n].tolist()) == sorted(gates.astype(int).tolist())


# The map


@pytest.mark.parametrize("lengths_from", [DYADIC, ODD])
@pytest.mark.parametrize("k", [1, 2, 4, D_OUT])
@pytest.mark.parametrize("n", [1, 2, 9, 40])
def test_sparsification(n: int, k: int, lengths_from: tuple[int, ...]) -> None:
    data = draw(n, seed=100 + n, lengths_from=lengths_from, active=0.8)
    gates, A = naive(data, k=k)
    check(reduce(as_collection(data), k_diff=k), gates, A, exact=lengths_from == DYADIC)
    # Something is cut where it can be.
    if k == 1 and n > 1:
        assert (A != 0).sum() < (naive(data, sparsify=False)[1] != 0).sum()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("k", range(1, 8))
def test_columns_without_an_entry_are_zeros_at_the_ends(k: int, sign: int) -> None:
    """One row with 3/8, 2/8 and 1/8, which nothing opposes, and columns in which nothing is active.

    Its smallest entries are those zeros, and set no cut. Up to k = 6 they take places that 1/8 would otherwise take.
    """
    parts = [np.array([[3, 2, 1, 0, 0, 0, 0]]), np.zeros((1, 7), int)]
    data = [np.ones((1, 1), int), *parts[::sign], np.array([[1], [8], [8]])]
    gates, A = naive(data, k=k)
    kept = {1: 1, 2: 2}.get(k, 3)
    assert (A != 0).sum() == kept
    check(reduce(as_collection(data), k_diff=k), gates, A, exact=True)


def test_ties_with_the_cut_stay() -> None:
    """The cut is 1/6 = 1/12 + 1/12, which no binary fraction is: both sums stay, and 1/12 goes."""
    chosen = np.array([[2, 1, 1, 0], [0, 1, 0, 0]])
    data = [np.ones((2, 1), int), chosen, 0 * chosen, np.array([[1, 1], [6, 6], [6, 6]])]
    gates, A = naive(data, k=1)
    assert A.tolist() == [[Fraction(1, 6), Fraction(1, 6), 0, 0]]
    check(reduce(as_collection(data), k_diff=1), gates, A, exact=False)


def test_rounding_makes_no_entry_of_a_zero() -> None:
    """Column 0 is 1/3 + 1/3 + 1/3 - 1 = 0, which no binary fraction sums to: it sets no cut and is no column."""
    chosen = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]])
    rejected = np.array([[0, 0, 0], [0, 0, 0], [0, 0, 0], [3, 0, 0]])
    data = [np.ones((4, 1), int), chosen, rejected, np.array([[1] * 4, [3] * 4, [3] * 4])]
    for sparsify, columns in ((True, [1]), (False, [1, 2])):
        gates, A = naive(data, k=1, sparsify=sparsify)
        check(reduce(as_collection(data), k_diff=1, sparsify=sparsify), gates, A, exact=False)
        assert np.flatnonzero(A[0]).tolist() == columns


@pytest.mark.parametrize("active", [0.01, 0.05, 0.3])
@pytest.mark.parametrize("n", [60, 257])
def test_many_triples(n: int, active: float) -> None:
    """More rows than a tile holds, with columns that are full and columns that are almost empty."""
    data = draw(n, seed=n, active=active)
    gates, A = naive(data, k=2)
    check(reduce(as_collection(data), k_diff=2), gates, A, exact=False)


def test_variance_is_that_of_all_responses() -> None:
    data = draw(30, seed=2)
    cdmap = reduce(as_collection(data), k_diff=2)
    rho = np.concatenate([fractions(table, t).astype(float) for table, t in zip(data[1:3], data[3][1:], strict=True)])
    wanted = torch.tensor(rho.var(axis=0)[cdmap.columns], dtype=torch.float32)
    torch.testing.assert_close(cdmap.variance, wanted, rtol=rounding(1, 1.0), atol=0)


def test_calibration() -> None:
    """Latents by how often they were the largest (ties: smaller index), and the mean over the sampled tokens."""
    rejected = np.array([[0, 5, 2, 0, 4], [0, 3, 2, 0, 0]])
    chosen = np.array([[1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    data = [np.ones((2, 1), int), chosen, rejected, np.array([[1, 1], [8, 8], [8, 8]])]
    for pieces in ([[0, 1]], [[1], [0]]):
        cdmap = reduce(as_collection(data, pieces=pieces), k_diff=1)
        assert cdmap.hot.tolist() == [1, 2, 4] and cdmap.hot_counts.tolist() == [8, 4, 4]
        assert cdmap.mean.tolist() == [0, 4 / 16, 2 / 16, 0]
    assert cdmap.hot_share() == 1
    cdmap.hot_counts = torch.arange(100, 0, -1)
    assert cdmap.hot_share() == pytest.approx(sum(range(37, 101)) / sum(range(1, 101))) and N_LARGE == 64


def test_no_token_looked_at() -> None:
    data = draw(5, seed=0)
    data[2] = 0 * data[2]
    cdmap = reduce(as_collection(data), k_diff=2)
    assert not len(cdmap.hot) and torch.equal(cdmap.mean, torch.zeros(4)) and cdmap.hot_share() == 0


def test_meta_says_how_it_was_made() -> None:
    data = draw(9, seed=0)
    meta = reduce(as_collection(data), percentile=80.0, gate_rule="active", k_diff=3, sparsify=False).meta
    assert dataclasses.asdict(meta) == {
        "sae_in": "a" * 16,
        "sae_out": "b" * 16,
        "model_name": "made by hand",
        "layer_in": L_IN,
        "layer_out": L_OUT,
        "d_sae_in": D_IN,
        "d_sae_out": D_OUT,
        "n_triples": 9,
        "n_cut": int((data[0][:, -1] % 3).sum()),
        "count_tokens": "all",
        "max_length": 64,
        "percentile": 80.0,
        "gate_rule": "active",
        "k_diff": 3,
        "sparsify": False,
        "package": __version__,
        "boundary": "joint",
        "chat_template_kwargs": None,
        "template_date": None,
        "attention": "",
        "neuronpedia_out": "",
        "model_digest": "",
        # Latent 0 is never active.
        "n_inactive": 1,
        "n_zero_percentile": int((np.percentile(data[0], 80.0, axis=0) == 0).sum()),
    }
    assert meta.n_cut > 0


# What a map does not depend on


BLOCKS: dict[tuple[ModuleType, str], list[Any]] = {
    (count_table, "ENTRIES_PER_BLOCK"): [1, 50, 1 << 40],
    (gate_table, "TRIPLES_PER_BLOCK"): [1, 5, 8, 1000],
    (reduction, "ROWS_PER_TILE"): [1, 5, 8, 1000],
    (reduction, "COLUMNS_PER_TILE"): [1, 5, 1000],
    (reduction, "ELEMENTS_PER_TILE"): [1, 200, 1 << 40],
    (reduction, "DENSE"): [-1, 0, 0.5, 2],
}


@pytest.mark.parametrize(("module", "name", "value"), [(*place, value) for place in BLOCKS for value in BLOCKS[place]])
def test_blocks_change_nothing(module: ModuleType, name: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = [as_collection(draw(40, seed=1, lengths_from=ODD, active=active)) for active in (0.05, 0.4)]
    at_once = [reduce(collection, k_diff=3) for collection in counts]
    monkeypatch.setattr(module, name, value)
    assert all(same_bits(reduce(collection, k_diff=3), one) for collection, one in zip(counts, at_once, strict=True))


@pytest.mark.parametrize("seed", range(8))
def test_blocks_change_nothing_together(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    g = np.random.default_rng(seed)
    data = draw(30, seed, lengths_from=ODD, active=g.choice([0.05, 0.4]))
    options = {"percentile": 60.0, "k_diff": 2, "gate_rule": "active", "sparsify": bool(seed % 2)}
    at_once = reduce(as_collection(data), **options)
    check(at_once, *naive(data, 60.0, "active", 2, bool(seed % 2)), exact=False)
    for (module, name), values in BLOCKS.items():
        monkeypatch.setattr(module, name, values[int(g.integers(len(values)))])
    assert same_bits(reduce(as_collection(data), **options), at_once)


@pytest.mark.parametrize("threads", [1, 4])
def test_threads_do_not_show(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = as_collection(draw(40, seed=1, lengths_from=ODD, active=0.05))
    at_once = reduce(counts, k_diff=3)
    monkeypatch.setattr(reduction, "ROWS_PER_TILE", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for _ in range(5):
        assert same_bits(reduce(counts, k_diff=3), at_once)


@pytest.mark.parametrize("most", [1, 7, 20, 1000])
def test_columns_of_a_block(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(count_table, "ENTRIES_PER_BLOCK", most)
    entries = np.random.default_rng(0).integers(0, 8, 50)
    latents = np.arange(0, 50, 2)
    blocks = list(split_by_entries(latents, entries))
    assert np.concatenate(blocks).tolist() == latents.tolist() and all(map(len, blocks))
    assert all(entries[block].sum() <= most + entries.max() for block in blocks)
    assert len(blocks) <= 2 + 2 * entries[latents].sum() / most


def shuffled(n: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).permutation(n).tolist()


@pytest.mark.parametrize("seed", range(10))
def test_order_of_triples_does_not_show(seed: int) -> None:
    data = draw(41, seed, lengths_from=ODD)
    other = rows_of(data, shuffled(41, seed))
    assert same_bits(reduce(as_collection(other), k_diff=3), reduce(as_collection(data), k_diff=3))


def product(data: list[np.ndarray]) -> np.ndarray:
    """Return A in fp64, of the gates that are ever open."""
    table = DensityTable(as_collection(data), "all", None)
    product = _Product(table, find_gates(table, 60.0, "active"), False)
    A = np.full((product.open.shape[0], D_OUT), np.nan)

    def visit(latents: np.ndarray, rows: slice, block: np.ndarray) -> None:
        A[rows, latents] = block

    product.sweep(np.arange(D_OUT), visit, "")
    return A


@pytest.mark.parametrize("dense", [-1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_sums_are_exact_in_any_order(seed: int, dense: float, monkeypatch: pytest.MonkeyPatch) -> None:
    data = draw(200, seed, lengths_from=ODD, active=0.8)
    at_once = product(data)
    monkeypatch.setattr(reduction, "DENSE", dense)
    for name, value in {"ROWS_PER_TILE": 5, "COLUMNS_PER_TILE": 7, "ELEMENTS_PER_TILE": 1}.items():
        monkeypatch.setattr(reduction, name, value)
    assert np.array_equal(product(rows_of(data, shuffled(200, seed))), at_once)
    difference = DensityTable(as_collection(data), "all", None).difference(np.arange(D_OUT)).toarray()
    exact = fractions(data[1], data[3][1]) - fractions(data[2], data[3][2])
    assert np.array_equal(difference / QUANTUM, np.round(difference / QUANTUM))
    assert np.abs(difference - exact.astype(float)).max() <= QUANTUM / 2


def cut_into(order: Sequence[int], *ends: int) -> list[list[int]]:
    return [list(order[a:b]) for a, b in zip((0, *ends), (*ends, len(order)), strict=True)]


@pytest.mark.parametrize("count_tokens", COUNT_TOKENS)
@pytest.mark.parametrize("ends", [(), (1,), (20, 20), (40,), tuple(range(1, 41))], ids=len)
def test_shards_do_not_show(ends: tuple[int, ...], count_tokens: str) -> None:
    data = draw(41, 5, lengths_from=ODD)
    special = specials(data)
    options = {"k_diff": 3, "count_tokens": count_tokens}
    at_once = reduce(as_collection(data, special), **options)
    for order in (range(41), shuffled(41, 6)):
        pieces = [piece for piece in cut_into(order, *ends) if piece]
        counts = as_collection(data, special, pieces)
        assert same_bits(reduce(counts, **options), at_once)
        some = [3, 3, 40, 0, 17, 18]
        subset = reduce(as_collection(data, special), **options, subset=some)
        assert same_bits(reduce(counts, **options, subset=some), subset)


# Special tokens, and some of the triples


def specials(data: list[np.ndarray], seed: int = 0) -> list[np.ndarray]:
    """Some tokens are special, in one text all and in one none; some latents are active on special tokens alone."""
    g = np.random.default_rng(seed)
    lengths = g.integers(0, data[3] + 1)
    lengths[:, 0], lengths[:, 1] = data[3][:, 0], 0
    tables = []
    for table, length, at in zip(data[:3], data[3], lengths, strict=True):
        least = np.maximum(0, table - (length - at)[:, None])
        tables.append(g.integers(least, np.minimum(table, at[:, None]) + 1))
    return [*tables, lengths]


@pytest.mark.parametrize("options", [{}, {"gate_rule": "active", "percentile": 50}], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_text_is_all_but_special_tokens(seed: int, options: dict[str, Any]) -> None:
    data = draw(30, seed, lengths_from=ODD)
    special = specials(data, seed)
    text = [table - other for table, other in zip(data, special, strict=True)]
    counts, wanted = as_collection(data, special), reduce(as_collection(text), k_diff=3, **options)
    got = reduce(counts, k_diff=3, count_tokens="text", **options)
    assert got.meta.count_tokens == "text"
    for name in set(TENSORS) - {"hot", "hot_counts", "mean"}:
        assert torch.equal(getattr(got, name), getattr(wanted, name)), name
    # Special tokens count for a map of all tokens.
    everything = reduce(counts, k_diff=3, **options)
    assert same_bits(everything, reduce(as_collection(data), k_diff=3, **options))
    assert not torch.equal(everything.dense(), got.dense())
    text[3] = np.maximum(text[3], 1)
    check(got, *naive(text, options.get("percentile", 90.0), options.get("gate_rule", "published"), 3), exact=False)


def test_text_without_tokens_has_density_zero() -> None:
    data = draw(5, seed=3)
    for table, lengths in zip(data[:3], data[3], strict=True):
        table[2], lengths[2] = 0, 0
    got = reduce(as_collection(data), k_diff=2)
    for lengths in data[3]:
        lengths[2] = 1
    assert same_bits(got, reduce(as_collection(data), k_diff=2))


SUBSETS = {
    "first": list(range(7)),
    "one": [4],
    "random": [3, 11, 29, 17, 2],
    "repeated": [5, 5, 1, 0, 5, 12],
    "all": list(range(30)),
    "array": np.array([3, 9, 1]),
    "range": range(5, 20, 3),
}


@pytest.mark.parametrize("count_tokens", COUNT_TOKENS)
@pytest.mark.parametrize("name", SUBSETS)
def test_a_subset_is_those_triples(name: str, count_tokens: str) -> None:
    """A triple that is given twice counts as two equal ones. The calibration is still that of all triples."""
    data, subset = draw(30, seed=8, lengths_from=ODD), SUBSETS[name]
    special = specials(data)
    order = shuffled(30, 1)
    counts = as_collection(data, special, cut_into(order, 4, 19))
    options = {"percentile": 60, "k_diff": 3, "count_tokens": count_tokens}
    got = reduce(counts, **options, subset=subset)
    wanted = reduce(as_collection(rows_of(data, list(subset)), rows_of(special, list(subset))), **options)
    assert got.meta == wanted.meta and got.meta.n_triples == len(subset)
    for tensor in TENSORS:
        like = reduce(counts, **options) if tensor in ("hot", "hot_counts", "mean") else wanted
        assert torch.equal(getattr(got, tensor), getattr(like, tensor)), tensor


@pytest.mark.parametrize("count_tokens", COUNT_TOKENS)
def test_prompts_of_a_table(count_tokens: str) -> None:
    data = draw(12, seed=4)
    special = specials(data)
    counts = as_collection(data, special, [[5, 0, 7, 2], [1, 3, 4, 6, 8, 9, 10, 11]])
    wanted = torch.tensor(data[0] - (special[0] if count_tokens == "text" else 0), dtype=torch.int32)
    got = DensityTable(counts, count_tokens, None).prompt_counts()
    assert got.dtype == torch.int32 and torch.equal(got, wanted[[5, 0, 7, 2, 1, 3, 4, 6, 8, 9, 10, 11]])
    # In the order of the shards.
    assert torch.equal(DensityTable(counts, count_tokens, [3, 0, 3]).prompt_counts(), wanted[[0, 3, 3]])


@pytest.mark.parametrize(
    ("subset", "problem"),
    [([], "empty"), ([-1, 3], "numbers from -1 to 3"), ([0, 9], "numbers from 0 to 9"), ([2**40], "numbers from 1099")],
)
def test_numbers_that_are_no_triples(subset: list[int], problem: str) -> None:
    with pytest.raises(
        MapError, match=f"`subset` is {problem}.*; accepted: several numbers of triples, 0 to 8, or a mask of 9"
    ):
        reduce(as_collection(draw(9, seed=0)), subset=subset)


def test_a_mask() -> None:
    counts = as_collection(draw(9, seed=0))
    mask = torch.tensor([True, False, True, True, False, True, True, False, True])
    assert same_bits(reduce(counts, subset=mask, k_diff=2), reduce(counts, subset=mask.nonzero(), k_diff=2))


@pytest.mark.parametrize("subset", [[0.5, 1.5], [True, False, True], 5], ids=str)
def test_subsets_that_are_no_numbers(subset: Any) -> None:
    """They would otherwise silently select other triples."""
    with pytest.raises((MapError, TypeError, ValueError), match="subset"):
        reduce(as_collection(draw(9, seed=0)), subset=subset)


# Progress


def test_progress(capfd: pytest.CaptureFixture[str]) -> None:
    counts = as_collection(draw(9, seed=0))
    reduce(counts)
    assert capfd.readouterr() == ("", "")
    reduce(counts, progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "survey" in err and "values" in err


# Bad input


@pytest.mark.parametrize(("settings", "message"), [*BAD_SETTINGS, ({"k_diff": D_OUT + 1}, f"width, {D_OUT}")])
def test_bad_settings(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    counts = as_collection(draw(5, seed=0), folder=tmp_path)
    for given in (counts, tmp_path, str(tmp_path)):
        with pytest.raises(ValueError, match=message):
            reduce(given, **settings)


@pytest.mark.parametrize("sparsify", [True, False])
def test_equal_statistics_make_no_map(sparsify: bool) -> None:
    """Chosen and rejected responses have the same densities, if not the same lengths."""
    prompt, chosen, _, lengths = draw(9, seed=0)
    lengths[2] = 3 * lengths[1]
    with pytest.raises(MapError, match="The map is empty: no output latent differs"):
        reduce(as_collection([prompt, chosen, 3 * chosen, lengths]), k_diff=2, sparsify=sparsify)


def test_responses_on_which_nothing_is_active_make_no_map() -> None:
    prompt, chosen, rejected, lengths = draw(9, seed=0)
    with pytest.raises(MapError, match="The map is empty"):
        reduce(as_collection([prompt, 0 * chosen, 0 * rejected, lengths]), k_diff=2)


@pytest.mark.parametrize("sparsify", [True, False])
def test_no_open_gate_makes_no_map(sparsify: bool) -> None:
    prompt, *rest = draw(9, seed=0)
    with pytest.raises(MapError, match="The map is empty"):
        reduce(as_collection([0 * prompt, *rest]), k_diff=2, gate_rule="active", sparsify=sparsify)


def test_a_map_that_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = as_collection(draw(9, seed=0))
    n_columns = len(reduce(counts, sparsify=False).columns)
    monkeypatch.setattr(reduction, "MOST_VALUES", D_IN * n_columns)
    reduce(counts, sparsify=False)
    monkeypatch.setattr(reduction, "MOST_VALUES", D_IN * n_columns - 1)
    with pytest.raises(MapError, match=rf"would hold {D_IN} x {n_columns} values.*`sparsify`"):
        reduce(counts, sparsify=False)


def test_more_triples_than_sums_are_exact_for(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = as_collection(draw(9, seed=0))
    monkeypatch.setattr(count_table, "MOST_TRIPLES", 9)
    reduce(counts)
    monkeypatch.setattr(count_table, "MOST_TRIPLES", 8)
    with pytest.raises(MapError, match=r"The number of triples is 9; accepted: at most 8\. Beyond that, sums"):
        reduce(counts)
    reduce(counts, subset=range(8))


def test_sums_of_the_most_triples_are_exact() -> None:
    """2^20 differences of at most 1 are multiples of QUANTUM below 2^53 of them."""
    assert count_table.MOST_TRIPLES * (1 / QUANTUM) <= 2**53


def test_nothing_as_large_as_the_map_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a map with few columns, no array of all rows and all columns is ever made."""
    made: list[int] = []
    dense = sparse.csr_array.toarray

    def watched(self: Any, *args: Any, **kwargs: Any) -> np.ndarray:
        made.append(math.prod(self.shape))
        return dense(self, *args, **kwargs)

    monkeypatch.setattr(sparse.csr_array, "toarray", watched)
    for name, value in {"ROWS_PER_TILE": 4, "COLUMNS_PER_TILE": 3, "ELEMENTS_PER_TILE": 50}.items():
        monkeypatch.setattr(reduction, name, value)
    monkeypatch.setattr(gate_table, "TRIPLES_PER_BLOCK", 4)
    reduce(as_collection(draw(16, seed=0, active=0.2)), k_diff=1)
    assert made and max(made) <= 4 * max(16, D_IN)
