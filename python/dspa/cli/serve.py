"""`dspa serve`: an OpenAI-compatible server that requests can steer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from dspa.cli.options import (
    AdapterSAEOptions,
    Options,
    RecordedSAEPairOptions,
    changed,
    check_used,
    with_options,
)
from dspa.config import SteeringConfig
from dspa.errors import refusal, require_package

# Choices of steering that `ServingSettings` refuses.
NOT_SERVED = {"positions": ("all",), "scoring": ("demixed",)}
# Arguments of `vllm serve`, which come after our own.
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


@with_options
def serve(
    context: typer.Context,
    pair: Annotated[RecordedSAEPairOptions, Options("SAEs", without=["layer_in", "layer_out"])],
    adapter_sae: Annotated[AdapterSAEOptions, Options("SAEs", without=["layer"])],
    config: Annotated[SteeringConfig, Options("Steering", without=["ridge", "delta"], without_choices=NOT_SERVED)],
    model: Annotated[str, typer.Argument(help="Hugging Face model: a folder, or a name on the Hub.")],
    maps: Annotated[
        list[str] | None,
        typer.Option(
            "--map",
            help="A map, a file that dspa map build wrote, or several, each as NAME=FILE. Requests that name nothing "
            "take the first.",
        ),
    ] = None,
    joint: Annotated[
        bool,
        typer.Option(help="Steer requests that name no map by all maps at once, which are of different output layers."),
    ] = False,
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            help="An FSRL adapter, a folder that dspa fsrl train wrote, or several, each as NAME=FOLDER. Requests that "
            "name nothing take the first where there is no map.",
        ),
    ] = None,
    vectors: Annotated[
        list[str] | None,
        typer.Option(
            "--vector",
            help="A file that dspa.SteeringVector.save wrote, or several, each as NAME=FILE. Requests that name "
            "nothing take the first where there is nothing else.",
        ),
    ] = None,
    latents: Annotated[
        list[str] | None,
        typer.Option(
            "--latents",
            help="A JSON file of a set of latents of --sae, or without it of the first map's output SAE, or several, "
            "each as NAME=FILE. Requests that name nothing take the first where there is nothing else.",
        ),
    ] = None,
    steer_all: Annotated[bool, typer.Option(help="Steer requests that do not ask for it, too.")] = False,
    model_name: Annotated[
        str | None, typer.Option(help="Name of the model, if it is in a folder that does not record it.")
    ] = None,
    other_weights: Annotated[
        bool, typer.Option(help="Accept a model with other weights than what steers was made with.")
    ] = False,
) -> None:
    """Serve a model with vLLM: its OpenAI-compatible server, whose requests can be steered, each in its own way.

    A request asks for it by `vllm_xargs`: `{"dspa": "on"}`, and `dspa_alpha`, `dspa_mode`, `dspa_positions`,
    `dspa_map` and `dspa_start` for other settings than the server's, `dspa_adapter` for an FSRL adapter,
    `dspa_vector` for a vector, or `dspa_latents` for a set of latents. Others in the same batch are not changed.

    All further arguments are those of `vllm serve`:

    `dspa serve MODEL --map map.dspa.safetensors --port 8000 --max-model-len 4096`
    """
    require_package("vllm", "dspa serve", "On a machine without a GPU, see docs/serving.md.")
    from dspa.serving.options import vllm_options
    from dspa.serving.server import serve as serve_until_stopped

    if not (maps or adapters or vectors or latents):
        raise ValueError("None of --map, --adapter, --vector and --latents was given; accepted: one of them, or more.")
    check_used("--map", maps, [*changed(pair), *changed(config), *(["--joint"] if joint else [])])
    check_used("--adapter or --latents", adapters or latents, changed(adapter_sae))
    options = vllm_options(
        model,
        _named("--map", "FILE", maps),
        pair.sae_in,
        pair.sae_out,
        config if maps else None,
        adapters=_named("--adapter", "FOLDER", adapters),
        sae=adapter_sae.sae,
        vectors=_named("--vector", "FILE", vectors),
        latents=_named("--latents", "FILE", latents),
        steer_all=steer_all,
        joint=joint,
        model_name=model_name,
        other_weights=other_weights,
    )
    serve_until_stopped(model, options, context.args)


def _named(option: str, kind: str, given: Sequence[str] | None) -> dict[str, str] | str | None:
    """Return what an option gives by name, or the one that has none."""
    if not given:
        return None
    if len(given) == 1 and (Path(given[0]).exists() or "=" not in given[0]):
        return given[0]
    named = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise refusal(ValueError, option, text, f"NAME={kind} where there are several")
        if name in named:
            raise refusal(ValueError, option, f"{name} twice", "one path per name")
        named[name] = path
    return named
