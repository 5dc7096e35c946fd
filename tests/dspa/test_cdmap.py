"""`dspa.cdmap` against SPEC.md, section 2, written out in exact fractions and plain NumPy."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import random
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dspa import ConditionalDifferenceMap, FrozenSAE, MapError, PreferenceError, SteeringConfig, build_map
from dspa.cdmap import FORMAT, FORMATS, GATE_RULES, N_LARGE, QUANTUM, TENSORS, reduce
from dspa.config import SCORINGS
from dspa.densities import ROW_QUANTUM, CollectSettings, Counts, Densities, collect
from dspa.version import __version__

from .conftest import L_IN, L_OUT, VOCAB, make_map, make_sae

D_IN, D_OUT = 14, 18
# Lengths whose densities are exact in binary, and others.
DYADIC, ODD = (1, 2, 4, 8), (1, 3, 5, 6, 7)


# Densities by hand, and the map of them in exact arithmetic


def as_counts(table: np.ndarray, lengths: list[int]) -> Counts:
    rows = []
    for row, length in zip(table, lengths, strict=True):
        latents = np.flatnonzero(row)
        rows.append((torch.tensor(latents, dtype=torch.int32), torch.tensor(row[latents], dtype=torch.int32), length))
    return Counts.join(rows)


def as_densities(prompt: np.ndarray, chosen: np.ndarray, rejected: np.ndarray, lengths: np.ndarray) -> Densities:
    """Of counts [N, d] and lengths [3, N]. Each latent held as many maxima as it has rejected counts, and the
    residuals are the first four of these in halves."""
    settings = CollectSettings(
        model_name="made by hand",
        sae_in="a" * 16,
        sae_out="b" * 16,
        layer_in=L_IN,
        layer_out=L_OUT,
        d_sae_in=prompt.shape[1],
        d_sae_out=chosen.shape[1],
        dtypes="",
        count_tokens="all",
        max_length=64,
        data="",
        n_triples=len(prompt),
        n_cut=3,
    )
    tables = zip((prompt, chosen, rejected), lengths.tolist(), strict=True)
    counts = [as_counts(table, length) for table, length in tables]
    totals = torch.from_numpy(rejected[:, :4]).long() * int(0.5 / ROW_QUANTUM)
    maxima = as_counts(rejected, rejected.sum(axis=1).tolist())
    return Densities(settings, *counts, maxima=maxima, totals=totals)


def draw(n: int, seed: int, lengths_from: tuple[int, ...] = DYADIC, active: float = 0.4) -> list[np.ndarray]:
    """Counts of prompts, chosen and rejected responses, and lengths. Latent 0 is never active, latent 1 always."""
    g = np.random.default_rng(seed)
    lengths = g.choice(lengths_from, size=(3, n))
    tables = []
    for width, length in zip((D_IN, D_OUT, D_OUT), lengths, strict=True):
        table = g.integers(1, length[:, None] + 1, size=(n, width)) * (g.random((n, width)) < active)
        table[:, 0], table[:, 1] = 0, length
        tables.append(table)
    return [*tables, lengths]


def fractions(table: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return np.array([[Fraction(int(c), int(t)) for c in row] for row, t in zip(table, lengths, strict=True)])


def naive(
    data: list[np.ndarray], percentile: float = 90.0, rule: str = "published", k: int = 16, sparsify: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Gates [N, d_in] and A [d_in, d_out] in exact fractions."""
    prompt, chosen, rejected, lengths = data
    n = len(prompt)
    rho, plus, minus = (fractions(*each) for each in zip((prompt, chosen, rejected), lengths, strict=True))
    gates = rho.astype(float) >= np.percentile(rho.astype(float), percentile, axis=0)
    if rule == "active":
        gates &= prompt > 0
    A = np.full((prompt.shape[1], chosen.shape[1]), Fraction(0))
    for t in range(n):
        A = A + np.outer(gates[t].astype(int), plus[t] - minus[t]) / Fraction(n)
    if sparsify:
        sizes = []
        for row, opened in zip(A, gates.sum(axis=0), strict=True):
            if opened > 0:
                ordered = sorted(row)
                sizes += [abs(a) for a in row if (a >= ordered[-k] or a <= ordered[k - 1]) and a != 0]
        A = np.where(np.abs(A) < min(sizes), Fraction(0), A)
    return gates, A


