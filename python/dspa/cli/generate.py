"""`dspa generate`: steered text."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dspa.cli.loading import check_writable, load_all
from dspa.cli.options import FILES, OnRecordedModel, Options, RecordedSAEPair, Sampling, with_options
from dspa.config import SteeringConfig

if TYPE_CHECKING:
    from dspa.steering.trace import Trace

BACKENDS = ("auto", "reference", "triton", "cuda")
SCREENS = ("none", "int8")


@dataclass(frozen=True)
class BackendOptions:
    """Settings of computing, which do not change the result."""

    backend: str = field(default="auto", metadata={"help": "Backend of the ops; see dspa info.", "choices": BACKENDS})
    screen: str = field(
        default="none",
        metadata={"help": "Read an int8 copy of the encoder first, for the same answers.", "choices": SCREENS},
    )


@with_options
def generate(
    map_path: Annotated[Path, typer.Option("--map", help="Map that was made with the same SAEs.")],
    on: OnRecordedModel,
    pair: RecordedSAEPair,
    config: Annotated[SteeringConfig, Options("Steering", without=["ridge", "delta"])],
    ops: Annotated[BackendOptions, Options("Steering")],
    sampling: Sampling,
    prompt: Annotated[
        str | None, typer.Option(help="One prompt; without it and --file, prompts are read from the terminal.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(help=f"Prompts: text, one per line, or {FILES} with `prompt`. Answers are JSON Lines."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write answers here, as JSON Lines, instead of printing.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write every edited token here, as JSON Lines.")] = None,
) -> None:
    """Generate steered text: for one prompt, for a file of them, or for what you type."""
    import torch

    from dspa.data.prompts import read_prompts, tokenize_prompt
    from dspa.maps.cdmap import ConditionalDifferenceMap
    from dspa.steering.dspa import Steering

    check_writable("--out", out)
    check_writable("--trace", trace)
    prompts = read_prompts(prompt, file)
    cdmap = ConditionalDifferenceMap.load(map_path)
    model, tokenizer, sae_in, sae_out = load_all(on, pair, cdmap)
    steering = Steering(
        sae_in, sae_out, cdmap, config, backend=ops.backend, screen=ops.screen, record=trace is not None
    )
    decoding: dict[str, Any] = {"max_new_tokens": sampling.max_new_tokens, "do_sample": sampling.temperature > 0}
    if sampling.temperature > 0:
        decoding["temperature"] = sampling.temperature
    torch.manual_seed(sampling.seed)
    sink = out.open("w", encoding="utf-8") if out else sys.stdout
    as_records = out is not None or file is not None
    with steering.attach(model, layers=on.layers, model_name=on.model_name), _saving(steering.trace, trace):
        for text in prompts:
            inputs = tokenize_prompt(tokenizer, text, sampling.chat).to(model.device)
            tokens = model.generate(**inputs, **decoding)[0]
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
