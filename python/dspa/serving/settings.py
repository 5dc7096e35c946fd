"""The maps and SAEs that a steered engine loads, as settings that vLLM carries from process to process."""

from __future__ import annotations

from dataclasses import field

from dspa.config import SteeringConfig
from dspa.errors import refusal
from dspa.schemas import Flag, Text, check, schema

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