def check(cdmap: ConditionalDifferenceMap, gates: np.ndarray, A: np.ndarray, exact: bool) -> None:
    """The map is that of these gates and this A, stored as its non-empty columns."""
    full, expected = cdmap.dense().numpy(), A.astype(np.float64).astype(np.float32)
    assert np.array_equal(full != 0, A != 0)
    assert np.abs(full - expected).max() <= (0 if exact else QUANTUM + np.spacing(np.abs(expected).max()))
    assert cdmap.columns.tolist() == np.flatnonzero((A != 0).any(axis=0)).tolist()
    assert cdmap.n_open.tolist() == gates.sum(axis=0).tolist()


def same_bits(one: ConditionalDifferenceMap, other: ConditionalDifferenceMap) -> bool:
    assert one.meta == other.meta
    return all(
        (a := getattr(one, name)).dtype == (b := getattr(other, name)).dtype and torch.equal(a, b) for name in TENSORS
    )


# Reduce


def test_by_hand() -> None:
    """Prompt densities 1/4 3/4 | 1/2 0 | 3/4 0; differences 1/2 0 1/4 | -1/4 1/4 0 | 1/4 -3/4 1/8."""
    prompt = np.array([[1, 3], [2, 0], [3, 0]])
    chosen = np.array([[4, 2, 2], [0, 4, 0], [4, 2, 1]])
    rejected = np.array([[0, 2, 0], [2, 2, 0], [2, 8, 0]])
    densities = as_densities(prompt, chosen, rejected, np.array([[4] * 3, [8] * 3, [8] * 3]))
    # tau = 0.7 0.6: gate 0 opens on prompt 2, gate 1 on prompt 0. The ends of the rows are 1/12 and -1/4, 1/6 and
    # 0, so that the cut is 1/12: the 1/24 of row 0 goes, the 1/12 of row 1 stays.
    cdmap = reduce(densities, k_diff=1)
    assert cdmap.n_open.tolist() == [1, 1]
    assert torch.equal(cdmap.dense(), torch.tensor([[1 / 12, -1 / 4, 0], [1 / 6, 0, 1 / 12]]))
    # tau = 1/2 0: gate 0 opens on prompts 1 and 2, gate 1 on all three, two of them without its latent.
    cdmap = reduce(densities, percentile=50, k_diff=1, sparsify=False)
    assert cdmap.n_open.tolist() == [2, 3]
    assert torch.equal(cdmap.dense(), torch.tensor([[0, -1 / 6, 1 / 24], [1 / 6, -1 / 6, 1 / 8]]))
    cdmap = reduce(densities, percentile=50, k_diff=1, sparsify=False, gate_rule="active")
    assert cdmap.n_open.tolist() == [2, 1]
    assert torch.equal(cdmap.dense(), torch.tensor([[0, -1 / 6, 1 / 24], [1 / 6, 0, 1 / 12]]))


@pytest.mark.parametrize("rule", GATE_RULES)
@pytest.mark.parametrize("percentile", [0, 37.5, 90, 100])
@pytest.mark.parametrize("n", [1, 2, 9, 40])
def test_gates_and_map(n: int, percentile: float, rule: str) -> None:
    data = draw(n, seed=n)
    gates, A = naive(data, percentile, rule, sparsify=False)
    check(reduce(as_densities(*data), percentile=percentile, gate_rule=rule, sparsify=False), gates, A, exact=True)


@pytest.mark.parametrize("lengths_from", [DYADIC, ODD])
@pytest.mark.parametrize("k", [1, 2, 4, D_OUT])
@pytest.mark.parametrize("n", [1, 2, 9, 40])
def test_sparsification(n: int, k: int, lengths_from: tuple[int, ...]) -> None:
    data = draw(n, seed=100 + n, lengths_from=lengths_from, active=0.8)
    gates, A = naive(data, k=k)
    check(reduce(as_densities(*data), k_diff=k), gates, A, exact=lengths_from == DYADIC)
    # Something is cut where it can be.
    if k == 1 and n > 1:
        assert (A != 0).sum() < (naive(data, sparsify=False)[1] != 0).sum()


