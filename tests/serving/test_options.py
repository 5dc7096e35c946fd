"""`dspa.serving.vllm_options`: what is checked before vLLM starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import dspa
from dspa.errors import AdapterError, MapError, ModelError, SAEError, VectorError
from dspa.serving import vllm_options
from dspa.serving.settings import ServingSettings
from dspa.serving.state import ServingState
from dspa.testing import L_IN, L_OUT, make_map, make_model, make_sae
from tests.dspa.support.adapters import make_adapter
from tests.serving.conftest import D_IN, VECTOR_SCALE, World


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
    assert settings is not None and list(settings.maps) == ["default"] and settings.config.alpha == 0.5
    assert ServingSettings.of(Config()) is None


def test_maps_by_name(world: World) -> None:
    overrides = options(world, maps={"polite": world.map, "terse": world.map})["hf_overrides"]
    assert list(overrides["dspa"]["maps"]) == ["polite", "terse"]


def test_maps_of_several_layers(world: World, tmp_path: Path) -> None:
    """Each with the SAEs that it records; what they share is loaded once, and settings come back from JSON."""
    first, sae_in = dspa.ConditionalDifferenceMap.load(world.map), dspa.FrozenSAE.load(world.place("sae_in"))
    make_sae(L_OUT + 1, 64, d_in=D_IN, seed=5).save(tmp_path / "top")
    top = dspa.FrozenSAE.load(tmp_path / "top")
    second = make_map(sae_in, top)
    assert sae_in.source is not None and top.source is not None
    second.sources = {"sae_in": sae_in.source, "sae_out": top.source}
    second.save(tmp_path / "second")
    sae_out = dspa.FrozenSAE.load(world.place("sae_out"))
    assert sae_out.source is not None
    first.sources = second.sources | {"sae_out": sae_out.source}
    first.save(tmp_path / "first")
    maps = {"low": tmp_path / "first", "high": tmp_path / "second"}

    class Config:
        dspa = vllm_options(world.model, maps, joint=True)["hf_overrides"]["dspa"]

    settings = ServingSettings.of(Config())
    assert settings is not None and settings.joint
    assert [place.layers for place in settings.maps.values()] == [(L_IN, L_OUT), (L_IN, L_OUT + 1)]
    state = ServingState(settings, 1, 1, torch.device("cpu"))
    assert (state.reads, state.writes) == ({L_IN}, {L_OUT, L_OUT + 1})
    with pytest.raises(ValueError, match=rf"`maps` with `joint` is with 2 of layer {L_OUT}"):
        vllm_options(world.model, {"a": tmp_path / "first", "b": tmp_path / "first"}, joint=True)
    with pytest.raises(ValueError, match="`joint` is given with fewer than two maps"):
        vllm_options(world.model, tmp_path / "first", joint=True)
    with pytest.raises(ValueError, match="A name of `maps` is 'a\\+b'; accepted: names without"):
        vllm_options(world.model, {"a+b": tmp_path / "first"})
    with pytest.raises(MapError, match="sae_out"):
        vllm_options(world.model, maps, sae_out=world.place("sae_out"))


def test_latents_beside_maps_and_without(world: World) -> None:
    """They are of the SAE that is given, or of the output SAE of the maps."""
    sae_in = world.place("sae_in")
    for changes, sae in (
        ({"latents": world.latents["loud"]}, "sae_out"),
        ({"latents": {"loud": world.latents["loud"]}, "sae": sae_in}, "sae_in"),
        (
            {"latents": {"loud": world.latents["loud"]}, "sae": sae_in, "maps": None, "sae_in": None, "sae_out": None},
            "sae_in",
        ),
    ):
        settings = options(world, **changes)["hf_overrides"]["dspa"]
        assert list(settings["latents"]) == (["default"] if sae == "sae_out" else ["loud"])
        assert settings["sae_latents"]["path"] == world.place(sae)


def test_adapters_beside_maps_and_without(world: World) -> None:
    for changes, names in (
        ({"adapters": world.place("late")}, ["default"]),
        ({"adapters": world.adapters}, ["early", "late"]),
        ({"adapters": world.adapters, "maps": None, "sae_in": None, "sae_out": None}, ["early", "late"]),
    ):
        settings = options(world, **changes)["hf_overrides"]["dspa"]
        assert list(settings["adapters"]) == names
        late = settings["adapters"][names[-1]]
        # Where the adapter says that its SAE is.
        assert late["sae"]["path"] == world.place("sae_out") and late["sae"]["layer"] == L_OUT
        assert late["record"]["path"].startswith(world.place("late"))


def test_saes_of_a_catalogue(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the names that a map records, in the process that asks for the engine and in the engine's."""
    names: list[str] = []

    def from_pretrained(release: str, sae_id: str, *, device: Any, layer: int | None) -> dspa.FrozenSAE:
        sae = dspa.FrozenSAE.load(world.place(sae_id), device=device, layer=layer)
        sae.loaded_from = f"{release}:{sae_id}"
        names.append(sae.loaded_from)
        return sae

    monkeypatch.setattr(dspa.FrozenSAE, "from_pretrained", from_pretrained)
    given = options(world, sae_in="tiny-release:sae_in", sae_out="tiny-release:sae_out")["hf_overrides"]["dspa"]
    place = given["maps"]["default"]
    assert place["sae_in"]["path"] == "tiny-release:sae_in" and names == ["tiny-release:sae_in", "tiny-release:sae_out"]

    class Config:
        dspa = given

    settings = ServingSettings.of(Config())
    assert settings is not None
    ServingState(settings, 1, 1, torch.device("cpu"))
    assert len(names) == 4


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
        ({"vectors": {}}, ValueError, "`vectors` is empty"),
        ({"vectors": "nowhere"}, VectorError, "There is no file at"),
        ({"vectors": "sae_in"}, VectorError, "There is no file at"),
        ({"latents": {}}, ValueError, "`latents` is empty"),
        ({"latents": "nowhere"}, OSError, "nowhere"),
        ({"latents": "late"}, OSError, "late"),
        ({"latents": "far.json"}, ValueError, "A set of latents is with 5000; accepted: latents of the SAE, 0 to 127"),
        ({"latents": "none.json"}, SAEError, "is empty; accepted: one latent or more"),
        ({"latents": "loud.json", "sae": "nowhere"}, SAEError, "nowhere"),
        (
            {"latents": "loud.json", "maps": None, "sae_in": None, "sae_out": None},
            ValueError,
            "`sae` is not given; accepted: the SAE of `latents`",
        ),
        ({"adapters": {}}, ValueError, "`adapters` is empty"),
        ({"adapters": "nowhere"}, AdapterError, "holds no adapter.json"),
        ({"adapters": "late", "sae": "sae_in"}, AdapterError, "was trained with an SAE of d_sae 128"),
        ({"adapters": "late", "sae": "nowhere"}, SAEError, "nowhere"),
        ({"sae": "sae_in"}, ValueError, "Without `adapters` or `latents` there is no use for `sae`"),
        ({"maps": None}, ValueError, "Without `maps` there is no use for `sae_in`, `sae_out`"),
        (
            {"maps": None, "sae_in": None, "sae_out": None},
            ValueError,
            "`maps`, `adapters`, `vectors` and `latents` is empty",
        ),
    ],
)
def test_what_is_refused(changes: dict[str, Any], error: Any, message: str, world: World) -> None:
    places = ("sae_in", "sae_out", "late", "loud.json", "far.json", "none.json")
    Path(world.place("far.json")).write_text('{"strengths": {"5000": 1}}')
    Path(world.place("none.json")).write_text('{"strengths": {}}')
    changes = {name: world.place(value) if value in places else value for name, value in changes.items()}
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


