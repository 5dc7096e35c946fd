"""Readers of files meet damaged files: each is refused by the reader's own error, or read as something that is valid.

A folder or file that is accepted is used once, and what comes out of it is within the bounds of what it means.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dspa.config import SteeringConfig
from dspa.data.triples import Triple, load_triples
from dspa.errors import LabelError, MapError, PreferenceError, SAEError
from dspa.files import METADATA_KEY, write_tensors
from dspa.maps.cdmap import ConditionalDifferenceMap
from dspa.maps.collect import collect
from dspa.maps.collection import Collection
from dspa.maps.reduce import reduce
from dspa.saes.frozen import FrozenSAE
from dspa.saes.labels import read_labels, read_rules
from dspa.testing import L_IN, L_OUT, make_map, make_model, make_sae, word_tokenizer

from .conftest import TIMES
from .mutations import damaged_bytes, damaged_json, damaged_lines, damaged_tensors

N_EXAMPLES = 200 * max(1, TIMES)
TRIPLES = [
    {"prompt": "the old cat", "chosen": "is my own", "rejected": "by a dog"},
    {"prompt": [{"role": "user", "content": "the dog"}], "chosen": [{"role": "assistant", "content": "run home"}],
     "rejected": [{"role": "assistant", "content": "by a tree"}]},
    {"chosen": "we see it run", "rejected": "we see a tree"},
]  # fmt: skip
PLAIN = [TRIPLES[0], TRIPLES[2], {"prompt": "a red tree", "chosen": "is old", "rejected": "is near"}]

fuzz = settings(
    max_examples=N_EXAMPLES,
    derandomize=not TIMES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Valid files: an SAE, a map, counts, labels, rules."""
    folder = tmp_path_factory.mktemp("valid")
    sae_in, sae_out = make_sae(L_IN, 24, seed=1), make_sae(L_OUT, 32, seed=2)
    sae_in.save(folder / "sae")
    make_map(sae_in, sae_out, n_columns=8, n_triples=12).save(folder / "map")
    collect(make_model("gemma2"), word_tokenizer(), PLAIN, sae_in, sae_out, work_dir=folder / "counts", progress=False)
    return folder


def resealed(source: Path, target: Path, data: st.DataObject) -> None:
    """Write a file of `write_tensors` with damaged tensors or a damaged header, and the checksum that fits them."""
    with safe_open(source, framework="pt") as file:
        header = json.loads(file.metadata()[METADATA_KEY])
    tensors = load_file(source)
    tensors = {name: tensors[name] for name in header.get("order", tensors)}
    if data.draw(st.booleans()):
        tensors = data.draw(damaged_tensors(tensors))
    else:
        header = data.draw(damaged_json(header))
    write_tensors(target, tensors, header if isinstance(header, dict) else {"header": header})


@fuzz
@given(data=st.data())
def test_maps(folder, done, data):
    done["damaged files: maps"] += 1
    path = folder / "damaged-map"
    if data.draw(st.booleans()):
        path.write_bytes(data.draw(damaged_bytes((folder / "map").read_bytes())))
    else:
        resealed(folder / "map", path, data)
    try:
        cdmap = ConditionalDifferenceMap.load(path)
    except MapError:
        return
    meta = cdmap.meta
    assert cdmap.values.shape == (meta.d_sae_in, len(cdmap.columns)) and cdmap.values.isfinite().all()
    assert cdmap.n_open.min() >= 0 and cdmap.n_open.max() <= meta.n_triples and cdmap.variance.min() >= 0
    assert 0 <= meta.percentile <= 100 and meta.k_diff > 0
    plan = cdmap.select(torch.ones(2, meta.d_sae_in, dtype=torch.int32), SteeringConfig(k_prompt=3, k_diff=4))
    assert plan.latents(cdmap.columns).max() < meta.d_sae_out