def test_ties_with_the_cut_stay() -> None:
    """The cut is 1/6 = 1/12 + 1/12, which no binary fraction is: both sums stay, and 1/12 goes."""
    chosen = np.array([[2, 1, 1, 0], [0, 1, 0, 0]])
    data = [np.ones((2, 1), int), chosen, 0 * chosen, np.array([[1, 1], [6, 6], [6, 6]])]
    gates, A = naive(data, k=1)
    assert A.tolist() == [[Fraction(1, 6), Fraction(1, 6), 0, 0]]
    check(reduce(as_densities(*data), k_diff=1), gates, A, exact=False)


def test_rounding_makes_no_entry_of_a_zero() -> None:
    """Column 0 is 1/3 + 1/3 + 1/3 - 1 = 0, which no binary fraction sums to: it sets no cut and is no column."""
    chosen = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]])
    rejected = np.array([[0, 0, 0], [0, 0, 0], [0, 0, 0], [3, 0, 0]])
    data = [np.ones((4, 1), int), chosen, rejected, np.array([[1] * 4, [3] * 4, [3] * 4])]
    for sparsify, columns in ((True, [1]), (False, [1, 2])):
        gates, A = naive(data, k=1, sparsify=sparsify)
        check(reduce(as_densities(*data), k_diff=1, sparsify=sparsify), gates, A, exact=False)
        assert np.flatnonzero(A[0]).tolist() == columns


def test_percentile_on_a_prompt_is_that_prompt() -> None:
    """7 % of 101 prompts is the 8th smallest; in binary, 0.07 * 100 is a little more than 7."""
    n = 101
    prompt = np.arange(n)[:, None]
    response = np.ones((n, 1), int)
    densities = as_densities(prompt, response, 0 * response, np.array([[128] * n, [1] * n, [1] * n]))
    assert reduce(densities, percentile=7, k_diff=1).n_open.tolist() == [n - 7]


def test_text_without_tokens_has_density_zero() -> None:
    data = draw(5, seed=3)
    for table, lengths in zip(data[:3], data[3], strict=True):
        table[2], lengths[2] = 0, 0
    got = reduce(as_densities(*data), k_diff=2)
    for lengths in data[3]:
        lengths[2] = 1
    assert same_bits(got, reduce(as_densities(*data), k_diff=2))


