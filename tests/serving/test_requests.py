"""`dspa.serving.requests`: what a request asks for, and what is refused."""

from __future__ import annotations

import re
from contextlib import nullcontext
from typing import Any

import pytest

import dspa
from dspa.config import POSITIONS, SCORINGS
from dspa.serving.requests import parse
from dspa.serving.settings import AdapterPlace, MapPlace, Place, ServingSettings, VectorPlace

PLACE = Place("/somewhere", "0")
ADAPTERS = {"warm": AdapterPlace(PLACE, PLACE), "cold": AdapterPlace(PLACE, PLACE)}
VECTORS = {"calm": VectorPlace(PLACE, 4.0, "all"), "bold": VectorPlace(PLACE, 0.5, "generated")}
WITHOUT_MAPS: dict[str, Any] = {"maps": {}}


def map_place(file: str, layer_in: int = 1, layer_out: int = 2, d_sae_in: int = 64) -> MapPlace:
    saes = (Place("/sae", str(layer), layer) for layer in (layer_in, layer_out))
    return MapPlace(Place(file, file), *saes, d_sae_in)


def settings(**kwargs: Any) -> ServingSettings:
    maps = {"polite": map_place("/a"), "terse": map_place("/b")}
    return ServingSettings(**{"model": "m", "maps": maps} | kwargs)


def test_requests_that_ask_for_nothing() -> None:
    assert parse(None, settings()) is None
    assert parse({}, settings()) is None
    assert parse({"other": 1}, settings()) is None
    assert parse({"dspa": "off"}, settings(steer_all=True)) is None


def test_defaults_are_those_of_the_engine() -> None:
    config = dspa.SteeringConfig(alpha=0.7, mode="both", positions="generated")
    for asked in (parse({"dspa": "on"}, settings(config=config)), parse({}, settings(config=config, steer_all=True))):
        assert asked is not None
        assert (asked.dspa_map, asked.dspa_alpha, asked.dspa_mode) == ("polite", 0.7, "both")
        assert (asked.dspa_positions, asked.dspa_start) == ("generated", None)


@pytest.mark.parametrize(
    ("keys", "counted", "edited"),
    [
        ({"dspa": "on"}, 9, 8),
        ({"dspa_positions": "generated"}, 9, 9),
        ({"dspa_start": 4}, 4, 3),
        ({"dspa_start": 4, "dspa_positions": "generated"}, 4, 4),
        ({"dspa_map": "terse", "dspa_alpha": 1}, 9, 8),
    ],
)
def test_tokens_that_count_and_that_are_edited(keys: dict[str, Any], counted: int, edited: int) -> None:
    asked = parse(keys, settings())
    assert asked is not None
    asked = asked.of_prompt(9)
    assert (asked.n_counted, asked.first_edited) == (counted, edited)


