"""`dspa serve`: its options, up to what vLLM is started with."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import CliRunner

from dspa.cli import app
from tests.serving.conftest import World


@pytest.fixture(scope="module")
def world(make_world: Callable[[str], World]) -> World:
    return make_world("llama")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the server was started with, without vLLM."""
    calls: list[Any] = []
    # The name `dspa.cli.serve` is that of the command.
    monkeypatch.setattr(sys.modules["dspa.cli.serve"], "require_package", lambda *_: None)
    monkeypatch.setattr("dspa.serving.server.serve", lambda *arguments: calls.append(arguments))
    return calls


def serve(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["serve", *arguments])


def saes(world: World) -> list[str]:
    return ["--sae-in", world.place("sae_in"), "--sae-out", world.place("sae_out")]


def test_maps_and_adapters(world: World, started: list[Any]) -> None:
    adapters = [f"--adapter={name}={path}" for name, path in world.adapters.items()]
    result = serve(world.model, "--map", world.map, *saes(world), *adapters, "--alpha", "0.5", "--port", "1")
    assert result.exception is None, result.exception
    ((model, options, rest),) = started
    settings = options["hf_overrides"]["dspa"]
    assert (model, list(rest)) == (world.model, ["--port", "1"])
    assert list(settings["maps"]) == ["default"] and settings["config"]["alpha"] == 0.5
    assert list(settings["adapters"]) == list(world.adapters)


def test_an_adapter_alone(world: World, started: list[Any]) -> None:
    result = serve(world.model, "--adapter", world.place("late"), "--sae", world.place("sae_out"))
    assert result.exception is None, result.exception
    settings = started[0][1]["hf_overrides"]["dspa"]
    assert settings["maps"] == {} and list(settings["adapters"]) == ["default"]


def test_vectors_alone(world: World, started: list[Any]) -> None:
    result = serve(world.model, *(f"--vector={name}={path}" for name, path in world.vectors.items()))
    assert result.exception is None, result.exception
    settings = started[0][1]["hf_overrides"]["dspa"]
    assert settings["maps"] == {} and list(settings["vectors"]) == list(world.vectors)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "None of --map, --adapter, --vector and --latents was given"),
        (["--adapter", "a", "--alpha", "1"], "Without --map there is no use for --alpha."),
        (["--adapter", "a", "--sae-in", "s"], "Without --map there is no use for --sae-in."),
        (["--map", "m", "--sae", "s"], "Without --adapter or --latents there is no use for --sae."),
        (["--adapter", "a", "--adapter", "b"], "--adapter is a; accepted: NAME=FOLDER where there are several"),
        (["--adapter", "a=b", "--adapter", "a=c"], "--adapter is a twice"),
        (["--map", "a=b", "--map", "c"], "--map is c; accepted: NAME=FILE where there are several"),
        (["--adapter", "a=nowhere"], "nowhere holds no adapter.json"),
        (["--adapter", "a", "--joint"], "Without --map there is no use for --joint."),
    ],
)
def test_what_is_refused(arguments: list[str], message: str, started: list[Any], world: World) -> None:
    result = serve(world.model, *arguments)
    assert message in str(result.exception) and not started
