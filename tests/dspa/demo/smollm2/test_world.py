"""The shipped files are what the docs say, and the comparison has every method, on the tiny demo's model."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from dspa.data.triples import load_triples
from dspa.demo.load import World as TinyWorld
from dspa.demo.smollm2.preferences import PREFERENCES, REGISTER, Preference
from dspa.demo.smollm2.prompts import ASSETS, split_tasks
from dspa.demo.smollm2.saes import MODEL_NAME
from dspa.demo.smollm2.world import World, held_out_triples
from dspa.saes.frozen import FrozenSAE


@pytest.mark.parametrize(("name", "layer"), [("sae_in", 8), ("sae_out", 20)])
def test_the_saes_are_worth_steering_with(name, layer):
    sae = FrozenSAE.load(ASSETS / name)
    assert (sae.layer, sae.d_in, sae.d_sae, sae.model_name) == (layer, 576, 2048, MODEL_NAME)
    assert sae.figures["explained_variance"] > 0.8 and 32 <= sae.figures["l0"] <= 64
    assert sae.figures["dead"] < 0.1 * sae.d_sae


def test_the_assets_are_small():
    assert sum(path.stat().st_size for path in ASSETS.glob("sae_*/*")) < 12e6


@pytest.mark.parametrize("preference", PREFERENCES, ids=lambda preference: preference.name)
def test_the_triples_are_accepted_and_held_out_by_task(preference):
    for part, n, tasks in zip(("map", "heldout"), (250, 100), split_tasks(30), strict=True):
        triples = list(load_triples(preference.path(part)))
        prompts = [triple.prompt[-1]["content"] for triple in triples]
        # Two of 250 letters were drawn twice.
        assert len(triples) == n and len(set(prompts)) >= n - 2
        for prompt, triple in zip(prompts, triples, strict=True):
            assert any(task in prompt for task in tasks)
            assert len(triple.prompt) == 1, "the instruction is removed"
            assert preference.chosen(prompt).accepts(triple.chosen[-1]["content"])
            assert preference.rejected(prompt).accepts(triple.rejected[-1]["content"])
    assert len(held_out_triples(preference)) == 100


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The tiny model as the demo's world, and a preference of its triples."""
    world = TinyWorld()
    rows = [json.loads(line) for line in world.triples.read_text().splitlines()]
    for part, some in (("map", rows[:60]), ("heldout", rows[60:68])):
        (tmp_path / f"tiny-{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    monkeypatch.setattr(Preference, "path", lambda self, part: tmp_path / f"{self.name}-{part}.jsonl")
    monkeypatch.setattr("dspa.demo.smollm2.world.MAX_NEW_TOKENS", 8)
    preference = replace(REGISTER, name="tiny", count=lambda prompt, answer: float(len(answer)))
    return World(world.model, world.tokenizer, world.sae_in, world.sae_out), preference


def test_every_method_and_control_is_compared(tiny, tmp_path):
    world, preference = tiny
    cdmap = world.build_map(preference, progress=False)
    path = tmp_path / "out.json"
    comparison = world.compare(preference, cdmap, path, n_prompts=4, seeds=[0], progress=False)
    kinds = [method.kind for method in comparison.methods]
    assert kinds == ["base", *["DSPA", *["control"] * 3] * 2, "Static-SAE", "prefix"]
    assert comparison.prefer == "margin"
    figure = comparison.figure(preference.counted, "base")
    lengths = [len(text) for text in comparison.texts["base"][0]]
    assert figure is not None and figure.value == pytest.approx(sum(lengths) / 4)
    assert json.loads(path.read_text())["settings"]["n_triples"] == 8
