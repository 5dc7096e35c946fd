"""The maps and SAEs that a steered engine loads, as settings that vLLM carries from process to process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from dspa.config import SteeringConfig
from dspa.errors import MapError, ModelError, listed, refusal
from dspa.files import file_sha256
from dspa.maps.cdmap import ConditionalDifferenceMap
from dspa.saes.frozen import FrozenSAE
from dspa.saes.placement import required_layer
from dspa.schemas import Flag, Text, check, schema
from dspa_kernels import EncoderStream, MapWeights

# The name of the settings in the model's configuration, and the beginning of the architectures that read them.
KEY, PREFIX = "dspa", "Dspa"
# Architectures whose decoder layers, at `model.layers`, return the residual stream, or it in two parts.
ARCHITECTURES = (
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
DEFAULT = "default"
# A residual that overflows makes keys and values NaN, and attention can read those in the blocks of a later request.
MAX_ALPHA = 100.0


@schema
class Place:
    """A file or folder, and what was there when the engine was asked for.

    Attributes:
        path: an absolute path.
        digest: SHA-256 of a map's file, or the fingerprint of an SAE.
        layer: layer of an SAE, None for a map.
    """

    path: Text
    digest: Text
    layer: int | None = None


@schema
class ServingSettings:
    """Settings of a steered engine.

    Attributes:
        model: the model that was checked, as vLLM names it.
        maps: the maps by name, all of one pair of SAEs. Requests that name none take the first.
        sae_in, sae_out: the SAEs.
        config: settings of steering, which a request may replace in part.
        steer_all: True to steer requests that do not ask for it.
    """

    model: Text
    maps: dict[Text, Place]
    sae_in: Place
    sae_out: Place
    config: SteeringConfig = field(default_factory=SteeringConfig)
    steer_all: Flag = False

    def __post_init__(self) -> None:
        if not self.maps:
            raise refusal(ValueError, "`maps`", "empty", "one map or more")
        if self.config.scoring == "demixed":
            raise refusal(
                ValueError,
                "`scoring`",
                "demixed, which solves a system for each prompt",
                "raw, whitened, confident",
                "Steer with dspa.Steering and transformers for demixed scoring.",
            )
        if self.config.alpha > MAX_ALPHA:
            raise refusal(ValueError, "`alpha`", self.config.alpha, f"for serving 0 to {MAX_ALPHA:g}")
        if self.config.positions == "all":
            raise refusal(
                ValueError,
                "`positions`",
                "all, which needs a prompt's plan before the prompt is computed",
                "response, generated",
            )

    @property
    def names(self) -> list[str]:
        """Names of the maps, the default first."""
        return list(self.maps)

    @classmethod
    def of(cls, hf_config: object) -> ServingSettings | None:
        """Return the settings in a model's configuration, None if it has none.

        Raises:
            ValueError: settings that do not fit the schema.
        """
        given = getattr(hf_config, KEY, None)
        return None if given is None else check(cls, given, ValueError, f"`hf_overrides`: `{KEY}`")


@dataclass(frozen=True)
class Steerers:
    """The maps and SAEs of an engine, on one device.

    Attributes:
        sae_in, sae_out: the SAEs.
        weights: the columns that any of the maps has [C]. Its values are those of the first map.
        values: the values [d_sae_in, C] of each map at these columns, as the scoring sums them.
        stream: the output SAE's encoder, in the order of the first map's calibration.
    """

    sae_in: FrozenSAE
    sae_out: FrozenSAE
    weights: MapWeights
    values: list[Tensor]
    stream: EncoderStream

    @property
    def layer_in(self) -> int:
        """Layer of the input SAE."""
        return required_layer(self.sae_in)

    @property
    def layer_out(self) -> int:
        """Layer of the output SAE."""
        return required_layer(self.sae_out)

    @classmethod
    def load(cls, settings: ServingSettings, device: torch.device | str) -> Steerers:
        """Load what `settings` name, and check that it is what it was.

        Raises:
            MapError: a map that is another one now, or belongs to other SAEs.
            SAEError: a damaged SAE.
        """
        sae_in, sae_out = (
            FrozenSAE.load(place.path, layer=place.layer, device=device)
            for place in (settings.sae_in, settings.sae_out)
        )
        maps = [_load_map(place).to(device) for place in settings.maps.values()]
        for cdmap in maps:
            cdmap.check_saes(sae_in, sae_out)
            cdmap.check_sizes(settings.config)
        columns = torch.cat([cdmap.columns for cdmap in maps]).unique()
        values = []
        for cdmap in maps:
            wide = cdmap.values.new_zeros(cdmap.meta.d_sae_in, len(columns))
            wide[:, torch.searchsorted(columns, cdmap.columns)] = cdmap.scored(settings.config)
            values.append(wide)
        weights = MapWeights.gather(columns, values[0], sae_out.weights)
        return cls(sae_in, sae_out, weights, values, maps[0].encoder_stream(sae_out))


def _load_map(place: Place) -> ConditionalDifferenceMap:
    if (digest := file_sha256(Path(place.path))) != place.digest:
        raise refusal(
            MapError,
            place.path,
            f"another file than when the engine was started (SHA-256 {digest}, was {place.digest})",
            "the same file in all processes",
            "Start the engine again.",
        )
    return ConditionalDifferenceMap.load(place.path)


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
