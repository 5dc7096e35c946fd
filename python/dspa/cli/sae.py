"""`dspa sae`: look at sparse autoencoders, train and fine-tune them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from dspa.cli.loading import load_model, load_sae
from dspa.cli.options import FILES, SAE_HELP, OnModel, Options, errors_of_options, with_options
from dspa.cli.tables import console, print_table
from dspa.saes.config import SAETrainingConfig

app = typer.Typer(help="Look at sparse autoencoders, train and fine-tune them.", no_args_is_help=True)

Texts = Annotated[
    Path,
    typer.Argument(
        help=f"Text, one document per line; {FILES} with `text`; or preference triples. The start is held out."
    ),
]
Layer = Annotated[int | None, typer.Option(help="Layer of the SAE, if its files do not contain it.")]
Out = Annotated[Path, typer.Option(help="Folder to write; the same command continues a stopped training in it.")]
Training = Annotated[
    SAETrainingConfig,
    Options(
        "Training",
        without=["dead_feature_window"],
        names={
            "n_tokens": "--tokens",
            "held_out_tokens": "--held-out",
            "exclude_special_tokens": "--no-special-tokens/--special-tokens",
        },
    ),
]
# Arguments that errors name, in addition to the settings of the config.
NAMES = {"k": "--k", "layer": "--layer"}


@app.command("show")
def sae_show(sae: Annotated[str, typer.Argument(help=SAE_HELP)], layer: Layer = None) -> None:
    """Show an SAE: architecture, widths, layer, model, what was folded into its weights, fingerprint."""
    loaded = load_sae(sae, layer, "cpu")
    names = ("arch", "d_in", "d_sae", "layer", "model_name", "dtype", "folded", "fingerprint")
    details = {name: getattr(loaded, name) for name in names}
    print_table(sae, details | {"k": loaded.weights.k or "-", "normalize": loaded.weights.normalize})


@app.command("train")
@with_options
def sae_train(
    texts: Texts,
    layer: Annotated[int, typer.Option(help="Decoder layer whose output the SAE reads, from 0.")],
    out: Out,
    on: OnModel,
    config: Training,
    d_sae: Annotated[int, typer.Option(help="Number of latents.", min=1)] = 16_384,
    k: Annotated[float, typer.Option(help="Active latents per token, on average over a batch.")] = 64.0,
) -> None:
    """Train a BatchTopK SAE for a layer of a model, and save it as a JumpReLU SAE in a SAELens folder."""
    from dspa.data.texts import TextFile
    from dspa.saes.training import train_sae
    from dspa.training_folder import TrainingFolder

    # What is quick to check is checked before a model is loaded.
    TrainingFolder(out).check()
    file = TextFile(texts)
    model, tokenizer = load_model(on)
    with errors_of_options(NAMES):
        train_sae(
            *(model, tokenizer, file, layer, out),
            d_sae=d_sae,
            k=k,
            config=config,
            layers=on.layers,
            model_name=on.model_name,
        )
    _print_qualities(out)


@app.command("finetune")
@with_options
def sae_finetune(
    texts: Texts,
    sae: Annotated[str, typer.Option(help=f"SAE to start from. {SAE_HELP}")],
    out: Out,
    on: OnModel,
    config: Training,
    layer: Layer = None,
    k: Annotated[
        float | None, typer.Option(help="Active latents per token, on average; by default as many as the SAE has.")
    ] = None,
) -> None:
    """Continue training an SAE on a text of your own, and save it as a JumpReLU SAE in a SAELens folder."""
    from dspa.data.texts import TextFile
    from dspa.saes.training import finetune_sae
    from dspa.training_folder import TrainingFolder

    # What is quick to check is checked before a model is loaded.
    TrainingFolder(out).check()
    file = TextFile(texts)
    start = load_sae(sae, layer, "cpu")
    model, tokenizer = load_model(on)
    with errors_of_options(NAMES):
        finetune_sae(
            *(model, tokenizer, file, start, out), k=k, config=config, layers=on.layers, model_name=on.model_name
        )
    _print_qualities(out)


def _print_qualities(out: Path) -> None:
    """Print the quality of an SAE on held-out tokens before and after its training."""
    from dspa.saes.training import read_qualities
    from dspa.training_folder import TrainingFolder

    before, after = read_qualities(out).values()
    table = Table("", "before", "after", title=f"On {after.n_tokens} held-out tokens")
    for name, label, form in (
        ("explained_variance", "explained variance", ".4f"),
        ("l0", "L0", ".2f"),
        ("dead", "dead latents", "d"),
        ("mse", "squared error per token", ".4g"),
    ):
        table.add_row(label, *(format(getattr(quality, name), form) for quality in (before, after)))
    console.print(table)
    n_left_out = TrainingFolder(out).read()["n_left_out"]
    console.print(f"Left out for their norm: {n_left_out} tokens of the training, {after.n_left_out} held-out tokens.")
    console.print(f"Written to {out}.")
