"""Readers of files meet damaged files: each is refused by the reader's own error, or read as something that is valid.

A folder or file that is accepted is used once, and what comes out of it is within the bounds of what it means.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dspa.config import POSITIONS, SteeringConfig
from dspa.data.triples import Triple, load_triples
from dspa.errors import LabelError, MapError, PreferenceError, SAEError, TrainingError, VectorError
from dspa.files import METADATA_KEY, SEAL, sealed, write_tensors
from dspa.fsrl import TrainingConfig, read_held_out
from dspa.fsrl.training import trained_template
from dspa.maps.cdmap import ConditionalDifferenceMap
from dspa.maps.collect import collect
from dspa.maps.collection import Collection
from dspa.maps.reduce import reduce
from dspa.saes.activations import Position
from dspa.saes.batchtopk import new_sae
from dspa.saes.checkpoints import restore_checkpoint, save_checkpoint
from dspa.saes.config import SAETrainingConfig
from dspa.saes.fitting import _trainer
from dspa.saes.frozen import FrozenSAE
from dspa.saes.labels import read_labels, read_rules
from dspa.saes.quality import weaknesses
from dspa.saes.records import read_figures, read_record
from dspa.steering.vector import SteeringVector
from dspa.testing import L_IN, L_OUT, make_map, make_model, make_sae, word_tokenizer
from dspa.training_folder import TrainingFolder

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

# What trainings write to their folders, at the end.
QUALITY = {"explained_variance": 0.7, "l0": 7.5, "dead": 3, "mse": 2.5, "n_tokens": 200, "n_left_out": 4}
QUALITY |= {"explained_variance_all": 0.8, "top_variance": 0.1}
HISTORY = [{"tokens": 64 * n, "loss": 3.0 / n, "explained_variance": 0.1 * n, "l0": 7.0, "dead": 5} for n in (1, 2)]
SAE_TRAINING = {
    "settings": {"model_name": "m", "layer": 2, "sae": None, "d_sae": 96, "k": 8, "data": "d", "template_date": None}
    | asdict(SAETrainingConfig()),
    "k": 8,
    "scale": 0.7,
    "before": QUALITY,
    "after": QUALITY,
    "n_left_out": 3,
    "dead_training": 5,
    "dead_window_tokens": 640,
    "history": HISTORY,
}
ADAPTER_TRAINING = {
    "settings": {"layer": 2, "data": "d", "template_date": "2026-03-01", "chat_template_kwargs": {"polite": True}}
    | asdict(TrainingConfig()),
    "data": {"n_triples": 12, "n_full": 0},
    "held_out": {"n_triples": 4, "simpo_loss": 0.7, "accuracy": 0.5, "margin": -0.1, "l0": 3.5, "l1": 0.2},
    "history": [{"loss": 0.7, "l0": 3.5, "epoch": 0.5, "step": 3}],
}
TEMPLATED = word_tokenizer()
TEMPLATED.chat_template = "{{ strftime_now('%Y') }} {% if polite %}sir {% endif %}{{ messages[0].content }}"

fuzz = settings(
    max_examples=N_EXAMPLES,
    derandomize=not TIMES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Valid files: an SAE, a map, counts, rules, the records of trainings."""
    folder = tmp_path_factory.mktemp("valid")
    sae_in, sae_out = make_sae(L_IN, 24, seed=1), make_sae(L_OUT, 32, seed=2)
    sae_in.save(folder / "sae")
    make_map(sae_in, sae_out, n_columns=8, n_triples=12).save(folder / "map")
    SteeringVector(torch.ones(8), L_IN, 2.0, "response", model_name="m").save(folder / "vector")
    collect(make_model("gemma2"), word_tokenizer(), PLAIN, sae_in, sae_out, work_dir=folder / "counts", progress=False)
    (folder / "rules.json").write_text(json.dumps({"style": ["polite", "(?:dear|sir)"], "topic": ["cat|dog"]}))
    for name, record in {"sae-training": SAE_TRAINING, "adapter-training": ADAPTER_TRAINING}.items():
        TrainingFolder(folder / name).path.mkdir()
        TrainingFolder(folder / name).write(record)
    assert read_figures(folder / "sae-training") and read_held_out(folder / "adapter-training")
    return folder


def damage(data: st.DataObject, source: Path, target: Path | None = None) -> None:
    """Write a file with damaged bytes, or with damaged contents: JSON or tensors."""
    target = target or source
    if data.draw(st.booleans()):
        target.write_bytes(data.draw(damaged_bytes(source.read_bytes())))
    elif source.suffix == ".json":
        value = data.draw(damaged_json(json.loads(source.read_text())))
        is_sealed = isinstance(value, dict) and SEAL in value and data.draw(st.booleans())
        target.write_text(json.dumps(sealed(value) if is_sealed else value))
    else:
        damage_tensors(data, source, target)


