"""`dspa serve`: an OpenAI-compatible server that requests can steer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from dspa.cli.options import RECORDED, SAE_IN_HELP, SAE_OUT_HELP, Options, with_options
from dspa.config import SteeringConfig
from dspa.errors import refusal, require_package

# Choices of steering that `ServingSettings` refuses.
NOT_SERVED = {"positions": ("all",), "scoring": ("demixed",)}
# Arguments of `vllm serve`, which come after our own.
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


@with_options
def serve(
    context: typer.Context,
    config: Annotated[SteeringConfig, Options("Steering", without=["ridge", "delta"], without_choices=NOT_SERVED)],
    model: Annotated[str, typer.Argument(help="Hugging Face model: a folder, or a name on the Hub.")],
    maps: Annotated[
        list[str],
        typer.Option(
            "--map",
            help="A map, a file that dspa map build wrote, or several, each as NAME=FILE. All are of the same SAEs, "
            "and requests that name none take the first.",
        ),
    ],
    sae_in: Annotated[str | None, typer.Option(help=f"{SAE_IN_HELP} {RECORDED.format('map')}")] = None,
    sae_out: Annotated[str | None, typer.Option(help=f"{SAE_OUT_HELP} {RECORDED.format('map')}")] = None,
    steer_all: Annotated[bool, typer.Option(help="Steer requests that do not ask for it, too.")] = False,
    model_name: Annotated[
        str | None, typer.Option(help="Name of the model, if it is in a folder that does not record it.")
    ] = None,
    other_weights: Annotated[
        bool, typer.Option(help="Accept a model with other weights than the maps were made with.")
    ] = False,
) -> None:
    """Serve a model with vLLM: its OpenAI-compatible server, whose requests can be steered, each in its own way.

    A request asks for it by `vllm_xargs`: `{"dspa": "on"}`, and `dspa_alpha`, `dspa_mode`, `dspa_positions`,
    `dspa_map` and `dspa_start` for other settings than the server's. Others in the same batch are not changed.

    All further arguments are those of `vllm serve`:

    `dspa serve MODEL --map map.dspa.safetensors --port 8000 --max-model-len 4096`
    """
    require_package("vllm", "dspa serve", "On a machine without a GPU, see docs/serving.md.")
    from dspa.serving.options import vllm_options
    from dspa.serving.server import serve as serve_until_stopped

    options = vllm_options(
        model,
        _named(maps),
        sae_in,
        sae_out,
        config,
        steer_all=steer_all,
        model_name=model_name,
        other_weights=other_weights,
    )
    serve_until_stopped(model, options, context.args)


def _named(maps: Sequence[str]) -> dict[str, str] | str:
    """Return the maps by name, or the one that has none."""
    if len(maps) == 1 and (Path(maps[0]).exists() or "=" not in maps[0]):
        return maps[0]
    named = {}
    for text in maps:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise refusal(ValueError, "--map", text, "NAME=FILE where there are several")
        if name in named:
            raise refusal(ValueError, "--map", f"{name} twice", "one file per name")
        named[name] = path
    return named