def test_a_map_or_an_adapter() -> None:
    both, adapters = settings(adapters=ADAPTERS), settings(adapters=ADAPTERS, **WITHOUT_MAPS)
    for keys, engine, expected in (
        ({"dspa": "on"}, both, ("polite", None)),
        ({"dspa_adapter": "cold"}, both, (None, "cold")),
        ({"dspa": "on"}, adapters, (None, "warm")),
        ({"dspa": "on", "dspa_adapter": "cold"}, adapters, (None, "cold")),
    ):
        asked = parse(keys, engine)
        assert asked is not None and (asked.dspa_map, asked.dspa_adapter) == expected
        # An adapter reads no prompt, and edits every token.
        asked = asked.of_prompt(9)
        assert (asked.n_counted, asked.first_edited) == ((9, 8) if asked.dspa_map else (0, 0))
    asked = parse({}, settings(adapters=ADAPTERS, **WITHOUT_MAPS, steer_all=True))
    assert asked is not None and asked.dspa_adapter == "warm"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"dspa_map": "polite", "dspa_adapter": "warm"}, "dspa_adapter: not for a request that `dspa_map` steers"),
        (
            {"dspa_adapter": "warm", "dspa_alpha": 1, "dspa_mode": "both", "dspa": "on"},
            "dspa_alpha, dspa_mode: not for a request that `dspa_adapter` steers; accepted beside it: dspa_gate.",
        ),
        ({"dspa_adapter": "warm", "dspa_positions": "response"}, "dspa_positions: not for"),
        ({"dspa_adapter": "warm", "dspa_start": 1}, "dspa_start: not for"),
        ({"dspa": "off", "dspa_adapter": "warm", "dspa_start": 1}, "dspa_start: not for"),
        ({"dspa_adapter": "hot"}, "`dspa_adapter` is 'hot'; accepted: warm, cold"),
        ({"dspa_adapter": 1}, "`dspa_adapter` is 1; accepted: warm, cold"),
        ({"dspa_adapter": None}, "`dspa_adapter` is None; accepted: warm, cold"),
        ({"dspa_adaptor": "warm"}, "`dspa_adaptor` is not known"),
    ],
)
def test_what_is_refused_of_adapters(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(keys, settings(adapters=ADAPTERS))


def test_vectors() -> None:
    everything, vectors = settings(adapters=ADAPTERS, vectors=VECTORS), settings(vectors=VECTORS, **WITHOUT_MAPS)
    asked = parse({"dspa": "on"}, everything)
    assert asked is not None and asked.dspa_map == "polite" and asked.dspa_vector is None
    for keys, expected in (
        # Name, scale and first edited position.
        ({"dspa": "on"}, ("calm", 4.0, 0)),
        ({"dspa_vector": "bold"}, ("bold", 0.5, 9)),
        ({"dspa_alpha": 7}, ("calm", 7.0, 0)),
        ({"dspa_vector": "calm", "dspa_positions": "response"}, ("calm", 4.0, 8)),
        ({"dspa_vector": "bold", "dspa_positions": "all", "dspa_alpha": 100}, ("bold", 100.0, 0)),
        ({"dspa_vector": "bold", "dspa_start": 3}, ("bold", 0.5, 3)),
    ):
        for engine in (vectors, everything) if "dspa_vector" in keys else (vectors,):
            asked = parse(keys, engine)
            assert asked is not None and asked.dspa_map is None and asked.dspa_adapter is None
            asked = asked.of_prompt(9)
            assert (asked.dspa_vector, asked.dspa_alpha, asked.first_edited) == expected
            assert asked.n_counted == 0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"dspa_vector": "calm", "dspa_mode": "both"}, "dspa_mode: not for a request that `dspa_vector` steers"),
        ({"dspa_vector": "calm", "dspa_map": "polite"}, "dspa_vector: not for a request that `dspa_map` steers"),
        ({"dspa_vector": "calm", "dspa_adapter": "warm"}, "dspa_vector: not for a request that `dspa_adapter` steers"),
        ({"dspa_vector": "loud"}, "`dspa_vector` is 'loud'; accepted: calm, bold"),
        ({"dspa_vector": "calm", "dspa_alpha": 101}, "`dspa_alpha` is 101; accepted: a number from 0 to 100"),
        ({"dspa_vector": "calm", "dspa_alpha": -1}, "`dspa_alpha` is -1"),
        ({"dspa_vector": "calm", "dspa_positions": "last"}, "`dspa_positions` is 'last'; accepted: response, gen"),
        ({"dspa_map": "polite", "dspa_positions": "all"}, "`dspa_positions` is 'all'; accepted: response, generated"),
    ],
)
def test_what_is_refused_of_vectors(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(keys, settings(adapters=ADAPTERS, vectors=VECTORS))


@pytest.mark.parametrize("method", [{"dspa": "on"}, {"dspa_adapter": "warm"}, {"dspa_vector": "calm"}])
def test_gates(method: dict[str, Any]) -> None:
    """A request for any method can have one; its keys say all of it to other processes, and where the answer begins."""
    engine = settings(adapters=ADAPTERS, vectors=VECTORS)
    for keys, gate in (
        ({}, None),
        ({"dspa_gate": "entropy"}, dspa.EntropyGate()),
        ({"dspa_gate": "entropy", "dspa_gate_threshold": 2, "dspa_gate_k": 40}, dspa.EntropyGate(2.0, k=40)),
        ({"dspa_gate": "entropy", "dspa_gate_complement": "on"}, dspa.EntropyGate(complement=True)),
        ({"dspa_gate": "random", "dspa_gate_share": 0.25, "dspa_gate_seed": 3}, dspa.RandomGate(0.25, seed=3)),
        ({"dspa_gate": "first", "dspa_gate_n": 8, "dspa_gate_complement": "off"}, dspa.FirstTokens(8)),
    ):
        asked = parse(method | keys, engine)
        assert asked is not None and asked.gate == gate
        asked = asked.of_prompt(9)
        assert ("dspa_start" in asked.keys) == (gate is not None or method == {"dspa": "on"})
        again = parse(asked.keys, engine)
        assert again is not None and again.of_prompt(9) == asked


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"dspa_gate": "yes"}, "`dspa_gate` is 'yes'; accepted: entropy, random, first"),
        ({"dspa_gate_threshold": 1.0}, "dspa_gate_threshold: not for a request that `dspa_map` steers; accepted"),
        (
            {"dspa_gate": "entropy", "dspa_gate_share": 0.5},
            "dspa_gate_share: not for a request that `dspa_map` steers by",
        ),
        ({"dspa_gate": "entropy", "dspa_gate_threshold": -1}, "`dspa_gate_threshold` is -1"),
        ({"dspa_gate": "entropy", "dspa_gate_k": 1}, "`dspa_gate_k` is 1"),
        ({"dspa_gate": "entropy", "dspa_gate_complement": True}, "`dspa_gate_complement` is True; accepted: on, off"),
        ({"dspa_gate": "random"}, "`dspa_gate_share` is missing"),
        ({"dspa_gate": "random", "dspa_gate_share": 1.5}, "`dspa_gate_share` is 1.5"),
        ({"dspa_gate": "first"}, "`dspa_gate_n` is missing"),
        ({"dspa_gate": "first", "dspa_gate_n": 0}, "`dspa_gate_n` is 0"),
        ({"dspa_gate": "entropy", "dspa_start": 3}, "`dspa_start` is 3; accepted: 9, since a gate by entropy"),
    ],
)
def test_what_is_refused_of_gates(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        asked = parse(keys, settings())
        assert asked is not None
        asked.of_prompt(9)


def test_what_an_engine_does_not_have() -> None:
    with pytest.raises(ValueError, match="`dspa_adapter` is 'warm'; accepted: no such key, as this engine has none"):
        parse({"dspa_adapter": "warm"}, settings())
    with pytest.raises(ValueError, match="`dspa_map` is 'polite'; accepted: no such key, as this engine has none"):
        parse({"dspa_map": "polite"}, settings(adapters=ADAPTERS, **WITHOUT_MAPS))
    with pytest.raises(ValueError, match="dspa_alpha: not for a request that `dspa_adapter` steers"):
        parse({"dspa_alpha": 1}, settings(adapters=ADAPTERS, **WITHOUT_MAPS))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"dspa_alfa": 1}, "`dspa_alfa` is not known"),
        ({"dspa": "yes"}, "`dspa` is 'yes'; accepted: on, off"),
        ({"dspa": True}, "`dspa` is True; accepted: on, off"),
        ({"dspa_alpha": -1}, "`dspa_alpha` is -1; accepted: a number from 0 to 100"),
        ({"dspa_alpha": "0.5"}, "`dspa_alpha` is '0.5'"),
        ({"dspa_alpha": float("nan")}, "`dspa_alpha` is nan"),
        # More than float32 holds, which would end the engine.
        ({"dspa_alpha": 1e39}, "`dspa_alpha` is 1e+39; accepted: a number from 0 to 100"),
        ({"dspa_alpha": 101}, "`dspa_alpha` is 101"),
        ({"dspa_alpha": float("inf")}, "`dspa_alpha` is inf"),
        ({"DSPA": "on"}, "`DSPA` is not known"),
        ({"Dspa_alpha": 0.5}, "`Dspa_alpha` is not known"),
        ({"dspa_alpha": True}, "`dspa_alpha` is True"),
        ({"dspa_mode": "x"}, "`dspa_mode` is 'x'; accepted: ablate, augment, both"),
        ({"dspa_positions": "all"}, "`dspa_positions` is 'all'; accepted: response, generated"),
        ({"dspa_start": 0}, "`dspa_start` is 0; accepted: a whole number >= 1"),
        ({"dspa_start": 1.5}, "`dspa_start` is 1.5"),
        ({"dspa_map": "rude"}, "`dspa_map` is 'rude'; accepted: polite, terse"),
        ({"dspa": "off", "dspa_alpha": -1}, "`dspa_alpha` is -1"),
        ({"dspa": ["on"]}, "`dspa` is"),
    ],
)
def test_what_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(keys, settings())