@fuzz
@given(data=st.data())
def test_saes(folder, done, data):
    done["damaged files: saes"] += 1
    damaged = folder / "damaged-sae"
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(folder / "sae", damaged)
    weights, config = damaged / "sae_weights.safetensors", damaged / "cfg.json"
    match data.draw(st.sampled_from(["weights", "tensors", "config", "text"])):
        case "weights":
            weights.write_bytes(data.draw(damaged_bytes(weights.read_bytes())))
        case "tensors":
            save_file(
                {name: tensor.contiguous() for name, tensor in data.draw(damaged_tensors(load_file(weights))).items()},
                weights,
            )
        case "config":
            config.write_text(json.dumps(data.draw(damaged_json(json.loads(config.read_text())))))
        case "text":
            config.write_bytes(data.draw(damaged_bytes(config.read_bytes())))
    try:
        sae = FrozenSAE.load(damaged)
    except SAEError:
        return
    f = sae.encode(torch.ones(1, sae.d_in, dtype=sae.W_enc.dtype))
    assert f.shape == (1, sae.d_sae) and f.isfinite().all()
    assert all(getattr(sae, name).isfinite().all() for name in ("W_enc", "b_enc", "W_dec", "b_dec"))


@fuzz
@given(data=st.data())
def test_counts(folder, done, data):
    done["damaged files: counts"] += 1
    damaged = folder / "damaged-counts"
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(folder / "counts", damaged)
    path = data.draw(st.sampled_from(sorted(damaged.iterdir())))
    if path.suffix == ".json":
        if data.draw(st.booleans()):
            path.write_text(json.dumps(data.draw(damaged_json(json.loads(path.read_text())))))
        else:
            path.write_bytes(data.draw(damaged_bytes(path.read_bytes())))
    elif data.draw(st.booleans()):
        path.write_bytes(data.draw(damaged_bytes(path.read_bytes())))
    else:
        resealed(path, path, data)
    try:
        cdmap = reduce(Collection.open(damaged))
    except MapError:
        return
    assert cdmap.values.isfinite().all() and cdmap.n_open.max() <= cdmap.meta.n_triples
    # A density is a share of a response's tokens, and a value a mean of differences of two.
    assert cdmap.values.abs().max() <= 1


LABELS = [{"index": 3, "category": "style"}, {"index": "4", "category": "topic", "layer": str(L_IN), "modelId": "m"}]
DESCRIBED = [
    {"index": 1, "description": "polite words", "explanationModelName": "x"},
    {"index": 2, "description": "cats"},
]


@fuzz
@given(data=st.data())
def test_labels(folder, done, data):
    done["damaged files: labels"] += 1
    sae = FrozenSAE.load(folder / "sae")
    rules, path = folder / "rules.json", folder / "labels.jsonl"
    rules.write_text(json.dumps({"style": ["polite"], "topic": ["cat|dog"]}))
    described = data.draw(st.booleans())
    path.write_bytes(data.draw(damaged_lines(DESCRIBED if described else LABELS)))
    try:
        labels = read_labels(path, sae, rules=rules if described else None)
    except LabelError:
        return
    assert labels.categories
    assert all(0 <= latent < sae.d_sae and isinstance(name, str) for latent, name in labels.categories.items())


@fuzz
@given(data=st.data())
def test_rules(folder, done, data):
    done["damaged files: rules"] += 1
    path = folder / "damaged-rules.json"
    valid = {"style": ["polite", "(?:dear|sir)"], "topic": ["cat|dog"]}
    if data.draw(st.booleans()):
        path.write_bytes(data.draw(damaged_bytes(json.dumps(valid).encode())))
    else:
        path.write_text(json.dumps(data.draw(damaged_json(valid))))
    try:
        rules = read_rules(path)
    except LabelError:
        return
    assert rules and all(isinstance(name, str) and patterns for name, patterns in rules.items())


@fuzz
@given(data=st.data())
def test_triples(folder, done, data):
    done["damaged files: triples"] += 1
    path = folder / "triples.jsonl"
    path.write_bytes(data.draw(damaged_lines(TRIPLES)))
    try:
        triples: list[Any] = list(load_triples(path))
    except PreferenceError:
        return
    assert triples and all(isinstance(triple, Triple) for triple in triples)
    assert all(triple.chosen and triple.rejected and triple.chosen != triple.rejected for triple in triples)
    for triple in triples:
        for text in (triple.prompt, triple.chosen, triple.rejected):
            json.dumps(text).encode() if not isinstance(text, str) else text.encode("utf-8")
