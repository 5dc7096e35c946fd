"""The options by which vLLM serves a model that requests can steer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from dspa.config import SteeringConfig
from dspa.errors import MapError, ModelError, listed, refusal
from dspa.files import file_sha256
from dspa.maps.cdmap import ConditionalDifferenceMap
from dspa.saes.frozen import FrozenSAE
from dspa.serving.settings import ARCHITECTURES, DEFAULT, KEY, PREFIX, Place, ServingSettings


def vllm_options(
    model: str | Path,
    maps: str | Path | Mapping[str, str | Path],
    sae_in: str | Path | None = None,
    sae_out: str | Path | None = None,
    config: SteeringConfig | None = None,
    *,
    steer_all: bool = False,
    model_name: str | None = None,
    other_weights: bool = False,
) -> dict[str, Any]:
    """Return the options by which vLLM serves a model that requests can steer.

    ```python
    llm = vllm.LLM(model, **dspa.serving.vllm_options(model, "map.dspa.safetensors"))
    llm.generate(prompts, vllm.SamplingParams(extra_args={"dspa": "on", "dspa_alpha": 0.5}))
    ```

    Everything is checked here, before vLLM starts: the files, the SAEs against the maps, and both against the model,
    which is read once for that.

    Args:
        model: a folder, or a name on the Hub, of one of the `ARCHITECTURES`.
        maps: a map's file, or several by name. All are of the same SAEs. The first is the default.
        sae_in: folder or file of the input SAE, by default what the first map records.
        sae_out: the same of the output SAE.
        config: settings of steering, which a request may replace in part. Not scoring="demixed", nor positions="all".
        steer_all: steer requests that do not ask for it.
        model_name: name of the model, if it is in a folder that does not record it.
        other_weights: accept a model with other weights than the maps were made with, and do not read them.

    Returns:
        `hf_overrides`, with an architecture of this package and, beside it, the settings. Neither works without the
        other. Pass them on as they are.

    Raises:
        MapError: a map that is missing, damaged, or of other SAEs.
        ModelError: a model that cannot be served, or is not the one that the maps were made with.
        SAEError: an SAE that is missing or damaged.
        ValueError: settings that cannot be served.
    """
    named = dict(maps) if isinstance(maps, Mapping) else {DEFAULT: maps}
    if not named:
        raise refusal(ValueError, "`maps`", "empty", "a map's file, or several by name")
    paths = {name: Path(path).absolute() for name, path in named.items()}
    loaded = {name: ConditionalDifferenceMap.load(path) for name, path in paths.items()}
    first = next(iter(loaded.values()))
    place_in, frozen_in = _load_sae("sae_in", sae_in, first, first.meta.layer_in)
    place_out, frozen_out = _load_sae("sae_out", sae_out, first, first.meta.layer_out)
    settings = ServingSettings(
        model=str(model),
        maps={name: Place(str(path), file_sha256(path)) for name, path in paths.items()},
        sae_in=place_in,
        sae_out=place_out,
        config=config or SteeringConfig(),
        steer_all=steer_all,
    )
    for cdmap in loaded.values():
        cdmap.check_saes(frozen_in, frozen_out)
        cdmap.check_sizes(settings.config)
    architecture = _check_model(model, list(loaded.values()), frozen_in, frozen_out, model_name, other_weights)
    return {"hf_overrides": {"architectures": [PREFIX + architecture], KEY: asdict(cast(Any, settings))}}


def _load_sae(
    option: str, given: str | Path | None, cdmap: ConditionalDifferenceMap, layer: int
) -> tuple[Place, FrozenSAE]:
    """Return an SAE that was given, or else the one that a map records, and its place."""
    if given is None and option not in cdmap.sources:
        raise refusal(MapError, f"`{option}`", "not given, and the map does not record it", "its folder or file")
    path = str(given if given is not None else cdmap.sources[option].path)
    sae = FrozenSAE.load(path)
    if sae.layer is None:
        sae = FrozenSAE.load(path, layer=layer)
    return Place(str(Path(path).absolute()), sae.fingerprint, sae.layer), sae


def _check_model(
    model: str | Path,
    maps: list[ConditionalDifferenceMap],
    sae_in: FrozenSAE,
    sae_out: FrozenSAE,
    model_name: str | None,
    other_weights: bool,
) -> str:
    """Return the architecture of a model that can be steered with maps and SAEs; raise `ModelError` for any other."""
    from dspa.models.layers import check_model_name, decoder_layers, loaded_name
    from dspa.models.load import load_model
    from dspa.models.places import model_place
    from dspa.models.sources import check_weights
    from dspa.saes.placement import check_saes

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
    check_saes(sae_in, sae_out, inner, len(decoder_layers(inner)), model_name)
    for cdmap in maps:
        check_model_name("The map was made with", cdmap.meta.model_name, model_name or loaded_name(inner))
        check_weights("The map was made with", cdmap.model_digest, inner, other_weights=other_weights)
    return architecture
