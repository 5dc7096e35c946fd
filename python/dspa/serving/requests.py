"""The steering that a request asks for: flat keys, as HTTP's `vllm_xargs` takes texts and numbers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Annotated, Any

from dspa.config import MODES, POSITIONS
from dspa.errors import refusal
from dspa.schemas import Fraction, NonNegative, OneOf, PositiveInt, Seed, Text, check, schema
from dspa.serving.settings import JOIN, KEY, ServedStrength, ServingSettings
from dspa.steering.decisions import EntropyGate, FirstTokens, Gate, RandomGate, TopK

# Positions of a map, whose plan needs the whole prompt.
MAP_POSITIONS = ("response", "generated")
# What clients put into a request for an engine, and into one another.
CONTAINERS = ("vllm_xargs", "extra_args", "extra_body", "sampling_params")
# Keys that a method of steering takes, by the key that chooses one of the engine's.
MAP = f"{KEY}_map"
TAKES: dict[str, tuple[str, ...]] = {
    MAP: ("dspa_alpha", "dspa_mode", "dspa_positions", "dspa_start"),
    "dspa_adapter": (),
    "dspa_vector": ("dspa_alpha", "dspa_positions", "dspa_start"),
    "dspa_latents": ("dspa_positions", "dspa_start"),
}
# Gates by name. Their settings have keys that begin with this.
GATE = "dspa_gate"
GATES: dict[str, type[Gate]] = {"entropy": EntropyGate, "random": RandomGate, "first": FirstTokens}


@schema
class SteeringRequest:
    """The steering of one request; `dspa.serving.requests.parse` fills in what the engine has for those not given.

    Attributes:
        dspa: "on" or "off".
        dspa_map: name of a map of the engine, or of several joined by "+", in the order of the engine; None for a
            request that is steered by something else.
        dspa_adapter: name of an adapter of the engine, likewise. The other settings mean nothing to it.
        dspa_vector: name of a vector of the engine, likewise.
        dspa_latents: name of a set of latents of the engine, likewise.
        dspa_alpha: strength, for a vector its scale.
        dspa_mode: "ablate", "augment" or "both".
        dspa_positions: "response", "generated" to leave the last token of the prompt alone, or for a vector or a
            set of latents "all".
        dspa_start: number of tokens of the prompt that come before a response which is given with it, None for all.
            The latents of these tokens choose the plan.
        dspa_gate: which tokens of the answer are steered: a name of GATES, None for all.
        dspa_gate_threshold, dspa_gate_k, dspa_gate_share, dspa_gate_seed, dspa_gate_n: settings of the gate.
        dspa_gate_complement: "on" to steer the other tokens.
    """

    dspa: Annotated[str, OneOf(("on", "off"))]
    dspa_alpha: ServedStrength
    dspa_mode: Annotated[str, OneOf(MODES)]
    dspa_positions: Annotated[str, OneOf(POSITIONS)]
    dspa_map: Text | None = None
    dspa_adapter: Text | None = None
    dspa_vector: Text | None = None
    dspa_latents: Text | None = None
    dspa_start: PositiveInt | None = None
    dspa_gate: Annotated[str, OneOf(tuple(GATES))] | None = None
    dspa_gate_threshold: NonNegative | None = None
    dspa_gate_k: TopK | None = None
    dspa_gate_share: Fraction | None = None
    dspa_gate_seed: Seed | None = None
    dspa_gate_n: PositiveInt | None = None
    dspa_gate_complement: Annotated[str, OneOf(("on", "off"))] | None = None

    @property
    def gate(self) -> Gate | None:
        """Which tokens of the answer are steered, None for all."""
        if self.dspa_gate is None:
            return None
        given = {name: getattr(self, f"{GATE}_{name}") for name in _settings_of(GATES[self.dspa_gate])}
        settings = {name: value for name, value in given.items() if value is not None}
        if self.dspa_gate_complement is not None:
            settings["complement"] = self.dspa_gate_complement == "on"
        return GATES[self.dspa_gate](**settings)

    def of_prompt(self, n_prompt: int) -> SteeringRequest:
        """Return the same with `dspa_start` given, for a prompt of `n_prompt` tokens.

        Raises:
            ValueError: a `dspa_start` beyond it, or before its end with a gate that reads logits.
        """
        start = n_prompt if self.dspa_start is None else self.dspa_start
        if self.gate is not None and self.gate.reads_logits and start < n_prompt:
            accepted = (
                f"{n_prompt}, since a gate by entropy reads the logits before each token, which a given one lacks"
            )
            raise refusal(ValueError, "`dspa_start`", start, accepted)
        if start > n_prompt:
            accepted = f"1 to {n_prompt}, the number of tokens of the prompt"
            raise refusal(ValueError, "`dspa_start`", start, accepted)
        return replace(self, dspa_start=start)

    @property
    def keys(self) -> dict[str, Any]:
        """The keys by which `parse` gives the same request whatever the defaults of an engine."""
        method = next(key for key in TAKES if getattr(self, key) is not None)
        used = {KEY, method, *TAKES[method], *_gate_keys(self.dspa_gate)}
        if self.dspa_gate is None and self.dspa_positions == "all":
            # Where all tokens are edited, the end of the prompt means nothing, and must not keep equal blocks apart.
            used -= {"dspa_start"}
        values = {name: getattr(self, name) for name in sorted(used)}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def maps(self) -> list[str]:
        """Names of the maps."""
        return self.dspa_map.split(JOIN) if self.dspa_map else []

    @property
    def n_counted(self) -> int:
        """Number of tokens, from the first, by whose latents the plans of maps are chosen."""
        assert self.dspa_start is not None
        return 0 if self.dspa_map is None else self.dspa_start

    @property
    def first_edited(self) -> int:
        """Position of the first token that is edited."""
        return first_edited(self.keys)


def _settings_of(kind: type[Gate]) -> list[str]:
    """Return the names of the settings of a kind of gate, but for its complement."""
    return [field.name for field in fields(kind) if field.name != "complement"]  # type: ignore[arg-type]


def _gate_keys(gate: str | None) -> tuple[str, ...]:
    """Return the keys that a request takes by its gate, of which `dspa_start` says where the answer begins."""
    if gate is None:
        return ()
    return ("dspa_start", GATE, f"{GATE}_complement", *(f"{GATE}_{name}" for name in _settings_of(GATES[gate])))


def first_edited(asked: Mapping[str, Any]) -> int:
    """Return the position of the first token that a request edits whose keys are given in full: 0 for an adapter."""
    if asked.get("dspa_positions", "all") == "all":
        return 0
    start: int = asked["dspa_start"]
    return start - 1 if asked["dspa_positions"] == "response" else start


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
    asked, choices = keys(extra_args), settings.choices
    chosen = [key for key in TAKES if key in asked]
    method = (chosen or [key for key in TAKES if choices[key]])[0]
    given: Any = asked.get(method, _default(method, settings))
    names = given.split(JOIN) if method == MAP and isinstance(given, str) else [given]
    if unknown := [one for one in names if one not in choices[method]]:
        accepted = ", ".join(choices[method]) or "no such key, as this engine has none"
        raise refusal(ValueError, f"`{method}`", repr(unknown[0]), accepted)
    # In one order, by which the prefix cache finds the same steering again.
    name = JOIN.join(sorted(names, key=choices[method].index))
    defaults = {"dspa": "on" if asked or settings.steer_all else "off"} | _defaults(method, name, settings)
    request = check(SteeringRequest, defaults | asked | {method: name}, ValueError, "vllm_xargs")
    _check_used(asked, method, request)
    if request.dspa_map is not None and request.dspa_positions not in MAP_POSITIONS:
        raise refusal(ValueError, "`dspa_positions`", repr(request.dspa_positions), ", ".join(MAP_POSITIONS))
    if request.maps:
        settings.check_joint(f"`{MAP}`", request.maps, request.dspa_positions)
    return request if request.dspa == "on" else None


def _check_used(asked: Mapping[str, Any], method: str, request: SteeringRequest) -> None:
    """Raise `ValueError` for keys that mean nothing for the method and the gate of a request, or a gate without one."""
    used = list(dict.fromkeys((*TAKES[method], GATE, *_gate_keys(request.dspa_gate))))
    if unused := [key for key in asked if key not in (KEY, method, *used)]:
        steered = f"`{method}` steers" + ("" if request.dspa_gate is None else f" by the gate {request.dspa_gate!r}")
        raise ValueError(
            f"{', '.join(unused)}: not for a request that {steered}; accepted beside it: {', '.join(used)}."
        )
    if request.dspa_gate == "random" and request.dspa_gate_share is None:
        raise refusal(ValueError, f"`{GATE}_share`", "missing", "the share of tokens that are steered, from 0 to 1")
    if request.dspa_gate == "first" and request.dspa_gate_n is None:
        raise refusal(ValueError, f"`{GATE}_n`", "missing", "the number of tokens that are steered")


def _default(method: str, settings: ServingSettings) -> str | None:
    """Return the name that a request means which gives none, None if the engine has nothing of the kind."""
    names = settings.choices[method]
    return JOIN.join(names) if method == MAP and settings.joint else next(iter(names), None)


def _defaults(method: str, name: str, settings: ServingSettings) -> dict[str, Any]:
    """Return the settings of a request that gives none."""
    config = settings.config
    defaults = {"dspa_alpha": config.alpha, "dspa_mode": config.mode, "dspa_positions": config.positions}
    if method == "dspa_vector":
        vector = settings.vectors[name]
        return defaults | {"dspa_alpha": vector.scale, "dspa_positions": vector.positions}
    return defaults | ({"dspa_positions": "all"} if method == "dspa_adapter" else {})