def test_the_command_has_the_choices_that_can_be_served() -> None:
    import typer

    from dspa.cli import app

    options = {option.name: option for option in typer.main.get_command(app).commands["serve"].params}  # type: ignore[attr-defined]
    for name, choices in (("positions", POSITIONS), ("scoring", SCORINGS)):
        served = options[name].metavar.strip("<>").split("|")
        for choice in choices:
            assert (f"{choice}: " in options[name].help) == (choice in served)
            with nullcontext() if choice in served else pytest.raises(ValueError, match=choice):
                settings(config=dspa.SteeringConfig(**{name: choice}))


@pytest.mark.parametrize(
    "changes",
    [
        WITHOUT_MAPS,
        {"maps": {"polite+terse": map_place("/a")}},
        {"joint": True},
        {"joint": True, "maps": {"polite": map_place("/a")}},
        {"joint": True, "maps": {"early": map_place("/a", 1, 2), "late": map_place("/b", 3, 4)}},
        {"config": dspa.SteeringConfig(scoring="demixed")},
        {"config": dspa.SteeringConfig(positions="all")},
        {"config": dspa.SteeringConfig(alpha=1e39)},
        {"steer_all": "yes"},
    ],
)
def test_settings_that_no_engine_can_have(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="accepted"):
        settings(**changes)


