"""`dspa baseline`: make the methods that DSPA is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dspa.cli.loading import check_model, check_writable, checked_triples, load_model
from dspa.cli.options import ChatTemplateKwargs, First, OnModel, Split, Triples, with_options
from dspa.cli.tables import print_line, print_next
from dspa.config import POSITIONS
from dspa.errors import refusal

app = typer.Typer(
    help="Make methods from the literature that DSPA is compared with, from the same preference triples.",
    no_args_is_help=True,
)


@app.command()
@with_options
def repe(
    triples: Triples,
    layer: Annotated[
        int, typer.Option(help="Decoder layer that is read and steered, from 0; published: DSPA's output layer.", min=0)
    ],
    out: Annotated[Path, typer.Option(help="File of the vector to write.")],
    on: OnModel,
    directions: Annotated[int, typer.Option(help="Number of principal directions.", min=1)] = 16,
    scale: Annotated[float, typer.Option(help="How many times the sum of the directions is added.", min=0)] = 0.5,
    positions: Annotated[
        str, typer.Option(help=f"Tokens to which the vector is added: {', '.join(POSITIONS)}.")
    ] = "all",
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of prompt and response to which responses are cut.", min=2)
    ] = None,
    batch_tokens: Annotated[int, typer.Option(help="Tokens per batch, padding included.", min=1)] = 8192,
    first: First = None,
    split: Split = "train",
    chat_template_kwargs: ChatTemplateKwargs = None,
) -> None:
    """Make RepE's vector: principal directions from rejected to chosen responses.

    `dspa compare --vector`, `dspa serve --vector` and `dspa.SteeringVector` take it.
    """
    from dspa.baselines.repe import repe_vector

    if positions not in POSITIONS:
        raise refusal(ValueError, "--positions", repr(positions), ", ".join(POSITIONS))
    check_writable("--out", out, {"TRIPLES": triples})
    check_model(on)
    source = checked_triples(triples, split, first)
    model, tokenizer = load_model(on)
    vector = repe_vector(
        *(model, tokenizer, source, layer),
        n_directions=directions,
        scale=scale,
        positions=positions,
        max_length=max_length,
        chat_template_kwargs=chat_template_kwargs,
        batch_tokens=batch_tokens,
        layers=on.layers,
        model_name=on.model_name,
    )
    vector.save(out)
    print_line(f"Written to {out}: {directions} directions at layer {layer}, scale {scale:g}.")
    print_next("compare", "PROMPTS", "--vector", out, "--model", on.model)
