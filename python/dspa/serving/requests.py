"""The steering that a request asks for: flat keys, as HTTP's `vllm_xargs` takes texts and numbers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, TypeAlias

from pydantic import Field, StrictFloat

from dspa.config import MODES
from dspa.errors import refusal
from dspa.schemas import Accepts, OneOf, PositiveInt, Text, check, schema
from dspa.serving.settings import KEY, MAX_ALPHA, ServingSettings

SERVED_POSITIONS = ("response", "generated")
# What clients put into a request for an engine, and into one another.
CONTAINERS = ("vllm_xargs", "extra_args", "extra_body", "sampling_params")
ServedStrength: TypeAlias = Annotated[
    StrictFloat, Field(ge=0, le=MAX_ALPHA), Accepts(f"a number from 0 to {MAX_ALPHA:g} (published: 0.2)")
]


@schema
class SteeringRequest:
    """The steering of one request; `dspa.serving.requests.parse` fills in what the engine has for those not given.

    Attributes:
        dspa: "on" or "off".
        dspa_map: name of a map of the engine.
        dspa_alpha: strength.
        dspa_mode: "ablate", "augment" or "both".
        dspa_positions: "response", or "generated" to leave the last token of the prompt alone.
        dspa_start: number of tokens of the prompt that come before a response which is given with it, None for all.
            The latents of these tokens choose the plan.
    """

    dspa: Annotated[str, OneOf(("on", "off"))]
    dspa_map: Text
    dspa_alpha: ServedStrength
    dspa_mode: Annotated[str, OneOf(MODES)]
    dspa_positions: Annotated[str, OneOf(SERVED_POSITIONS)]
    dspa_start: PositiveInt | None = None

    def of_prompt(self, n_prompt: int) -> SteeringRequest:
        """Return the same with `dspa_start` given, for a prompt of `n_prompt` tokens.

        Raises:
            ValueError: a `dspa_start` beyond it.
        """
        start = n_prompt if self.dspa_start is None else self.dspa_start
        if start > n_prompt:
            accepted = f"1 to {n_prompt}, the number of tokens of the prompt"
            raise refusal(ValueError, "`dspa_start`", start, accepted)
        return replace(self, dspa_start=start)

    @property
    def n_counted(self) -> int:
        """Number of tokens, from the first, by whose latents the plan is chosen."""
        assert self.dspa_start is not None
        return self.dspa_start

    @property
    def first_edited(self) -> int:
        """Position of the first token that is edited."""
        return self.n_counted - (self.dspa_positions == "response")


def keys(extra_args: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the entries of a request's `vllm_xargs` or `extra_args` that are about steering."""
    return {name: value for name, value in (extra_args or {}).items() if name.lower().startswith(KEY)}


def places(body: Any, inside: str = "") -> list[str]:
    """Return where a request has keys about steering, as in `vllm_xargs.dspa`, in the right place or in a wrong one."""
    if not isinstance(body, Mapping):
        return []
    inner = [place for name in CONTAINERS for place in places(body.get(name), f"{inside}{name}.")]
    return [inside + name for name in keys(body)] + inner


def parse(extra_args: Mapping[str, Any] | None, settings: ServingSettings) -> SteeringRequest | None:
    """Return what a request asks for, None if it is not to be steered.

    Args:
        extra_args: the request's `vllm_xargs` or `extra_args`.
        settings: settings of the engine.

    Raises:
        ValueError: an unknown key or map, or a value outside its choices or its range.
    """
    asked, config = keys(extra_args), settings.config
    defaults = {
        "dspa": "on" if asked or settings.steer_all else "off",
        "dspa_map": settings.names[0],
        "dspa_alpha": config.alpha,
        "dspa_mode": config.mode,
        "dspa_positions": config.positions,
    }
    request = check(SteeringRequest, defaults | asked, ValueError, "vllm_xargs")
    if request.dspa_map not in settings.maps:
        raise refusal(ValueError, "`dspa_map`", repr(request.dspa_map), ", ".join(settings.names))
    return request if request.dspa == "on" else None
