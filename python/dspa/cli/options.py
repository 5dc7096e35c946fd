"""What commands share: options, loading, tables."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    pass


class DType(str, Enum):
    """Numbers that a model computes with."""

    auto = "auto"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


SAE_HELP = "A folder or file of an SAE, or RELEASE:SAE_ID of SAELens' catalogue."
Model = Annotated[str, typer.Option(help="A Hugging Face model: a folder or a Hub name.", show_default=False)]
SAEIn = Annotated[str, typer.Option("--sae-in", help=f"Input SAE, which reads the prompt. {SAE_HELP}")]
SAEOut = Annotated[str, typer.Option("--sae-out", help=f"Output SAE, where edits happen. {SAE_HELP}")]
LayerIn = Annotated[int | None, typer.Option(help="Layer of the input SAE, if its files do not say it.")]
LayerOut = Annotated[int | None, typer.Option(help="Layer of the output SAE, if its files do not say it.")]
Device = Annotated[str, typer.Option(help="cuda, cuda:1, cpu; auto takes cuda where there is one.")]
Numbers = Annotated[DType, typer.Option("--dtype", help="Numbers of the model and the SAEs.")]
Name = Annotated[str | None, typer.Option(help="What the model is, if its name or path does not tell.")]
Layers = Annotated[str | None, typer.Option(help="Dotted path of the decoder layers, for an unknown architecture.")]
