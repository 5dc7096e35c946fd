"""`dspa.serving.vllm_options`: what is checked before vLLM starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import dspa
from dspa.errors import MapError, ModelError, SAEError
from dspa.serving import vllm_options
from dspa.serving.settings import ServingSettings
from dspa.testing import L_IN, make_map, make_model, make_sae
from tests.serving.conftest import D_IN, World


@pytest.fixture(scope="module")
def world(make_world: Callable[[str], World]) -> World:
    return make_world("llama")


def options(world: World, **changes: Any) -> dict[str, Any]:
    given = {"model": world.model, "maps": world.map}
    given |= {name: world.place(name) for name in ("sae_in", "sae_out")}
    return vllm_options(**(given | changes))


def test_an_architecture_and_its_settings(world: World) -> None:
    overrides = options(world, config=dspa.SteeringConfig(alpha=0.5))["hf_overrides"]
    assert overrides["architectures"] == ["DspaLlamaForCausalLM"]

    class Config:
        """The configuration that vLLM makes of the overrides."""

    config: Any = Config()
    config.dspa = overrides["dspa"]
    settings = ServingSettings.of(config)
    assert settings is not None and settings.names == ["default"] and settings.config.alpha == 0.5
    assert ServingSettings.of(Config()) is None


def test_maps_by_name(world: World) -> None:
    overrides = options(world, maps={"polite": world.map, "terse": world.map})["hf_overrides"]
    assert list(overrides["dspa"]["maps"]) == ["polite", "terse"]


def test_settings_that_were_edited_are_refused(world: World) -> None:
    class Config:
        dspa = options(world)["hf_overrides"]["dspa"] | {"alpha": 1}

    with pytest.raises(ValueError, match="`alpha` is not known"):
        ServingSettings.of(Config())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"maps": {}}, ValueError, "`maps` is empty"),
        ({"maps": "nowhere.safetensors"}, MapError, "no map file"),
        ({"sae_in": "sae_out", "sae_out": "sae_in"}, MapError, "swapped"),
        ({"sae_in": None}, MapError, "`sae_in` is not given"),
        ({"sae_in": "nowhere"}, SAEError, "nowhere"),
        ({"config": dspa.SteeringConfig(k_diff=1000)}, ValueError, "`k_diff` is 1000"),
        ({"config": dspa.SteeringConfig(scoring="demixed")}, ValueError, "demixed"),
        ({"config": dspa.SteeringConfig(positions="all")}, ValueError, "response, generated"),
        ({"model_name": "google/gemma-2-2b"}, None, ""),
    ],
)
def test_what_is_refused(changes: dict[str, Any], error: Any, message: str, world: World) -> None:
    changes = {name: world.place(value) if value in ("sae_in", "sae_out") else value for name, value in changes.items()}
    if error is None:
        options(world, **changes)
        return
    with pytest.raises(error, match=message):
        options(world, **changes)


def test_a_model_of_another_kind(world: World, tmp_path: Path) -> None:
    make_model("gpt2", n_embd=D_IN).save_pretrained(tmp_path)
    for file in Path(world.model).glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ModelError, match="`model` is a GPT2LMHeadModel; accepted: for serving Gemma2"):
        options(world, model=tmp_path)


def test_other_weights(world: World, tmp_path: Path) -> None:
    """The map says which weights it was made with."""
    model = AutoModelForCausalLM.from_pretrained(world.model)
    cdmap = dspa.ConditionalDifferenceMap.load(world.map)
    meta = dspa.models.sources.model_digest(model)
    recorded = cdmap.replaced(meta=_with(cdmap.meta, model_digest=meta))
    recorded.save(tmp_path / "map.safetensors")
    changes: dict[str, Any] = {"maps": tmp_path / "map.safetensors", "model": tmp_path / "model"}
    for file in Path(world.model).glob("tokenizer*"):
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    model.save_pretrained(tmp_path / "model")
    options(world, **changes)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.add_(0.1)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match="other weights"):
        options(world, **changes)
    options(world, other_weights=True, **changes)


def test_an_sae_of_another_model(world: World, tmp_path: Path) -> None:
    sae_in, sae_out = make_sae(L_IN, 64, d_in=64), make_sae(L_IN + 1, 64, d_in=64, seed=1)
    sae_in.save(tmp_path / "in")
    sae_out.save(tmp_path / "out")
    make_map(sae_in, sae_out).save(tmp_path / "map.safetensors")
    with pytest.raises(ModelError, match="64 dimensions"):
        options(world, maps=tmp_path / "map.safetensors", sae_in=tmp_path / "in", sae_out=tmp_path / "out")


def _with(meta: Any, **changes: Any) -> Any:
    from dataclasses import replace

    return replace(meta, **changes)
