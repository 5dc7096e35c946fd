"""`dspa generate`: steered text."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dspa.cli.loading import check_writable, load_all
from dspa.cli.options import Device, DType, LayerIn, LayerOut, Layers, Model, Name, Numbers, SAEIn, SAEOut

if TYPE_CHECKING:
    from dspa.steering.trace import Trace


class Mode(str, Enum):
    """Which latents are edited."""

    ablate = "ablate"
    augment = "augment"
    both = "both"


class Screen(str, Enum):
    """How the encoder is read where a token's maximum is needed."""

    none = "none"
    int8 = "int8"


def generate(
    model: Model,
    map_path: Annotated[Path, typer.Option("--map", help="A map made with the same SAEs.")],
    sae_in: SAEIn,
    sae_out: SAEOut,
    prompt: Annotated[
        str | None, typer.Option(help="One prompt. Without it and --file, prompts are asked for.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="Prompts: one a line, or JSON Lines with `prompt`. Answers are JSON Lines.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write answers here, as JSON Lines, instead of printing.")] = None,
    alpha: Annotated[float, typer.Option(help="Strength; 0 is the untouched model.")] = 0.2,
    mode: Annotated[Mode, typer.Option(help="Which latents are edited.")] = Mode.ablate,
    k_prompt: Annotated[int, typer.Option(help="Prompt latents that choose.")] = 32,
    k_diff: Annotated[int, typer.Option(help="Output latents to edit at each end.")] = 16,
    positions: Annotated[str, typer.Option(help="Tokens to steer: response, generated or all.")] = "response",
    scoring: Annotated[str, typer.Option(help="raw, demixed, whitened or confident.")] = "raw",
    backend: Annotated[str, typer.Option(help="auto, reference, triton or cuda; see dspa info.")] = "auto",
    screen: Annotated[
        Screen, typer.Option(help="int8: the same answers; reads a copy of the encoder of one byte a number first.")
    ] = Screen.none,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens an answer, at most.", min=1)] = 200,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0)] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Put each prompt into the model's chat template.")] = False,
    trace: Annotated[Path | None, typer.Option(help="Write every edited token here, as JSON Lines.")] = None,
    layer_in: LayerIn = None,
    layer_out: LayerOut = None,
    device: Device = "auto",
    dtype: Numbers = DType.auto,
    model_name: Name = None,
    layers: Layers = None,
) -> None:
    """Generate steered text: for one prompt, for a file of them, or for what you type."""
    import torch

    from dspa.config import SteeringConfig
    from dspa.data.prompts import read_prompts, tokenize_prompt
    from dspa.maps.cdmap import ConditionalDifferenceMap
    from dspa.steering.dspa import Steering

    check_writable("--out", out)
    check_writable("--trace", trace)
    config = SteeringConfig(
        k_prompt=k_prompt, k_diff=k_diff, alpha=alpha, mode=mode.value, positions=positions, scoring=scoring
    )
    prompts = read_prompts(prompt, file)
    cdmap = ConditionalDifferenceMap.load(map_path)
    lm, tokenizer, read, edit = load_all(model, (sae_in, layer_in), (sae_out, layer_out), device, dtype)
    steering = Steering(read, edit, cdmap, config, backend=backend, screen=screen.value, record=trace is not None)
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling["temperature"] = temperature
    torch.manual_seed(seed)
    sink = out.open("w", encoding="utf-8") if out else sys.stdout
    as_records = out is not None or file is not None
    with steering.attach(lm, layers=layers, model_name=model_name), _saving(steering.trace, trace):
        for text in prompts:
            inputs = tokenize_prompt(tokenizer, text, chat).to(lm.device)
            tokens = lm.generate(**inputs, max_new_tokens=max_new_tokens, **sampling)[0]
            answer = tokenizer.decode(tokens[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            print(json.dumps({"prompt": text, "response": answer}) if as_records else answer, file=sink, flush=True)


@contextmanager
def _saving(trace: Trace, path: Path | None) -> Iterator[None]:
    """Write the trace at the end, an early one too."""
    try:
        yield
    finally:
        if path is not None:
            trace.save(path)
