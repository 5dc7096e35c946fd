"""`dspa.maps.cdmap` against SPEC.md, sections 2 and 3, in plain NumPy, and its files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dspa import ConditionalDifferenceMap, FrozenSAE, MapError, SteeringConfig, reduce
from dspa.config import SCORINGS
from dspa.files import sealed
from dspa.maps.cdmap import EARLIER, FORMAT, FORMATS, TENSORS
from dspa.testing import L_OUT, make_map, make_sae

from ...rounding import rounding
from ..support.counts import D_IN, D_OUT, as_collection, draw, naive, same_bits

# Scores and plans


@pytest.fixture(scope="module")
def made() -> tuple[ConditionalDifferenceMap, np.ndarray, np.ndarray]:
    """A map with its gates and its A, some of whose entries are far from noise."""
    data = draw(60, seed=11, lengths_from=(53, 59, 61, 67))
    data[0][:, 5] = data[3][0]
    strength = np.random.default_rng(0).random((60, 6)) * np.linspace(0.5, 1, 6) ** 2
    data[1][:, 3:9] = data[3][1][:, None] * strength ** ([0.1, 4] * 3)
    data[2][:, 3:9] = data[3][2][:, None] * strength ** ([4, 0.1] * 3)
    options = {"percentile": 50.0, "gate_rule": "active", "sparsify": False}
    cdmap = reduce(as_collection(data), **options, k_diff=1)
    gates, _ = naive(data, 50.0, "active", sparsify=False)
    # Gates of all kinds: never open, always, and on some prompts.
    assert cdmap.n_open[[0, 1, 5]].tolist() == [0, 60, 60] and 8 < len(cdmap.gate_latents) < D_IN
    return cdmap, gates, cdmap.dense().double().numpy()


PROMPTS = torch.randint(0, 5, (6, D_IN), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
# No latent, one latent, and many ties.
PROMPTS[0], PROMPTS[1] = 0, 0
PROMPTS[1, 4], PROMPTS[2] = 3, 1


def prompt_latents(counts: Tensor, k: int) -> list[int]:
    """Return the k largest counts, ties to the smaller index, without zeros."""
    return [i for i in sorted(range(len(counts)), key=lambda i: (-counts[i], i))[:k] if counts[i] > 0]


def chosen_latents(score: np.ndarray, k: int, mode: str) -> list[tuple[int, int]]:
    """Return output latents and signs: the k largest positive scores, and the k smallest negative ones."""
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
    """Otherwise the tests above would not distinguish them."""
    configs = [SteeringConfig(k_diff=4, k_prompt=5, scoring=s, delta=0.999) for s in SCORINGS]
    plans = [plan_of(made[0], config) for config in configs]
    assert all(a != b for i, a in enumerate(plans) for b in plans[:i])


def test_radius(made: Any) -> None:
    cdmap = made[0]
    radius = cdmap.radius(0.05)
    assert radius[0] == math.inf and cdmap.n_open[0] == 0
    n_open = cdmap.n_open[1:].double()
    expected = (2 * math.log(2 * D_OUT / 0.05) / n_open).sqrt()
    torch.testing.assert_close(radius[1:].double(), expected, rtol=rounding(2, 1.0), atol=0)


def test_confidence_drops_what_is_within_its_radius(sae_in: FrozenSAE, sae_out: FrozenSAE) -> None:
    """Means 1.001 and 0.999 radii of each row with N_i of 50 prompts open, one of them negative."""
    cdmap = make_map(sae_in, sae_out, n_columns=3)
    n_open = cdmap.n_open.double()[:, None]
    radius = (2 * math.log(2 * sae_out.d_sae / 0.05) / n_open).sqrt()
    cdmap.values[:] = radius * n_open / 50 * torch.tensor([1.001, -0.999, -1.001])
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
            terms = float((g @ np.abs(A)).max(initial=0))
            np.testing.assert_allclose(score.numpy(), g @ A, rtol=0, atol=rounding(2, terms))
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
    assert header.keys() == {"format", "sha256", "meta", "seal"} and header["format"] == FORMAT
    assert header["meta"] == dataclasses.asdict(made[0].meta)


def test_one_bit_flipped(saved: Path) -> None:
    content = bytearray(saved.read_bytes())
    content[-3] ^= 1
    saved.write_bytes(content)
    with pytest.raises(MapError, match="not those that were written"):
        ConditionalDifferenceMap.load(saved)


def without_none(of: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in of.items() if value is not None}


def rewrite(path: Path, header: Any = (), meta: Any = (), tensors: Any = (), *, seal: bool = True) -> None:
    """Change entries of the header, of the map's metadata in it, and tensors; None removes.

    With `seal`, the checksum is that of the changed tensors, so that other checks have to find the error. The seal of
    the header is that of the changed one.
    """
    with safe_open(path, framework="pt") as file:
        old = json.loads(file.metadata()["dspa"])
    new = old | {"meta": without_none(old["meta"] | dict(meta))} | dict(header)
    kept = without_none(load_file(path) | dict(tensors))
    names = FORMATS.get(new["format"], ())
    if seal and kept.keys() == set(names):
        new["sha256"] = hashlib.sha256(b"".join(kept[name].numpy().tobytes() for name in names)).hexdigest()
    new = without_none(new)
    save_file(kept, path, {"dspa": json.dumps(sealed(new))})


def refusal(path: Path) -> str:
    with pytest.raises(MapError) as raised:
        ConditionalDifferenceMap.load(path)
    return str(raised.value)


def all_gates(cdmap: ConditionalDifferenceMap) -> Tensor:
    """Return one row of bits per latent, as earlier formats had them."""
    n = cdmap.meta.n_triples
    gates = torch.zeros(cdmap.meta.d_sae_in, cdmap.gates.shape[1], dtype=torch.uint8)
    gates[cdmap.n_open == n] = torch.tensor(np.packbits(np.ones(n, dtype=bool), bitorder="little"))
    gates[cdmap.gate_latents.long()] = cdmap.gates
    return gates


def earlier(cdmap: ConditionalDifferenceMap, path: Path, form: str) -> dict[str, Tensor]:
    """Write the map in an earlier format."""
    cdmap.save(path)
    old = {name: all_gates(cdmap) if name == "gates" else getattr(cdmap, name) for name in EARLIER[form]}
    rewrite(path, {"format": form}, tensors=dict.fromkeys(TENSORS) | old)
    assert load_file(path).keys() == old.keys()
    return old


@pytest.mark.parametrize("form", EARLIER)
def test_a_map_of_an_earlier_format(made: Any, tmp_path: Path, form: str) -> None:
    """The first has no calibration; both are otherwise equal, and saving them again gives the current format."""
    path = tmp_path / "map"
    old = earlier(made[0], path, form)
    loaded = ConditionalDifferenceMap.load(path)
    calibration = ("hot", "hot_counts", "mean")
    assert loaded.meta == made[0].meta
    for name in set(TENSORS) - set(calibration):
        assert torch.equal(getattr(loaded, name), getattr(made[0], name)), name
    if form == "dspa.map.1":
        assert (len(loaded.hot), len(loaded.hot_counts), len(loaded.mean), loaded.hot_share()) == (0, 0, 0, 0)
    else:
        assert same_bits(loaded, made[0]) and len(loaded.hot) > 1
    for scoring in SCORINGS:
        config = SteeringConfig(k_diff=4, k_prompt=5, scoring=scoring)
        assert plan_of(loaded, config) == plan_of(made[0], config)
    loaded.save(path)
    assert read_format(path) == FORMAT and same_bits(ConditionalDifferenceMap.load(path), loaded)
    earlier(made[0], path, form)
    rewrite(path, tensors={"values": old["values"] + 1}, seal=False)
    assert "not those that were written" in refusal(path)


@pytest.mark.parametrize("form", EARLIER)
@pytest.mark.parametrize("rows", [0, D_IN - 1])
def test_an_earlier_format_without_all_gates(made: Any, tmp_path: Path, form: str, rows: int) -> None:
    old = earlier(made[0], tmp_path / "map", form)
    old["gates"] = old["gates"][:rows].clone()
    rewrite(tmp_path / "map", tensors=old)
    assert "is damaged" in refusal(tmp_path / "map")


def read_format(path: Path) -> str:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["dspa"])["format"]


def test_formats() -> None:
    assert FORMAT == "dspa.map.3" and set(FORMATS) == {"dspa.map.1", "dspa.map.2", FORMAT}


@pytest.mark.parametrize("name", TENSORS)
def test_the_checksum_is_of_every_tensor(made: Any, saved: Path, name: str) -> None:
    changed = getattr(made[0], name).clone()
    if name in ("columns", "hot"):  # still latents of the SAE, in an order that is one
        unused = sorted(set(range(D_OUT)) - set(changed.tolist()))
        changed[-1] = unused[-1]
        changed = changed.sort().values if name == "columns" else changed
    else:
        changed.view(-1)[0] += 1
    rewrite(saved, tensors={name: changed}, seal=False)
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
    assert "is a folder. If it holds counts, make a map from them: dspa map reduce" in refusal(tmp_path)


def test_safetensors_of_another_kind(tmp_path: Path) -> None:
    save_file({"values": torch.zeros(2)}, tmp_path / "x")
    assert f"{tmp_path / 'x'} is not a map of format {FORMAT} (it says None)" in refusal(tmp_path / "x")


def test_tampered_header(saved: Path) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content.replace(b'"F32"', b'"F64"'))
    assert "is damaged" in refusal(saved)


@pytest.mark.parametrize(
    ("text", "problem"),
    [("{", "is damaged"), ("null", "is not a map of"), ("[]", "is not a map of"), ("7", "is not a map of")],
)
def test_header_that_is_no_header(saved: Path, text: str, problem: str) -> None:
    save_file(load_file(saved), saved, {"dspa": text})
    assert f"{saved} {problem}" in refusal(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"header": {"format": "dspa.map.4"}}, f"is not a map of format {FORMAT} (it says 'dspa.map.4')"),
        ({"header": {"format": None}}, "(it says None)"),
        ({"header": {"format": "dspa.map.2"}}, "is damaged"),
        ({"header": {"sha256": None}, "seal": False}, "`sha256` is missing"),
        ({"header": {"meta": None}}, "is damaged"),
        ({"header": {"meta": 5}}, "is damaged"),
        ({"meta": {"k_diff": None}}, "`meta.k_diff` is missing"),
        ({"meta": {"colour": "red"}}, "`meta.colour` is not known"),
        ({"meta": {"d_sae_in": 15}}, "`values` is torch.float32 [14, "),
        ({"meta": {"d_sae_out": 5}}, "`columns` are not increasing latents"),
        ({"meta": {"d_sae_out": "many"}}, "is damaged"),
        ({"meta": {"n_triples": 65}}, "`gates` is torch.uint8 ["),
        ({"meta": {"n_triples": "many"}}, "is damaged"),
    ],
    ids=str,
)
def test_changed_header(saved: Path, change: dict[str, Any], message: str) -> None:
    rewrite(saved, **change)
    assert message in refusal(saved)


def edit_header(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change the header, and nothing that covers it."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["dspa"])
    edit(header)
    save_file(load_file(path), path, {"dspa": json.dumps(header)})


@pytest.mark.parametrize(
    "edit",
    [
        lambda header: header["meta"].update(sae_in="0" * 16),
        lambda header: header["meta"].update(sae_out="0" * 16),
        lambda header: header["meta"].update(model_name="another"),
        lambda header: header["meta"].update(k_diff=header["meta"]["k_diff"] - 1),
        lambda header: header.update(sources={"model": {"path": "elsewhere", "digest": ""}}),
        lambda header: header.update(promoted={"sae_in": {"0": ["more"]}}),
        lambda header: header.update(seal="0" * 16),
    ],
    ids=["sae_in", "sae_out", "model_name", "k_diff", "sources", "promoted", "seal"],
)
def test_no_entry_of_the_header_can_be_edited(saved: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    edit_header(saved, edit)
    assert "was changed after it was written: its seal does not fit it. Copy it again" in refusal(saved)


def test_a_map_without_a_seal(made: Any, saved: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Earlier versions wrote none. It is read, with a warning, and saved with one."""
    ConditionalDifferenceMap.load(saved)
    assert not [warning for warning in recwarn if "its seal" in str(warning.message)]
    edit_header(saved, lambda header: header.pop("seal"))
    with pytest.warns(UserWarning, match=r"earlier version, or its seal was removed: .*load and save it again"):
        loaded = ConditionalDifferenceMap.load(saved)
    assert same_bits(loaded, made[0])
    loaded.save(saved)
    recwarn.clear()
    ConditionalDifferenceMap.load(saved)
    assert not [warning for warning in recwarn if "its seal" in str(warning.message)]