@pytest.mark.parametrize("block", [1, 5, 1000])
def test_blocks_change_nothing(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    densities = as_densities(*draw(40, seed=1, lengths_from=ODD))
    whole = reduce(densities, k_diff=3)
    monkeypatch.setattr("dspa.cdmap.ROWS_A_BLOCK", block)
    assert same_bits(reduce(densities, k_diff=3), whole)


@pytest.mark.parametrize("seed", range(20))
def test_order_of_triples_does_not_show(seed: int) -> None:
    data = draw(41, seed, lengths_from=ODD)
    order = np.random.default_rng(seed).permutation(41)
    other = [*(table[order] for table in data[:3]), data[3][:, order]]
    assert same_bits(reduce(as_densities(*other), k_diff=3), reduce(as_densities(*data), k_diff=3))


def test_variance_is_that_of_all_responses() -> None:
    data = draw(30, seed=2)
    cdmap = reduce(as_densities(*data), k_diff=2)
    rho = np.concatenate([fractions(table, t).astype(float) for table, t in zip(data[1:3], data[3][1:], strict=True)])
    assert torch.equal(cdmap.variance, torch.tensor(rho.var(axis=0)[cdmap.columns], dtype=torch.float32))


def test_calibration() -> None:
    """Latents by how often they held a maximum, of equals the smaller; the mean over the tokens looked at."""
    rejected = np.array([[0, 5, 2, 0, 4], [0, 3, 2, 0, 0]])
    chosen = np.array([[1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    cdmap = reduce(as_densities(np.ones((2, 1), int), chosen, rejected, np.array([[1, 1], [8, 8], [8, 8]])), k_diff=1)
    assert cdmap.hot.tolist() == [1, 2, 4] and cdmap.hot_counts.tolist() == [8, 4, 4]
    assert cdmap.mean.tolist() == [0, 4 / 16, 2 / 16, 0]
    assert cdmap.hot_share() == 1
    cdmap.hot_counts = torch.arange(100, 0, -1)
    assert cdmap.hot_share() == pytest.approx(sum(range(37, 101)) / sum(range(1, 101))) and N_LARGE == 64


@pytest.mark.parametrize("n", [1, 7, 8, 9, 40])
def test_gates_as_bits(n: int) -> None:
    """One bit a prompt, the rest of the last byte empty; the order is that of the gates, so compare as multisets."""
    data = draw(n, seed=n)
    bits = reduce(as_densities(*data), percentile=50, gate_rule="active", k_diff=1).gates
    assert bits.shape == (D_IN, math.ceil(n / 8))
    unpacked = np.unpackbits(bits.numpy(), axis=1, bitorder="little").T
    assert not unpacked[n:].any()
    gates, _ = naive(data, 50, "active", sparsify=False)
    assert sorted(unpacked[:n].tolist()) == sorted(gates.astype(int).tolist())


def test_meta_says_how_it_was_made() -> None:
    data = draw(9, seed=0)
    meta = reduce(as_densities(*data), percentile=80.0, gate_rule="active", k_diff=3, sparsify=False).meta
    assert dataclasses.asdict(meta) == {
        "sae_in": "a" * 16,
        "sae_out": "b" * 16,
        "model_name": "made by hand",
        "layer_in": L_IN,
        "layer_out": L_OUT,
        "d_sae_in": D_IN,
        "d_sae_out": D_OUT,
        "n_triples": 9,
        "n_cut": 3,
        "count_tokens": "all",
        "max_length": 64,
        "percentile": 80.0,
        "gate_rule": "active",
        "k_diff": 3,
        "sparsify": False,
        "package": __version__,
    }


BAD_SETTINGS = [
    ({"percentile": -1}, "`percentile` is -1; accepted: 0 to 100"),
    ({"percentile": 100.5}, "`percentile` is 100.5"),
    ({"percentile": math.nan}, "`percentile` is nan"),
    ({"gate_rule": "activ"}, "`gate_rule` is 'activ'; accepted: published, active"),
    ({"k_diff": 0}, "`k_diff` is 0; accepted: 1 to"),
]


@pytest.mark.parametrize(("settings", "message"), [*BAD_SETTINGS, ({"k_diff": D_OUT + 1}, f"width, {D_OUT}")])
def test_bad_settings_of_reduce(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reduce(as_densities(*draw(5, seed=0)), **settings)


@pytest.mark.parametrize("sparsify", [True, False])
def test_equal_statistics_make_no_map(sparsify: bool) -> None:
    """Chosen and rejected of the same densities, if not of the same lengths."""
    prompt, chosen, _, lengths = draw(9, seed=0)
    lengths[2] = 3 * lengths[1]
    with pytest.raises(MapError, match="The map is empty: no output latent differs"):
        reduce(as_densities(prompt, chosen, 3 * chosen, lengths), k_diff=2, sparsify=sparsify)


def test_no_open_gate_makes_no_map() -> None:
    prompt, *rest = draw(9, seed=0)
    with pytest.raises(MapError, match="The map is empty"):
        reduce(as_densities(0 * prompt, *rest), k_diff=2, gate_rule="active")


# Scores and plans


@pytest.fixture(scope="module")
def made() -> tuple[ConditionalDifferenceMap, np.ndarray, np.ndarray]:
    """A map with its gates and its A, of which some is far from noise."""
    data = draw(60, seed=11, lengths_from=(53, 59, 61, 67))
    strength = np.random.default_rng(0).random((60, 6)) * np.linspace(0.5, 1, 6) ** 2
    data[1][:, 3:9] = data[3][1][:, None] * strength ** ([0.1, 4] * 3)
    data[2][:, 3:9] = data[3][2][:, None] * strength ** ([4, 0.1] * 3)
    options = {"percentile": 50.0, "gate_rule": "active", "sparsify": False}
    cdmap = reduce(as_densities(*data), **options, k_diff=1)
    gates, _ = naive(data, 50.0, "active", sparsify=False)
    return cdmap, gates, cdmap.dense().double().numpy()


PROMPTS = torch.randint(0, 5, (6, D_IN), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
# No latent, one latent, and many ties.
PROMPTS[0], PROMPTS[1] = 0, 0
PROMPTS[1, 4], PROMPTS[2] = 3, 1


def prompt_latents(counts: Tensor, k: int) -> list[int]:
    """The k largest counts, ties to the smaller index, without zeros."""
    return [i for i in sorted(range(len(counts)), key=lambda i: (-counts[i], i))[:k] if counts[i] > 0]


def chosen_latents(score: np.ndarray, k: int, mode: str) -> list[tuple[int, int]]:
    """Output latents and signs: the k largest positive scores, and the k smallest negative ones."""
    up = [(j, 1) for j in np.argsort(-score, kind="stable")[:k] if score[j] > 0]
    down = [(j, -1) for j in np.argsort(score, kind="stable")[:k] if score[j] < 0]
    return {"augment": up, "ablate": down, "both": up + down}[mode]


def plan_of(cdmap: ConditionalDifferenceMap, config: SteeringConfig) -> list[list[tuple[int, int]]]:
    plan = cdmap.select(PROMPTS, config)
    latents, signs = plan.latents(cdmap.columns).tolist(), plan.signs.tolist()
    assert all((j < 0) == (s == 0) for row in zip(latents, signs, strict=True) for j, s in zip(*row, strict=True))
    return [[(j, s) for j, s in zip(*row, strict=True) if s] for row in zip(latents, signs, strict=True)]


def naive_score(made: Any, latents: list[int], config: SteeringConfig) -> np.ndarray:
    cdmap, gates, A = made
    n = len(gates)
    if config.scoring == "whitened":
        variance = np.zeros(D_OUT)
        variance[cdmap.columns] = cdmap.variance
        A = np.divide(A, variance, out=np.zeros_like(A), where=variance > 0)
    elif config.scoring == "confident":
        n_open = np.maximum(gates.sum(axis=0), 1)[:, None]
        A = np.where(np.abs(A * n / n_open) > np.sqrt(2 * np.log(2 * D_OUT / config.delta) / n_open), A, 0)
    elif config.scoring == "demixed":
        g = gates[:, latents].astype(float)
        M = g.T @ g / n
        return A[latents].T @ np.linalg.solve(M + config.ridge * np.eye(len(latents)), np.ones(len(latents)))
    return A[latents].sum(axis=0)


@pytest.mark.parametrize("mode", ["ablate", "augment", "both"])
@pytest.mark.parametrize("k_prompt", [1, 3, D_IN])
@pytest.mark.parametrize(
    "scoring",
    [
        {"scoring": "raw"},
        {"scoring": "whitened"},
        {"scoring": "confident", "delta": 0.999},
        {"scoring": "demixed", "ridge": 1e-3},
        {"scoring": "demixed", "ridge": 1.0},
    ],
    ids=str,
)
def test_select(made: Any, scoring: dict[str, Any], k_prompt: int, mode: str) -> None:
    config = SteeringConfig(k_prompt=k_prompt, k_diff=4, mode=mode, **scoring)
    got = plan_of(made[0], config)
    scores = [naive_score(made, prompt_latents(counts, k_prompt), config) for counts in PROMPTS]
    for score in scores:
        # Zeros aside, no order hangs on rounding.
        gaps = np.diff(np.sort(score[score != 0]))
        assert gaps.size == 0 or gaps.min() > 1e-6
    assert got == [chosen_latents(score, 4, mode) for score in scores]
    assert got[0] == [] and any(got)


def test_scorings_differ(made: Any) -> None:
    """Else the tests above would not tell them apart."""
    configs = [SteeringConfig(k_diff=4, k_prompt=5, scoring=s, delta=0.999) for s in SCORINGS]
    plans = [plan_of(made[0], config) for config in configs]
    assert all(a != b for i, a in enumerate(plans) for b in plans[:i])


def test_radius(made: Any) -> None:
    cdmap = made[0]
    radius = cdmap.radius(0.05)
    assert radius[0] == math.inf and cdmap.n_open[0] == 0
    n_open = cdmap.n_open[1:].double()
    torch.testing.assert_close(radius[1:].double(), (2 * math.log(2 * D_OUT / 0.05) / n_open).sqrt())


def test_confidence_drops_what_is_within_its_radius(sae_in: FrozenSAE, sae_out: FrozenSAE) -> None:
    """Means 1.001 and 0.999 radii of a row with 25 of 50 prompts open, one of them negative."""
    cdmap = make_map(sae_in, sae_out, n_columns=3)
    radius = math.sqrt(2 * math.log(2 * sae_out.d_sae / 0.05) / 25)
    cdmap.values[:] = radius / 2 * torch.tensor([1.001, -0.999, -1.001])
    kept = cdmap.scored(SteeringConfig(scoring="confident", delta=0.05))
    assert torch.equal(kept, cdmap.values * torch.tensor([1, 0, 1]))


def test_score_and_dense(made: Any) -> None:
    cdmap, gates, A = made
    full = cdmap.dense()
    empty = [j for j in range(D_OUT) if j not in cdmap.columns.tolist()]
    assert empty and not full[:, empty].any() and torch.equal(full[:, cdmap.columns.long()], cdmap.values)
    for shape in ((60, D_IN), (5, 12, D_IN), (0, D_IN)):
        g = gates[: math.prod(shape[:-1])].reshape(shape)
        for given in (torch.tensor(g), torch.tensor(g, dtype=torch.float64)):
            score = cdmap.score(given)
            assert score.dtype == torch.float32
            np.testing.assert_allclose(score.numpy(), g @ A, atol=1e-6)
    assert not cdmap.score(torch.tensor(gates[0]))[empty].any()


def test_to_keeps_everything(made: Any) -> None:
    assert same_bits(made[0].to("cpu"), made[0])


# Files


@pytest.fixture
def saved(made: Any, tmp_path: Path) -> Path:
    path = tmp_path / "map.safetensors"
    made[0].save(path)
    return path


def test_round_trip(made: Any, saved: Path, tmp_path: Path) -> None:
    loaded = ConditionalDifferenceMap.load(str(saved))
    assert same_bits(loaded, made[0])
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == saved.read_bytes()
    with safe_open(saved, framework="pt") as file:
        header = json.loads(file.metadata()["dspa"])
    assert header.keys() == {"format", "sha256", "meta"} and header["format"] == FORMAT
    assert header["meta"] == dataclasses.asdict(made[0].meta)


def test_one_bit_flipped(saved: Path) -> None:
    content = bytearray(saved.read_bytes())
    content[-3] ^= 1
    saved.write_bytes(content)
    with pytest.raises(MapError, match="not those that were written"):
        ConditionalDifferenceMap.load(saved)


def without_none(of: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in of.items() if value is not None}


def rewrite(path: Path, header: Any = (), meta: Any = (), tensors: Any = ()) -> None:
    """Change entries of the header, of the map's metadata in it, and tensors; None removes."""
    with safe_open(path, framework="pt") as file:
        old = json.loads(file.metadata()["dspa"])
    new = old | {"meta": without_none(old["meta"] | dict(meta))} | dict(header)
    save_file(without_none(load_file(path) | dict(tensors)), path, {"dspa": json.dumps(without_none(new))})


def refusal(path: Path) -> str:
    with pytest.raises(MapError) as raised:
        ConditionalDifferenceMap.load(path)
    return str(raised.value)


def test_a_map_of_the_first_format(made: Any, saved: Path) -> None:
    """It has no calibration and is otherwise the same; saved, it is of this format."""
    old = {name: load_file(saved)[name] for name in FORMATS["dspa.map.1"]}
    sha = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in old.values())).hexdigest()
    rewrite(saved, {"format": "dspa.map.1", "sha256": sha}, tensors=dict.fromkeys(set(TENSORS) - set(old)))
    assert load_file(saved).keys() == old.keys()
    loaded = ConditionalDifferenceMap.load(saved)
    assert loaded.meta == made[0].meta and all(torch.equal(getattr(loaded, name), old[name]) for name in old)
    assert (len(loaded.hot), len(loaded.hot_counts), len(loaded.mean), loaded.hot_share()) == (0, 0, 0, 0)
    loaded.save(saved)
    assert same_bits(ConditionalDifferenceMap.load(saved), loaded)
    old["values"] = old["values"] + 1
    rewrite(saved, {"format": "dspa.map.1", "sha256": sha}, tensors=old)
    assert "not those that were written" in refusal(saved)


@pytest.mark.parametrize("name", TENSORS)
def test_the_checksum_is_of_every_tensor(made: Any, saved: Path, name: str) -> None:
    changed = getattr(made[0], name).clone()
    if name in ("columns", "hot"):  # still latents of the SAE, in an order that is one
        unused = sorted(set(range(D_OUT)) - set(changed.tolist()))
        changed[-1] = unused[-1]
        changed = changed.sort().values if name == "columns" else changed
    else:
        changed.view(-1)[0] += 1
    rewrite(saved, tensors={name: changed})
    assert "not those that were written" in refusal(saved)


@pytest.mark.parametrize("value", [-1, D_OUT, "repeated"])
def test_hot_latents_that_are_none(made: Any, saved: Path, value: Any) -> None:
    hot = made[0].hot.clone()
    hot[0] = hot[1] if value == "repeated" else value
    rewrite(saved, tensors={"hot": hot})
    assert "`hot` are not distinct latents of the output SAE" in refusal(saved)


@pytest.mark.parametrize("n", [0, 4, 8, 100, -1])
def test_truncated(saved: Path, n: int) -> None:
    saved.write_bytes(saved.read_bytes()[:n])
    assert f"{saved} is damaged" in refusal(saved)


@pytest.mark.parametrize("content", [b"", b"not a map, but some lines of text\n" * 20, bytes(range(256))])
def test_other_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    assert f"{path} is damaged" in refusal(path)


def test_no_file(tmp_path: Path) -> None:
    assert f"There is no map file at {tmp_path / 'no'}" in refusal(tmp_path / "no")
    assert "There is no map file at" in refusal(tmp_path)


def test_safetensors_of_another_kind(tmp_path: Path) -> None:
    save_file({"values": torch.zeros(2)}, tmp_path / "x")
    assert f"{tmp_path / 'x'} is not a map of format {FORMAT} (it says None)" in refusal(tmp_path / "x")


def test_tampered_header(saved: Path) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content.replace(b'"F32"', b'"F64"'))
    assert "is damaged" in refusal(saved)


@pytest.mark.parametrize("text", ["{", "null", "[]", "7"])
def test_header_that_is_no_header(saved: Path, text: str) -> None:
    save_file(load_file(saved), saved, {"dspa": text})
    assert f"{saved} is damaged" in refusal(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"header": {"format": "dspa.map.3"}}, f"is not a map of format {FORMAT} (it says 'dspa.map.3')"),
        ({"header": {"format": None}}, "(it says None)"),
        ({"header": {"meta": None}}, "is damaged"),
        ({"header": {"meta": 5}}, "is damaged"),
        ({"meta": {"k_diff": None}}, "'k_diff'"),
        ({"meta": {"colour": "red"}}, "'colour'"),
        ({"meta": {"d_sae_in": 15}}, "`values` is torch.float32 [14, "),
        ({"meta": {"d_sae_out": 5}}, "`columns` are not increasing latents"),
        ({"meta": {"d_sae_out": "many"}}, "is damaged"),
        ({"meta": {"n_triples": 65}}, "`gates` is torch.uint8 [14, 8]"),
        ({"meta": {"n_triples": "many"}}, "is damaged"),
    ],
    ids=str,
)
def test_changed_header(saved: Path, change: dict[str, Any], message: str) -> None:
    rewrite(saved, **change)
    assert message in refusal(saved)


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("how", ["missing", "dtype", "shape"])
def test_changed_tensors(made: Any, saved: Path, name: str, how: str) -> None:
    tensor = getattr(made[0], name)
    changed = {"missing": None, "dtype": tensor.to(torch.float16), "shape": tensor[:-1].clone()}
    rewrite(saved, tensors={name: changed[how]})
    message = refusal(saved)
    assert "damaged" in message and (how == "shape" or name in message)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["values", "variance", "mean"])