def test_an_adapter_of_other_weights(world: World, tmp_path: Path) -> None:
    """Its record holds the digest of the weights that it was trained with."""
    adapter = make_adapter(dspa.FrozenSAE.load(world.place("sae_out")))
    adapter.trained_with = str(dspa.models.sources.model_digest(AutoModelForCausalLM.from_pretrained(world.model)))
    adapter.save(tmp_path / "same")
    options(world, adapters=tmp_path / "same")
    adapter.trained_with = str(dspa.models.sources.model_digest(make_model("llama", seed=1)))
    adapter.save(tmp_path / "other")
    with pytest.raises(ModelError, match="The adapter was made with other weights"):
        options(world, adapters=tmp_path / "other")
    options(world, adapters=tmp_path / "other", other_weights=True)


def test_vectors_alone(world: World) -> None:
    settings = vllm_options(world.model, vectors=world.vectors)["hf_overrides"]["dspa"]
    assert list(settings["vectors"]) == list(world.vectors) and not settings["maps"] and not settings["adapters"]
    assert settings["vectors"]["all"]["positions"] == "all" and settings["vectors"]["all"]["scale"] == VECTOR_SCALE


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"scale": 101.0}, VectorError, "`scale` is 101.0; accepted: a number from 0 to 100"),
        ({"layer": 4}, ModelError, "The vector is of layer 4; accepted: 0 to 3"),
        ({"vector": torch.ones(3)}, ModelError, "The vector has 3 numbers"),
        ({"model_name": "google/gemma-2-2b"}, ModelError, "The vector was made with 'google/gemma-2-2b'"),
        ({"model_digest": "sampled-0"}, ModelError, "The vector was made with other weights"),
    ],
)
def test_vectors_that_cannot_be_served(
    changes: dict[str, Any], error: Any, message: str, world: World, tmp_path: Path
) -> None:
    path = tmp_path / "v.safetensors"
    dspa.SteeringVector(**{"vector": torch.ones(D_IN), "layer": 1} | changes).save(path)
    with pytest.raises(error, match=message):
        options(world, vectors=path, model_name="meta-llama/Llama-3.1-8B")


@pytest.mark.parametrize(
    ("sae", "message"),
    [
        (make_sae(4, 64, d_in=D_IN), "`sae` sits at layer 4; accepted: 0 to 3"),
        (make_sae(1, 64, d_in=64), "64 dimensions"),
        (make_sae(1, 64, d_in=D_IN, model_name="google/gemma-2-2b"), "google/gemma-2-2b"),
    ],
)
def test_an_adapter_that_does_not_fit_the_model(
    sae: dspa.FrozenSAE, message: str, world: World, tmp_path: Path
) -> None:
    sae.save(tmp_path / "sae")
    make_adapter(dspa.FrozenSAE.load(tmp_path / "sae")).save(tmp_path / "adapter")
    with pytest.raises(ModelError, match=message):
        options(world, adapters=tmp_path / "adapter", model_name="meta-llama/Llama-3.1-8B")


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
