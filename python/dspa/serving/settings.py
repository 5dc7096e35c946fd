"""What a steered engine loads, as settings that vLLM carries from process to process: maps, adapters, vectors, SAEs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, TypeAlias

from pydantic import Field, StrictFloat

from dspa.config import POSITIONS, SteeringConfig
from dspa.errors import refusal
from dspa.files import file_sha256
from dspa.schemas import Accepts, Count, Flag, OneOf, Text, check, schema
from dspa.steering.joint import check_layers

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
# Between the names of maps that steer one request together.
JOIN = "+"
# A residual that overflows makes keys and values NaN, and attention can read those in the blocks of a later request.
MAX_ALPHA = 100.0
ServedStrength: TypeAlias = Annotated[
    StrictFloat, Field(ge=0, le=MAX_ALPHA), Accepts(f"a number from 0 to {MAX_ALPHA:g} (published: 0.2)")
]


@schema
class Place:
    """A file or folder, and what was there when the engine was asked for.

    Attributes:
        path: an absolute path.
        digest: SHA-256 of a file, or the fingerprint of an SAE.
        layer: layer of an SAE, None for others.
    """

    path: Text
    digest: Text
    layer: int | None = None

    @classmethod
    def of_file(cls, path: Path) -> Place:
        """Return the place of a file."""
        return cls(str(path), file_sha256(path))

    def check_unchanged(self, error: type[Exception]) -> None:
        """Raise `error` for a file that is another than when the engine was asked for."""
        if (digest := file_sha256(Path(self.path))) != self.digest:
            raise refusal(
                error,
                self.path,
                f"another file than when the engine was started (SHA-256 {digest}, was {self.digest})",
                "the same file in all processes",
                "Start the engine again.",
            )


@schema
class MapPlace:
    """A map and its SAEs.

    Attributes:
        file: its file.
        sae_in, sae_out: the SAEs, with their layers.
        d_sae_in: latents of the input SAE.
    """

    file: Place
    sae_in: Place
    sae_out: Place
    d_sae_in: Count

    @property
    def layers(self) -> tuple[int, int]:
        """Layers of the SAEs."""
        assert self.sae_in.layer is not None and self.sae_out.layer is not None
        return self.sae_in.layer, self.sae_out.layer


@schema
class AdapterPlace:
    """An adapter and the SAE that it was trained with.

    Attributes:
        record: its record, the file that holds the checksum of its tensors.
        sae: the SAE.
    """

    record: Place
    sae: Place


@schema
class VectorPlace:
    """A vector, and what it has for requests that do not say otherwise.

    Attributes:
        file: its file.
        scale: how many times it is added.
        positions: tokens to which it is added.
    """

    file: Place
    scale: ServedStrength
    positions: Annotated[str, OneOf(POSITIONS)]


@schema
class ServingSettings:
    """Settings of a steered engine.

    Attributes:
        model: the model that was checked, as vLLM names it.
        maps: the maps by name. Requests that name nothing take the first, or all of them if `joint`.
        adapters: the adapters by name. Requests that name nothing take the first where there is no map.
        vectors: the vectors by name. Requests that name nothing take the first where there is neither.
        latents: files of sets of latents by name. Requests that name nothing take the first where there is no other.
        sae_latents: the SAE of these latents, None without them.
        config: settings of steering by a map, which a request may replace in part.
        steer_all: True to steer requests that do not ask for it.
        joint: True to steer requests that name no map by all of them at once.
    """

    model: Text
    maps: dict[Text, MapPlace] = field(default_factory=dict)
    adapters: dict[Text, AdapterPlace] = field(default_factory=dict)
    vectors: dict[Text, VectorPlace] = field(default_factory=dict)
    latents: dict[Text, Place] = field(default_factory=dict)
    sae_latents: Place | None = None
    config: SteeringConfig = field(default_factory=SteeringConfig)
    steer_all: Flag = False
    joint: Flag = False

    def __post_init__(self) -> None:
        if not any(self.choices.values()):
            raise refusal(ValueError, "`maps`, `adapters`, `vectors` and `latents`", "empty", "one of them, or more")
        if (self.sae_latents is None) != (not self.latents):
            raise refusal(ValueError, "`sae_latents`", "given without latents, or missing", "one with latents alone")
        if joined := [name for name in self.maps if JOIN in name]:
            raise refusal(ValueError, "A name of `maps`", repr(joined[0]), f"names without {JOIN!r}, which joins them")
        if self.joint and len(self.maps) < 2:
            raise refusal(ValueError, "`joint`", "given with fewer than two maps", "two maps or more")
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
        if self.joint:
            self.check_joint("`maps` with `joint`", list(self.maps), self.config.positions)

    @property
    def latent_spaces(self) -> dict[Place, int]:
        """Numbers of latents of the maps' input SAEs."""
        return {place.sae_in: place.d_sae_in for place in self.maps.values()}

    def check_joint(self, what: str, names: Sequence[str], positions: str) -> None:
        """Raise `ValueError` for maps that cannot steer one request together.

        Args:
            what: what gives them, in messages.
            names: names of the maps.
            positions: "response" or "generated".
        """
        layers_in, layers_out = zip(*(self.maps[name].layers for name in names), strict=True)
        check_layers(what, layers_out)
        last_read, first_edit = max(layers_in), min(layers_out)
        if positions == "response" and first_edit < last_read:
            raise refusal(
                ValueError,
                what,
                f"with an edit at layer {first_edit} and one that is chosen by the prompt at layer {last_read}",
                "with positions='response' maps whose input SAEs are not above the output SAE of another",
                "The last token of the prompt would be edited before it is read. Ask for positions='generated'.",
            )

    @property
    def choices(self) -> dict[str, list[str]]:
        """Names that a request can choose from, by the key that chooses."""
        return {
            f"{KEY}_map": list(self.maps),
            f"{KEY}_adapter": list(self.adapters),
            f"{KEY}_vector": list(self.vectors),
            f"{KEY}_latents": list(self.latents),
        }

    @classmethod
    def of(cls, hf_config: object) -> ServingSettings | None:
        """Return the settings in a model's configuration, None if it has none.

        Raises:
            ValueError: settings that do not fit the schema.
        """
        given = getattr(hf_config, KEY, None)
        return None if given is None else check(cls, given, ValueError, f"`hf_overrides`: `{KEY}`")