def test_values_that_are_not_finite(made: Any, saved: Path, name: str, value: float) -> None:
    tensor = getattr(made[0], name).clone()
    tensor.view(-1)[2] = value
    rewrite(saved, tensors={name: tensor})
    assert f"`{name}` hold NaN or infinity" in refusal(saved)


@pytest.mark.parametrize("change", ["repeated", "descending", "negative", "beyond"])
def test_columns_that_are_no_columns(made: Any, saved: Path, change: str) -> None:
    columns = made[0].columns.clone()
    if change == "descending":
        columns = columns.flip(0)
    else:
        place, value = {"repeated": (1, columns[0]), "negative": (0, -1), "beyond": (-1, D_OUT)}[change]
        columns[place] = value
    rewrite(saved, tensors={"columns": columns})
    assert "`columns` are not increasing latents of the output SAE" in refusal(saved)


# The SAEs it belongs to


def test_its_own_saes(sae_in: FrozenSAE, sae_out: FrozenSAE, cdmap: ConditionalDifferenceMap) -> None:
    cdmap.check_saes(sae_in, sae_out)
    cdmap.check_saes(sae_in.to(dtype=torch.bfloat16), sae_out)


@pytest.mark.parametrize("name", ["sae_in", "sae_out"])
def test_other_saes(sae_in: FrozenSAE, sae_out: FrozenSAE, cdmap: ConditionalDifferenceMap, name: str) -> None:
    saes = {"sae_in": sae_in, "sae_out": sae_out}
    own, other = saes[name], make_sae(saes[name].layer, saes[name].d_sae, seed=77)
    with pytest.raises(MapError, match=f"`{name}` has fingerprint {other.fingerprint} and .* with {own.fingerprint}"):
        cdmap.check_saes(**saes | {name: other})


