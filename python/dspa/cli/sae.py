"""`dspa sae`: look at sparse autoencoders, train and fine-tune them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from dspa.cli.loading import check_model, load_model, load_sae
from dspa.cli.options import (
    FILES,
    SAE_HELP,
    OnModel,
    Options,
    TrainingOut,
    messages_of_options,
    name_options,
    with_options,
)
from dspa.cli.tables import console, print_line, print_table, print_warning
from dspa.errors import require_package
from dspa.saes.config import SAETrainingConfig

if TYPE_CHECKING:
    from dspa.data.texts import TextFile

app = typer.Typer(help="Look at sparse autoencoders, train and fine-tune them.", no_args_is_help=True)

Texts = Annotated[
    Path,
    typer.Argument(
        help=f"Text, one document per line; {FILES} with `text`; or preference triples. The start is held out."
    ),
]
Layer = Annotated[int | None, typer.Option(help="Layer of the SAE, if its files do not contain it.")]
Training = Annotated[
    SAETrainingConfig,
    Options(
        "Training",
        names={
            "n_tokens": "--tokens",
            "held_out_tokens": "--held-out",
            "exclude_special_tokens": "--no-special-tokens/--special-tokens",
        },
    ),
]
# Options of the arguments and settings that errors and reports name.
NAMES = {
    "k": "--k",
    "d_sae": "--d-sae",
    "layer": "--layer",
    "indices": "--layer",
    "lr": "--lr",
    "max_norm_ratio": "--max-norm-ratio",
}
D_SAE, K = [16_384], [64.0]
PER_LAYER = "; for several layers one for all, or one per layer in their order."
# Label and format of each figure of a training.
FIGURES = {
    "explained_variance": ("explained variance", ".4f"),
    "explained_variance_all": ("explained variance with outlying tokens", ".4f"),
    "top_variance": ("variance held by 1 % of the tokens", ".1%"),
    "l0": ("L0", ".2f"),
    "dead": ("dead latents", ".0f"),
    "dead_training": ("latents silent in the last training tokens", ".0f"),
    "dead_window_tokens": ("number of these tokens", ".0f"),
    "n_uses": ("training tokens on which a latent was active, on average", ".0f"),
    "mse": ("squared error per token", ".4g"),
    "n_tokens": ("held-out tokens", ".0f"),
    "n_left_out": ("held-out tokens left out for their norm", ".0f"),
    "n_left_out_training": ("training tokens left out for their norm", ".0f"),
}


@app.command("show")
def sae_show(sae: Annotated[str, typer.Argument(help=SAE_HELP)], layer: Layer = None) -> None:
    """Show an SAE: architecture, widths, layer, model, fingerprint, and its quality where a training recorded it."""
    loaded = load_sae(sae, layer, "cpu")
    details = {name: getattr(loaded, name) for name in ("arch", "d_in", "d_sae", "layer")}
    details |= {
        "model": loaded.model_name or "not known",
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "folded": ", ".join(loaded.folded) or "nothing",
        "fingerprint": loaded.fingerprint,
        "k": loaded.weights.k or "-",
        "normalize": loaded.weights.normalize,
    }
    figures = {"d_sae": loaded.d_sae, **_figures(Path(sae), loaded.figures)}
    print_table(
        sae, details | {label: format(figures[n], form) for n, (label, form) in FIGURES.items() if n in figures}
    )
    _print_weaknesses(figures)


def _figures(path: Path, recorded: Mapping[str, float]) -> Mapping[str, float]:
    """Return the figures of an SAE's training, from its folder or else those in the SAE's metadata."""
    from dspa.saes.records import read_figures

    folder = path if path.is_dir() else path.parent
    return (read_figures(folder) if path.exists() else {}) or recorded


def _print_weaknesses(figures: Mapping[str, float]) -> None:
    """Print what is wrong with an SAE, with options in place of settings."""
    from dspa.saes.quality import weaknesses

    for text in weaknesses(figures):
        print_warning(name_options(text, NAMES))


@app.command("train")
@with_options
def sae_train(
    texts: Texts,
    layer: Annotated[
        list[int],
        typer.Option(
            help="Decoder layer whose output the SAE reads, from 0. Several, each with its own --layer, are trained in "
            "one pass over the text, into layer_N in the folder."
        ),
    ],
    out: TrainingOut,
    on: OnModel,
    config: Training,
    d_sae: Annotated[list[int], typer.Option(help=f"Number of latents{PER_LAYER}", min=1)] = D_SAE,
    k: Annotated[list[float], typer.Option(help=f"Active latents per token, on average over a batch{PER_LAYER}")] = K,
) -> None:
    """Train BatchTopK SAEs for layers of a model, and save them as JumpReLU SAEs in SAELens folders."""
    from dspa.saes.training import layer_folders, sizes_of_layers, train_saes

    with messages_of_options(NAMES):
        sizes_of_layers(layer, d_sae, k)
        folders = layer_folders(out, layer)
    for folder in folders:
        folder.check_free()
    finished = [folder.finished for folder in folders]
    file = _check_texts(texts)
    model, tokenizer = load_model(on)
    with messages_of_options(NAMES):
        train_saes(
            *(model, tokenizer, file, layer, out),
            d_sae=d_sae,
            k=k,
            config=config,
            layers=on.layers,
            model_name=on.model_name,
        )
    for folder, was_finished in zip(folders, finished, strict=True):
        _print_qualities(folder.path, was_finished)


@app.command("finetune")
@with_options
def sae_finetune(
    texts: Texts,
    sae: Annotated[str, typer.Option(help=f"SAE to start from. {SAE_HELP}")],
    out: TrainingOut,
    on: OnModel,
    config: Training,
    layer: Layer = None,
    k: Annotated[
        float | None, typer.Option(help="Active latents per token, on average; by default as many as the SAE has.")
    ] = None,
) -> None:
    """Continue training an SAE on a text of your own, and save it as a JumpReLU SAE in a SAELens folder."""
    from dspa.saes.training import finetune_sae
    from dspa.training_folder import TrainingFolder

    folder = TrainingFolder(out)
    folder.check()
    folder.check_free()
    finished = folder.finished
    file = _check_texts(texts)
    check_model(on)
    start = load_sae(sae, layer, "cpu")
    model, tokenizer = load_model(on)
    with messages_of_options(NAMES):
        finetune_sae(
            *(model, tokenizer, file, start, out), k=k, config=config, layers=on.layers, model_name=on.model_name
        )
    _print_qualities(out, finished)


def _check_texts(texts: Path) -> TextFile:
    """Check what is quick to check before a model is loaded, and return the texts."""
    from dspa.data.texts import TextFile

    require_package("sae-lens", "Training an SAE")
    return TextFile(texts)


def _print_qualities(out: Path, was_finished: bool) -> None:
    """Print the quality of an SAE on held-out tokens before and after its training, and where the SAE is."""
    from dspa.saes.records import read_figures
    from dspa.saes.training import read_qualities

    table, figures = Table("", "before", "after", title="On held-out tokens"), read_figures(out)
    before = asdict(read_qualities(out)["before"])
    for name, (label, form) in FIGURES.items():
        if name in figures:
            earlier = format(before[name], form) if before.get(name) is not None else ""
            table.add_row(label, earlier, format(figures[name], form))
    console.print(table)
    _print_weaknesses(figures)
    print_line(f"This training was finished before, in {out}." if was_finished else f"Written to {out}.")