def test_the_seal_of_a_map_with_tokens(made: Any, tmp_path: Path) -> None:
    """JSON turns the numbers of latents into text, in which 10 comes before 9."""
    cdmap = made[0].replaced()
    cdmap.promoted = {"sae_in": {9: ["a"], 10: ["b", "é\n"]}}
    cdmap.save(tmp_path / "map")
    assert ConditionalDifferenceMap.load(tmp_path / "map").promoted == cdmap.promoted


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("how", ["missing", "dtype", "shape"])
def test_changed_tensors(made: Any, saved: Path, name: str, how: str) -> None:
    tensor = getattr(made[0], name)
    changed = {"missing": None, "dtype": tensor.to(torch.float16), "shape": tensor[:-1].clone()}
    # Only the checksum shows a change of the width of a residual.
    rewrite(saved, tensors={name: changed[how]}, seal=name != "mean" or how != "shape")
    message = refusal(saved)
    assert "damaged" in message and (how == "shape" or name in message)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["values", "variance", "mean"])
def test_values_that_are_not_finite(made: Any, saved: Path, name: str, value: float) -> None:
    tensor = getattr(made[0], name).clone()
    tensor.view(-1)[2] = value
    rewrite(saved, tensors={name: tensor})
    assert f"`{name}` hold NaN or infinity" in refusal(saved)