# Its first and third gate at one layer, the third edits below where the second reads.
LAYERS = {"low": map_place("/a", 1, 4), "high": map_place("/b", 3, 5), "early": map_place("/c", 1, 2)}


@pytest.mark.parametrize(
    ("keys", "joint", "names"),
    [
        ({"dspa": "on"}, False, ["low"]),
        ({"dspa_map": "low+high"}, False, ["low", "high"]),
        # In the order of the engine, for the prefix cache.
        ({"dspa_map": "high+low"}, False, ["low", "high"]),
        ({"dspa_map": "early+low", "dspa_alpha": 2}, False, ["low", "early"]),
        ({"dspa_map": "early+high", "dspa_positions": "generated"}, False, ["high", "early"]),
        ({"dspa_positions": "generated"}, True, ["low", "high", "early"]),
        ({"dspa_map": "high"}, True, ["high"]),
        ({}, True, None),
    ],
)
def test_several_maps(keys: dict[str, Any], joint: bool, names: list[str] | None) -> None:
    config = dspa.SteeringConfig(positions="generated" if joint else "response")
    asked = parse(keys, settings(maps=LAYERS, joint=joint, config=config))
    assert (None if asked is None else asked.maps) == names
    if asked is not None:
        assert asked.of_prompt(9).keys["dspa_map"] == "+".join(names or [])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("low+low", "`dspa_map` is with 2 of layer 4; accepted: one for each output layer"),
        ("low+lower", "`dspa_map` is 'lower'; accepted: low, high, early"),
        ("low+", "`dspa_map` is ''; accepted: low, high, early"),
        ("early+high", "`dspa_map` is with an edit at layer 2 and one that is chosen by the prompt at layer 3"),
    ],
)
def test_maps_that_do_not_go_together(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse({"dspa_map": name}, settings(maps=LAYERS))
