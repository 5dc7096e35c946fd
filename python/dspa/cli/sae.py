"""`dspa sae`: look at sparse autoencoders, train and fine-tune them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from dspa.cli.loading import load_model, load_sae
from dspa.cli.options import SAE_HELP, Device, DType, Layers, Model, Name, Numbers
from dspa.cli.tables import console, print_table

app = typer.Typer(help="Look at sparse autoencoders, train and fine-tune them.", no_args_is_help=True)

Texts = Annotated[
    Path,
    typer.Argument(
        help="Plain text, a document a line; JSON Lines with `text`; or preference triples. Its start is held out."
    ),
]
Out = Annotated[Path, typer.Option(help="Folder to write; the same command goes on from where it was stopped.")]
Tokens = Annotated[int, typer.Option(help="Tokens to train on; the file is read again if it has fewer.", min=1)]
BatchSize = Annotated[int, typer.Option(help="Tokens a step.", min=1)]
Rate = Annotated[float, typer.Option(help="Learning rate.")]
MaxLength = Annotated[int, typer.Option(help="Tokens of a document that are read.", min=1)]
Special = Annotated[bool, typer.Option("--special-tokens", help="Train on special tokens too.")]
HeldOut = Annotated[int, typer.Option(help="Tokens to hold out and report on.", min=1)]
Buffer = Annotated[int, typer.Option(help="Tokens that are shuffled together, in memory.", min=1)]
BatchTokens = Annotated[int, typer.Option(help="Tokens a forward pass of the model.", min=1)]
Checkpoints = Annotated[int, typer.Option(help="Steps between two checkpoints.", min=1)]
Seed = Annotated[int, typer.Option(help="Of the order of the tokens, and of a new SAE's weights.", min=0)]


@app.command("show")
def sae_show(
    sae: Annotated[str, typer.Argument(help=SAE_HELP)],
    layer: Annotated[int | None, typer.Option(help="Its layer, if its files do not say it.")] = None,
) -> None:
    """Tell what an SAE is: architecture, widths, layer, model, what was folded, fingerprint."""
    loaded = load_sae(sae, layer, "cpu")
    names = ("arch", "d_in", "d_sae", "layer", "model_name", "dtype", "folded", "fingerprint")
    details = {name: getattr(loaded, name) for name in names}
    print_table(sae, details | {"k": loaded.weights.k or "-", "normalize": loaded.weights.normalize})


@app.command("train")
def sae_train(
    texts: Texts,
    model: Model,
    layer: Annotated[int, typer.Option(help="Decoder layer whose output the SAE reads, from 0.")],
    out: Out,
    d_sae: Annotated[int, typer.Option(help="Latents.", min=1)] = 16_384,
    k: Annotated[float, typer.Option(help="Active latents a token, on average over a batch.")] = 64.0,
    tokens: Tokens = 50_000_000,
    batch_size: BatchSize = 4096,
    lr: Rate = 3e-4,
    max_length: MaxLength = 1024,
    special_tokens: Special = False,
    held_out: HeldOut = 16_384,
    buffer_tokens: Buffer = 65_536,
    batch_tokens: BatchTokens = 8192,
    checkpoint_every: Checkpoints = 500,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Numbers = DType.auto,
    model_name: Name = None,
    layers: Layers = None,
) -> None:
    """Train a BatchTopK SAE for a layer of a model, saved as a JumpReLU SAE in a SAELens folder."""
    from dspa.data.texts import TextFile
    from dspa.saes.config import SAETrainingConfig
    from dspa.saes.training import train_sae
    from dspa.training_folder import TrainingFolder

    config = SAETrainingConfig(
        n_tokens=tokens,
        batch_size=batch_size,
        lr=lr,
        max_length=max_length,
        exclude_special_tokens=not special_tokens,
        held_out_tokens=held_out,
        buffer_tokens=buffer_tokens,
        batch_tokens=batch_tokens,
        checkpoint_every=checkpoint_every,
        seed=seed,
    )
    # What is quick to check is checked before a model is loaded.
    TrainingFolder(out).check()
    file = TextFile(texts)
    lm, tokenizer = load_model(model, device, dtype)
    train_sae(lm, tokenizer, file, layer, out, d_sae=d_sae, k=k, config=config, layers=layers, model_name=model_name)
    _print_qualities(out)


@app.command("finetune")
def sae_finetune(
    texts: Texts,
    model: Model,
    sae: Annotated[str, typer.Option(help=f"Where to start. {SAE_HELP}")],
    out: Out,
    layer: Annotated[int | None, typer.Option(help="Its layer, if its files do not say it.")] = None,
    k: Annotated[
        float | None, typer.Option(help="Active latents a token, on average; by default what the SAE has.")
    ] = None,
    tokens: Tokens = 50_000_000,
    batch_size: BatchSize = 4096,
    lr: Rate = 3e-4,
    max_length: MaxLength = 1024,
    special_tokens: Special = False,
    held_out: HeldOut = 16_384,
    buffer_tokens: Buffer = 65_536,
    batch_tokens: BatchTokens = 8192,
    checkpoint_every: Checkpoints = 500,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Numbers = DType.auto,
    model_name: Name = None,
    layers: Layers = None,
) -> None:
    """Go on training an SAE on a text of your own, saved as a JumpReLU SAE in a SAELens folder."""
    from dspa.data.texts import TextFile
    from dspa.saes.config import SAETrainingConfig
    from dspa.saes.training import finetune_sae
    from dspa.training_folder import TrainingFolder

    config = SAETrainingConfig(
        n_tokens=tokens,
        batch_size=batch_size,
        lr=lr,
        max_length=max_length,
        exclude_special_tokens=not special_tokens,
        held_out_tokens=held_out,
        buffer_tokens=buffer_tokens,
        batch_tokens=batch_tokens,
        checkpoint_every=checkpoint_every,
        seed=seed,
    )
    # What is quick to check is checked before a model is loaded.
    TrainingFolder(out).check()
    file = TextFile(texts)
    start = load_sae(sae, layer, "cpu")
    lm, tokenizer = load_model(model, device, dtype)
    finetune_sae(lm, tokenizer, file, start, out, k=k, config=config, layers=layers, model_name=model_name)
    _print_qualities(out)


def _print_qualities(out: Path) -> None:
    from dspa.saes.training import read_qualities

    before, after = read_qualities(out).values()
    table = Table("", "before", "after", title=f"On {after.n_tokens} held-out tokens")
    for name, label, form in (
        ("explained_variance", "explained variance", ".4f"),
        ("l0", "L0", ".2f"),
        ("dead", "dead latents", "d"),
        ("mse", "squared error a token", ".4g"),
    ):
        table.add_row(label, *(format(getattr(quality, name), form) for quality in (before, after)))
    console.print(table)
    console.print(f"Written to {out}.")