def damage_tensors(data: st.DataObject, source: Path, target: Path) -> None:
    """Write a file with damaged tensors or a damaged header, and the checksum that fits them where it has one."""
    with safe_open(source, framework="pt") as file:
        header = json.loads((file.metadata() or {}).get(METADATA_KEY, "null"))
    tensors = load_file(source)
    if header is None:
        tensors = data.draw(damaged_tensors(tensors))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target)
        return
    tensors = {name: tensors[name] for name in header.get("order", tensors)}
    if data.draw(st.booleans()):
        tensors = data.draw(damaged_tensors(tensors))
    else:
        header = data.draw(damaged_json(header))
    write_tensors(target, tensors, header if isinstance(header, dict) else {"header": header})


def copied(folder: Path, name: str) -> Path:
    """Return a new copy of one of the valid folders, to damage."""
    damaged = folder / f"damaged-{name}"
    shutil.rmtree(damaged, ignore_errors=True)
    return Path(shutil.copytree(folder / name, damaged))


@fuzz
@given(data=st.data())
def test_maps(folder, done, data):
    done["damaged files: maps"] += 1
    path = folder / "damaged-map"
    damage(data, folder / "map", path)
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
def test_vectors(folder, done, data):
    done["damaged files: vectors"] += 1
    path = folder / "damaged-vector"
    damage(data, folder / "vector", path)
    try:
        vector = SteeringVector.load(path)
    except VectorError:
        return
    assert vector.vector.dim() == 1 and (vector.scale * vector.vector).isfinite().all()
    assert vector.layer >= 0 and vector.scale >= 0 and vector.positions in POSITIONS
    assert isinstance(vector.model_name, str) and isinstance(vector.model_digest, str)


@fuzz
@given(data=st.data())
def test_saes(folder, done, data):
    done["damaged files: saes"] += 1
    damaged = copied(folder, "sae")
    damage(data, data.draw(st.sampled_from(sorted(damaged.iterdir()))))
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
    damaged = copied(folder, "counts")
    damage(data, data.draw(st.sampled_from(sorted(damaged.iterdir()))))
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
    damage(data, folder / "rules.json", path)
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


@fuzz
@given(data=st.data())
def test_records_of_trainings_of_saes(folder, done, data):
    done["damaged files: records of trainings"] += 1
    training = TrainingFolder(copied(folder, "sae-training"))
    damage(data, training.path / "training.json")
    try:
        figures, record = read_figures(training.path), read_record(training)
    except TrainingError:
        return
    # In Python, True is a number.
    assert all(type(value) in (int, float) and math.isfinite(value) for value in figures.values())
    assert figures.get("explained_variance", 0) <= 1 and figures.get("k", 1) > 0
    assert figures.get("dead", 0) <= figures.get("d_sae", math.inf)
    assert (record.history is not None) == training.finished
    assert not weaknesses(figures) or all(isinstance(text, str) for text in weaknesses(figures))


@fuzz
@given(data=st.data())
def test_records_of_trainings_of_adapters(folder, done, data):
    done["damaged files: records of trainings"] += 1
    training = TrainingFolder(copied(folder, "adapter-training"))
    damage(data, training.path / "training.json")
    try:
        figures = read_held_out(training.path)
        tokenizer, variables = trained_template(TEMPLATED, training.path)
    except TrainingError:
        return
    assert figures is None or (0 <= figures.accuracy <= 1 and figures.n_triples > 0 and math.isfinite(figures.margin))
    tokenizer.apply_chat_template([{"role": "user", "content": "the dog"}], tokenize=False, **variables or {})


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Path:
    """The folder of an SAE's training with a valid checkpoint of its third step."""
    pytest.importorskip("sae_lens")
    training, trainer = TrainingFolder(folder / "checkpoints"), new_trainer()
    training.path.mkdir()
    for _ in range(3):
        trainer.step(torch.randn(4, 8, generator=torch.Generator().manual_seed(1)))
        trainer.n_training_steps += 1
    history = [{"tokens": 4 * n, "loss": 0.5, "explained_variance": 0.1, "l0": 2.0, "dead": 3} for n in (1, 2, 3)]
    save_checkpoint(training, trainer, Position(1, 7, 2, 0), history)
    return training.path


def new_trainer() -> Any:
    """Return a trainer of 5 steps that has not begun."""
    config = SAETrainingConfig(n_tokens=20, batch_size=4, lr=1e-3, dead_feature_window=2)
    return _trainer(config, new_sae(8, 16, 2.0, seed=1, threshold_lr=0.1, metadata={}))


@fuzz
@given(data=st.data())
def test_checkpoints(folder, checkpoint, done, data):
    done["damaged files: checkpoints"] += 1
    training = TrainingFolder(copied(folder, checkpoint.name))
    (newest,) = training.checkpoints()
    path = newest / data.draw(st.sampled_from(["stream.json", "sae.safetensors", "trainer_state.pt"]))
    if path.suffix == ".pt":
        path.write_bytes(data.draw(damaged_bytes(path.read_bytes())))
    else:
        damage(data, path)
    trainer = new_trainer()
    try:
        position, history = restore_checkpoint(training, trainer)
    except TrainingError as error:
        assert "Delete it" in str(error)
        return
    assert position is not None
    assert all(type(value) is int and value >= 0 for value in vars(position).values())
    assert all(type(value) in (int, float) for entry in history for value in entry.values())
    assert 1 <= trainer.n_training_steps <= 5
    assert all(tensor.isfinite().all() for tensor in trainer.sae.state_dict().values())