@pytest.mark.parametrize("change", ["one more", "one less", "descending", "repeated", "negative", "beyond"])
def test_gates_of_other_latents(made: Any, saved: Path, change: str) -> None:
    latents = made[0].gate_latents.tolist()
    changed = {
        "one more": [0, *latents],
        "one less": latents[1:],
        "descending": latents[::-1],
        "repeated": [latents[0], *latents[:-1]],
        "negative": [-1, *latents[1:]],
        "beyond": [*latents[:-1], D_IN],
    }[change]
    gates = torch.zeros(len(changed), made[0].gates.shape[1], dtype=torch.uint8)
    rewrite(saved, tensors={"gate_latents": torch.tensor(changed, dtype=torch.int32), "gates": gates})
    assert "`gate_latents` are not the latents whose gates are partly open" in refusal(saved)


def test_a_map_without_columns(made: Any, saved: Path) -> None:
    rewrite(saved, tensors={name: getattr(made[0], name)[..., :0] for name in ("columns", "values", "variance")})
    assert "The map has no columns: it would steer nothing" in refusal(saved)


def test_a_map_that_counts_no_inactive_latents(made: Any, saved: Path) -> None:
    """As earlier versions wrote it."""
    rewrite(saved, meta={"n_inactive": None, "n_zero_percentile": None})
    loaded = ConditionalDifferenceMap.load(saved).meta
    assert loaded == dataclasses.replace(made[0].meta, n_inactive=None, n_zero_percentile=None)


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


