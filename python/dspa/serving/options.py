"""The options by which vLLM serves a model that requests can steer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from dspa.config import SteeringConfig
from dspa.errors import AdapterError, MapError, ModelError, VectorError, listed, refusal
from dspa.fsrl.adapter import RECORD, FSRLAdapter, read_record
from dspa.maps.cdmap import ConditionalDifferenceMap
from dspa.models.sources import Source
from dspa.saes.frozen import FrozenSAE
from dspa.schemas import check
from dspa.serving.settings import (
    ARCHITECTURES,
    DEFAULT,
    KEY,
    PREFIX,
    AdapterPlace,
    MapPlace,
    Place,
    ServingSettings,
    VectorPlace,
)
from dspa.steering.latent_sets import LatentSet
from dspa.steering.latents import LatentSteering
from dspa.steering.vector import SteeringVector


def vllm_options(
    model: str | Path,
    maps: str | Path | Mapping[str, str | Path] | None = None,
    sae_in: str | Path | None = None,
    sae_out: str | Path | None = None,
    config: SteeringConfig | None = None,
    *,
    adapters: str | Path | Mapping[str, str | Path] | None = None,
    sae: str | Path | None = None,
    vectors: str | Path | Mapping[str, str | Path] | None = None,
    latents: str | Path | Mapping[str, str | Path] | None = None,
    steer_all: bool = False,
    joint: bool = False,
    model_name: str | None = None,
    other_weights: bool = False,
) -> dict[str, Any]:
    """Return the options by which vLLM serves a model that requests can steer.

    ```python
    llm = vllm.LLM(model, **dspa.serving.vllm_options(model, "map.dspa.safetensors"))
    llm.generate(prompts, vllm.SamplingParams(extra_args={"dspa": "on", "dspa_alpha": 0.5}))
    ```

    Everything is checked here, before vLLM starts: the files, the SAEs against the maps and adapters, and all that
    steers against the model, which is read once for that.

    Args:
        model: a folder, or a name on the Hub, of one of the `ARCHITECTURES`.
        maps: a map's file, or several by name. The first is the default. A request can name several, of different
            output layers, which steer it together.
        sae_in: folder or file of the maps' input SAE, or RELEASE:SAE_ID of SAELens' catalogue; by default what each map
            records.
        sae_out: the same of the output SAE.
        config: settings of steering by a map, which a request may replace in part. Not scoring="demixed", nor
            positions="all".
        adapters: the folder of an FSRL adapter, or several by name. The first is the default where there is no map.
        sae: folder or file of the adapters' SAE, by default what each of them records, and of the latents.
        vectors: the file of a `dspa.SteeringVector`, or several by name. The first is the default where there is
            neither a map nor an adapter.
        latents: the JSON file of a set of latents of `sae`, or without it of the first map's output SAE, as
            `dspa.steering.latent_sets.LatentSet.read` takes it, or several by name. The first is the default where
            there is nothing else.
        steer_all: steer requests that do not ask for it.
        joint: steer requests that name no map by all of them at once, in place of the first.
        model_name: name of the model, if it is in a folder that does not record it.
        other_weights: accept a model with other weights than what steers was made with, and do not read them.

    Returns:
        `hf_overrides`, with an architecture of this package and, beside it, the settings. Neither works without the
        other. Pass them on as they are.

    Raises:
        AdapterError: an adapter that is missing, damaged, or of another SAE.
        MapError: a map that is missing, damaged, or of other SAEs.
        ModelError: a model that cannot be served, or is not the one that what steers was made with.
        SAEError: an SAE that is missing or damaged.
        VectorError: a vector that is missing or damaged, or whose scale cannot be served.
        ValueError: settings that cannot be served, or that nothing uses.
    """
    map_paths, adapter_paths = _by_name("maps", maps), _by_name("adapters", adapters)
    vector_paths, latent_paths = _by_name("vectors", vectors), _by_name("latents", latents)
    _check_used("maps", map_paths, sae_in=sae_in, sae_out=sae_out, config=config)
    _check_used("adapters` or `latents", adapter_paths | latent_paths, sae=sae)
    config = config or SteeringConfig()
    cdmaps = {name: ConditionalDifferenceMap.load(path) for name, path in map_paths.items()}
    pairs = _load_pairs(cdmaps, sae_in, sae_out, config)
    loaded = {name: _load_adapter(path, sae) for name, path in adapter_paths.items()}
    added = {name: SteeringVector.load(path) for name, path in vector_paths.items()}
    _, first_out = next(iter(pairs.values()), (None, None))
    sae_latents = _load_latents_sae(latent_paths, sae, first_out) if latent_paths else None
    settings = ServingSettings(
        model=str(model),
        maps={
            name: MapPlace(Place.of_file(path), _place_of(sae_in), _place_of(sae_out), sae_in.d_sae)
            for (name, path), (sae_in, sae_out) in zip(map_paths.items(), pairs.values(), strict=True)
        },
        adapters={
            name: AdapterPlace(Place.of_file(path / RECORD), _place_of(loaded[name].sae))
            for name, path in adapter_paths.items()
        },
        vectors={name: _vector_place(path, added[name]) for name, path in vector_paths.items()},
        latents={name: Place.of_file(path) for name, path in latent_paths.items()},
        sae_latents=None if sae_latents is None else _place_of(sae_latents),
        config=config,
        steer_all=steer_all,
        joint=joint,
    )
    architecture = _check_model(
        model,
        list(cdmaps.values()),
        list(pairs.values()),
        list(loaded.values()),
        list(added.values()),
        sae_latents,
        model_name,
        other_weights=other_weights,
    )
    return {"hf_overrides": {"architectures": [PREFIX + architecture], KEY: asdict(cast(Any, settings))}}


def _by_name(argument: str, given: str | Path | Mapping[str, str | Path] | None) -> dict[str, Path]:
    """Return the paths of an argument by name, none for None."""
    if given is None:
        return {}
    named = given if isinstance(given, Mapping) else {DEFAULT: given}
    if not named:
        raise refusal(ValueError, f"`{argument}`", "empty", "a path, or several by name")
    return {name: Path(path).absolute() for name, path in named.items()}


def _check_used(argument: str, paths: Mapping[str, Path], **others: object) -> None:
    """Raise `ValueError` for other arguments that nothing uses without this one."""
    if not paths and (unused := [f"`{name}`" for name, value in others.items() if value is not None]):
        raise ValueError(f"Without `{argument}` there is no use for {listed(unused)}. Pass it, or leave them out.")


def _load_pairs(
    maps: Mapping[str, ConditionalDifferenceMap],
    sae_in: str | Path | None,
    sae_out: str | Path | None,
    config: SteeringConfig,
) -> dict[str, tuple[FrozenSAE, FrozenSAE]]:
    """Return the SAEs of each map by its name. What maps share is loaded once."""
    loaded: list[FrozenSAE] = []

    def load(
        option: str, given: str | Path | None, fingerprint: str, layer: int, sources: Mapping[str, Source]
    ) -> FrozenSAE:
        for sae in loaded:
            if (sae.fingerprint, sae.layer) == (fingerprint, layer):
                return sae
        loaded.append(_load_sae(option, given, sources, layer, MapError))
        return loaded[-1]

    pairs = {}
    for name, cdmap in maps.items():
        meta, sources = cdmap.meta, cdmap.sources
        pairs[name] = (
            load("sae_in", sae_in, meta.sae_in, meta.layer_in, sources),
            load("sae_out", sae_out, meta.sae_out, meta.layer_out, sources),
        )
        cdmap.check_saes(*pairs[name])
        cdmap.check_sizes(config)
    return pairs


def _load_adapter(path: Path, sae: str | Path | None) -> FSRLAdapter:
    record = read_record(path)
    return FSRLAdapter.load(path, _load_sae("sae", sae, record.sources, record.sae.layer, AdapterError))


def _load_sae(
    option: str, given: str | Path | None, sources: Mapping[str, Source], layer: int, error: type[Exception]
) -> FrozenSAE:
    """Return an SAE that was given, or else the one that a map or adapter records."""
    if given is None and option not in sources:
        raise refusal(
            error, f"`{option}`", "not given, and what was made with it does not record it", "its folder or file"
        )
    name = str(given) if given is not None else sources[option].path
    sae = FrozenSAE.from_name(name)
    return sae if sae.layer is not None else FrozenSAE.from_name(name, layer=layer)


def _load_latents_sae(paths: Mapping[str, Path], given: str | Path | None, sae_out: FrozenSAE | None) -> FrozenSAE:
    """Return the SAE of sets of latents, and raise `ValueError` for a set that it does not have."""
    if given is None and sae_out is None:
        raise refusal(ValueError, "`sae`", "not given", "the SAE of `latents`")
    sae = sae_out if given is None else FrozenSAE.from_name(str(given))
    assert sae is not None
    # Everything that is wrong with them raises here.
    LatentSteering(sae, {name: LatentSet.read(path) for name, path in paths.items()})
    return sae


def _place_of(sae: FrozenSAE) -> Place:
    assert sae.source is not None
    return Place(sae.source.path, sae.source.digest, sae.layer)


def _vector_place(path: Path, vector: SteeringVector) -> VectorPlace:
    place = {"file": Place.of_file(path), "scale": vector.scale, "positions": vector.positions}
    return check(VectorPlace, place, VectorError, str(path))


def _check_model(
    model: str | Path,
    maps: list[ConditionalDifferenceMap],
    pairs: list[tuple[FrozenSAE, FrozenSAE]],
    adapters: list[FSRLAdapter],
    vectors: list[SteeringVector],
    sae_latents: FrozenSAE | None,
    model_name: str | None,
    *,
    other_weights: bool,
) -> str:
    """Return the architecture of a model that all of these fit; raise `ModelError` for any other."""
    from dspa.models.layers import check_model_name, decoder_layers, loaded_name
    from dspa.models.load import load_model
    from dspa.models.places import model_place
    from dspa.models.sources import check_weights
    from dspa.saes.placement import check_sae, check_saes

    if model_place(str(model)).gguf_file:
        raise refusal(
            ModelError,
            "`model`",
            "a GGUF file, which vLLM computes in its own way",
            "a folder with config.json, or a name on the Hub",
            "dspa.load_model(file)[0].save_pretrained(folder) converts it.",
        )
    inner, _ = load_model(str(model), device="cpu")
    architecture = type(inner).__name__
    if architecture not in ARCHITECTURES:
        raise refusal(ModelError, "`model`", f"a {architecture}", f"for serving {listed(ARCHITECTURES)}")
    n_layers = len(decoder_layers(inner))
    for sae_in, sae_out in pairs:
        check_saes(sae_in, sae_out, inner, n_layers, model_name)
    for cdmap in maps:
        check_model_name("The map was made with", cdmap.meta.model_name, model_name or loaded_name(inner))
    for adapter in adapters:
        check_sae("sae", adapter.sae, inner, n_layers, model_name)
    if sae_latents is not None:
        check_sae("sae", sae_latents, inner, n_layers, model_name)
    for vector in vectors:
        vector.check_model(inner, n_layers, model_name)
    for kind, made in (("map", maps), ("adapter", adapters), ("vector", vectors)):
        for one in made:
            check_weights(f"The {kind} was made with", one.model_digest, inner, other_weights=other_weights)
    return architecture