def test_swapped_saes(sae_in: FrozenSAE, sae_out: FrozenSAE, cdmap: ConditionalDifferenceMap) -> None:
    with pytest.raises(MapError, match=f"`sae_in` has fingerprint {sae_out.fingerprint} and"):
        cdmap.check_saes(sae_out, sae_in)


def test_an_sae_at_another_layer(sae_in: FrozenSAE, sae_out: FrozenSAE, cdmap: ConditionalDifferenceMap) -> None:
    moved = make_sae(L_OUT + 1, sae_out.d_sae, seed=2)
    assert moved.fingerprint == sae_out.fingerprint
    with pytest.raises(MapError, match=f"`sae_out` sits at layer {L_OUT + 1} and the map was made at layer {L_OUT}"):
        cdmap.check_saes(sae_in, moved)


# End to end


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0")


@pytest.fixture
def prefs(tmp_path: Path) -> Path:
    g = random.Random(5)
    path = tmp_path / "prefs.jsonl"

    def text() -> str:
        return " ".join(f"w{g.randrange(1, VOCAB)}" for _ in range(g.randrange(3, 10)))

    lines = [json.dumps({"prompt": text(), "chosen": text(), "rejected": text()}) for _ in range(12)]
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize(
    "settings", [{}, {"percentile": 60.0, "gate_rule": "active", "k_diff": 2}, {"sparsify": False}], ids=str
)
def test_build_map_is_reduce_of_collect(
    model: PreTrainedModel, sae_in: FrozenSAE, sae_out: FrozenSAE, prefs: Path, settings: dict[str, Any]
) -> None:
    options = {"count_tokens": "text", "max_length": 12, "work_dir": prefs.parent / "work", "model_name": "mine"}
    both = (model, make_tokenizer(), prefs, sae_in, sae_out)
    built = build_map(*both, progress=False, **options, **settings)
    del options["work_dir"]
    assert same_bits(built, reduce(collect(*both, progress=False, **options), **settings))
    assert (prefs.parent / "work" / "settings.json").exists()
    assert (built.meta.count_tokens, built.meta.max_length, built.meta.n_triples) == ("text", 12, 12)
    assert built.meta.model_name == "mine" and built.meta.n_cut > 0
    built.check_saes(sae_in, sae_out)
    assert len(built.hot) > 1 and built.mean.shape == (sae_out.d_in,) and built.mean.any()
    built.save(prefs.parent / "map")
    assert same_bits(ConditionalDifferenceMap.load(prefs.parent / "map"), built)


@pytest.mark.parametrize(("settings", "message"), [*BAD_SETTINGS, ({"k_diff": 129}, "`k_diff` is 129.*width, 128")])
def test_build_map_checks_its_settings_first(
    model: PreTrainedModel, sae_in: FrozenSAE, sae_out: FrozenSAE, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_map(model, make_tokenizer(), "no such file", sae_in, sae_out, **settings)


def test_build_map_names_a_bad_line(model: PreTrainedModel, sae_in: FrozenSAE, sae_out: FrozenSAE, prefs: Path) -> None:
    prefs.write_text(prefs.read_text() + '\n{"prompt": "w1"}\n')
    with pytest.raises(PreferenceError, match=f"{prefs} line 13"):
        build_map(model, make_tokenizer(), prefs, sae_in, sae_out, progress=False)