# The SAEs of a map


def test_its_own_saes(sae_in: FrozenSAE, sae_out: FrozenSAE, cdmap: ConditionalDifferenceMap) -> None:
    cdmap.check_saes(sae_in, sae_out)
    cdmap.check_saes(sae_in.to(dtype=torch.bfloat16), sae_out)


@pytest.mark.parametrize("name", ["sae_in", "sae_out"])
def test_other_saes(sae_in: FrozenSAE, sae_out: FrozenSAE, cdmap: ConditionalDifferenceMap, name: str) -> None:
    saes = {"sae_in": sae_in, "sae_out": sae_out}
    own, other = saes[name], make_sae(saes[name].layer, saes[name].d_sae, seed=77)
    with pytest.raises(MapError, match=f"`{name}` has fingerprint {other.fingerprint}, and .* with {own.fingerprint}"):
        cdmap.check_saes(**saes | {name: other})


def test_swapped_saes(sae_in: FrozenSAE, sae_out: FrozenSAE, cdmap: ConditionalDifferenceMap) -> None:
    with pytest.raises(MapError, match=f"`sae_in` has fingerprint {sae_out.fingerprint}, and"):
        cdmap.check_saes(sae_out, sae_in)


def test_an_sae_at_another_layer(sae_in: FrozenSAE, sae_out: FrozenSAE, cdmap: ConditionalDifferenceMap) -> None:
    moved = make_sae(L_OUT + 1, sae_out.d_sae, seed=2)
    assert moved.fingerprint == sae_out.fingerprint
    with pytest.raises(MapError, match=f"`sae_out` sits at layer {L_OUT + 1}, and the map was made at layer {L_OUT}"):
        cdmap.check_saes(sae_in, moved)


