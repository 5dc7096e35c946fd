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
# Keys that a method of steering takes, by the key that chooses one of the engine's.
TAKES: dict[str, tuple[str, ...]] = {
    "dspa_map": ("dspa_alpha", "dspa_mode", "dspa_positions", "dspa_start"),
    "dspa_adapter": (),
}
ServedStrength: TypeAlias = Annotated[
    StrictFloat, Field(ge=0, le=MAX_ALPHA), Accepts(f"a number from 0 to {MAX_ALPHA:g} (published: 0.2)")
]


@schema
class SteeringRequest:
    """The steering of one request; `dspa.serving.requests.parse` fills in what the engine has for those not given.

    Attributes:
        dspa: "on" or "off".
        dspa_map: name of a map of the engine, None for a request that is steered by something else.
        dspa_adapter: name of an adapter of the engine, likewise. The other settings mean nothing to it.
        dspa_alpha: strength.
        dspa_mode: "ablate", "augment" or "both".
        dspa_positions: "response", or "generated" to leave the last token of the prompt alone.
        dspa_start: number of tokens of the prompt that come before a response which is given with it, None for all.
            The latents of these tokens choose the plan.
    """

    dspa: Annotated[str, OneOf(("on", "off"))]
    dspa_alpha: ServedStrength
    dspa_mode: Annotated[str, OneOf(MODES)]
    dspa_positions: Annotated[str, OneOf(SERVED_POSITIONS)]
    dspa_map: Text | None = None
    dspa_adapter: Text | None = None
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
        """Number of tokens, from the first, by whose latents the plan is chosen: none for an adapter."""
        assert self.dspa_start is not None
        return 0 if self.dspa_map is None else self.dspa_start

    @property
    def first_edited(self) -> int:
        """Position of the first token that is edited: the first of all for an adapter."""
        if self.dspa_map is None:
            return 0
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
        ValueError: an unknown key or name, a value outside its choices or its range, or keys of two methods.
    """
    asked, config, choices = keys(extra_args), settings.config, settings.choices
    chosen = [key for key in TAKES if key in asked]
    method = (chosen or [key for key in TAKES if choices[key]])[0]
    defaults = {
        "dspa": "on" if asked or settings.steer_all else "off",
        method: choices[method][0] if choices[method] else None,
        "dspa_alpha": config.alpha,
        "dspa_mode": config.mode,
        "dspa_positions": config.positions,
    }
    request = check(SteeringRequest, defaults | asked, ValueError, "vllm_xargs")
    if unused := [key for key in asked if key not in (KEY, method, *TAKES[method])]:
        accepted = ", ".join((KEY, *TAKES[method]))
        raise ValueError(
            f"{', '.join(unused)}: not for a request that `{method}` steers; accepted beside it: {accepted}."
        )
    if (name := getattr(request, method)) not in choices[method]:
        accepted = ", ".join(choices[method]) or "no such key, as this engine has none"
        raise refusal(ValueError, f"`{method}`", repr(name), accepted)
    return request if request.dspa == "on" else None