def test_a_loaded_map_is_a_copy(made, saved, tmp_path) -> None:
    """Changes of the file in place, afterwards, do not show."""
    loaded, other = ConditionalDifferenceMap.load(saved), tmp_path / "other"
    made[0].replaced(values=made[0].values * 2).save(other)
    with saved.open("r+b") as file:
        file.write(other.read_bytes())
    assert same_bits(loaded, made[0]) and not same_bits(ConditionalDifferenceMap.load(saved), loaded)
    # A process that reads mapped pages that are gone ends with SIGBUS.
    os.truncate(saved, 0)
    assert same_bits(loaded, made[0])


def with_first(tensor: Tensor, value: float) -> Tensor:
    changed = tensor.clone()
    changed.view(-1)[0] = value
    return changed


@pytest.mark.parametrize(
    ("meta", "tensors", "message"),
    [
        ({"percentile": math.nan}, {}, "`meta.percentile` is nan; accepted: 0 to 100"),
        ({"percentile": True}, {}, "`meta.percentile` is True"),
        ({"n_cut": -1}, {}, "`meta.n_cut` is -1; accepted: a whole number >= 0"),
        ({"n_cut": 121}, {}, "`n_cut` is 121; accepted: at most 120, the number of responses"),
        ({"n_inactive": D_IN + 1}, {}, f"`n_inactive` is {D_IN + 1}; accepted: at most {D_IN}"),
        ({"k_diff": 3.7}, {}, "`meta.k_diff` is 3.7; accepted: a whole number >= 1"),
        ({"k_diff": D_OUT + 1}, {}, f"`k_diff` is {D_OUT + 1}; accepted: at most {D_OUT}"),
        ({"layer_in": -1}, {}, "`meta.layer_in` is -1"),
        ({"d_sae_in": 0}, {}, "`meta.d_sae_in` is 0"),
        ({"sparsify": "false"}, {}, "`meta.sparsify` is 'false'; accepted: true or false"),
        ({"gate_rule": ["active"]}, {}, "`meta.gate_rule` is ['active']; accepted: published, active"),
        ({"chat_template_kwargs": [1]}, {}, "`meta.chat_template_kwargs` is [1]; accepted: an object"),
        ({}, {"n_open": 61}, "`n_open` are not all from 0 to 60"),
        ({}, {"n_open": -1}, "`n_open` are not all from 0 to 60"),
        ({}, {"variance": -0.5}, "`variance` are not all from 0"),
        ({}, {"hot_counts": 0}, "`hot_counts` are not all from 1"),
        ({}, {"hot_counts": 1}, "`hot_counts` are not in decreasing order"),
        ({}, {"gates": 255}, "`gates` are not open on as many prompts as `n_open` says"),
    ],
    ids=str,
)
def test_a_checksum_is_no_proof_of_sense(
    made: Any, saved: Path, meta: dict[str, Any], tensors: dict[str, float], message: str
) -> None:
    assert made[0].meta.n_triples == 60 and made[0].hot_counts[1] > 1 and made[0].gates[0, 0] != 255
    rewrite(saved, meta=meta, tensors={name: with_first(getattr(made[0], name), v) for name, v in tensors.items()})
    assert message in refusal(saved) and "damaged" in refusal(saved)


def test_gates_of_no_prompt(made: Any, saved: Path) -> None:
    """60 prompts leave four bits of each row without one."""
    gates = made[0].gates.clone()
    gates[0, -1] |= 128
    rewrite(saved, tensors={"gates": gates})
    assert "`gates` are not open on as many prompts" in refusal(saved)


@pytest.mark.parametrize(
    "header", [{"sources": {"model": {"path": 3, "digest": "x"}}}, {"promoted": {"sae_in": {"x": ["a"]}}}], ids=str
)
def test_records_that_are_not_the_maps_identity(saved: Path, header: dict[str, Any]) -> None:
    rewrite(saved, header=header)
    assert f"{saved} is damaged: `{next(iter(header))}." in refusal(saved)
