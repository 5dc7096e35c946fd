"""`dspa fsrl analyse usage | fraction | mask | categories | coherence`: what an adapter does, as CSV and PNG."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from dspa.cli.loading import device_named, load_model, load_sae
from dspa.cli.options import SAE_HELP, Device, DType, Layers, Model, Name, Numbers
from dspa.cli.tables import cell, column_table, console, print_table

if TYPE_CHECKING:
    from dspa.data.triples import Triple
    from dspa.evaluate.responses import Response
    from dspa.fsrl.adapter import FSRLAdapter
    from dspa.saes.labels import Labels

SAE = Annotated[str, typer.Option(help=f"The SAE that the adapter was trained with. {SAE_HELP}")]
Adapter = Annotated[Path, typer.Option(help="Folder of the adapter.")]
Triples = Annotated[Path, typer.Argument(help="Preference triples, held out from training: JSON Lines.")]
Out = Annotated[Path, typer.Option(help="Folder for CSV and PNG, made where there is none.")]
Layer = Annotated[int | None, typer.Option(help="Layer of the SAE, if its files do not say it.")]
First = Annotated[int | None, typer.Option(help="Use the first so many triples only.", min=1)]
MaxLength = Annotated[int | None, typer.Option(help="Tokens of prompt and response, from which on responses are cut.")]
BatchTokens = Annotated[int, typer.Option(help="Tokens a forward pass of the model.", min=1)]
Beta = Annotated[float, typer.Option(help="SimPO's beta.")]
Gamma = Annotated[float, typer.Option(help="SimPO's gamma / beta.")]
LabelFile = Annotated[Path, typer.Option(help="Labels of latents: a Neuronpedia export, or latents and categories.")]
Rules = Annotated[Path | None, typer.Option(help='By which descriptions become categories: {"name": ["regex"]}.')]
Explainer = Annotated[str | None, typer.Option(help="Descriptions of this `explanationModelName` alone.")]
NOT_MEASURED = "NOT MEASURED (--hand FILE compares them with labels by hand)"


def usage(
    triples: Triples,
    model: Model,
    sae: SAE,
    adapter: Adapter,
    out: Out,
    top: Annotated[int, typer.Option(help="Latents to list.", min=0)] = 10,
    first: First = None,
    max_length: MaxLength = None,
    batch_tokens: BatchTokens = 8192,
    layer: Layer = None,
    device: Device = "auto",
    dtype: Numbers = DType.auto,
    model_name: Name = None,
    layers: Layers = None,
) -> None:
    """Which latents the adapter moves, by rank of their use, and how fast that decays."""
    from dspa.fsrl.plots import plot_usage
    from dspa.fsrl.usage import fit_decay, latent_usage

    given = _start(out, triples, first)
    lm, tokenizer, loaded = _load(model, _adapter(adapter, sae, layer, device), device, dtype)
    found = latent_usage(
        lm,
        loaded,
        _responses(lm, tokenizer, given, max_length),
        batch_tokens=batch_tokens,
        layers=layers,
        model_name=model_name,
    )
    names = ("rank", "latent", "share", "mean_abs")
    rows = [dict(zip(names, row, strict=True)) for row in found.rows()]
    _write(out / "usage.csv", rows, names)
    decay = fit_decay(found)
    _write(out / "decay.csv", [asdict(decay) | {"n_tokens": found.n_tokens, "n_latents": len(rows)}])
    plot_usage(found, decay, out / "usage.png")
    console.print(column_table(f"{len(rows)} latents are moved on {found.n_tokens} tokens", rows[:top], names))
    console.print(f"share = {decay.a:.4g} exp(-rank / {decay.tau:.4g}), R2 {decay.r2:.4f}, ranks 1 to {decay.last}")
    console.print(f"CSV and PNG: {out}")


def fraction(
    triples: Triples,
    model: Model,
    sae: SAE,
    adapter: Adapter,
    out: Out,
    fraction: Annotated[
        list[float] | None, typer.Option(help="Of a token's v, what is kept; may be given several times.")
    ] = None,
    beta: Beta = 10.0,
    gamma_beta_ratio: Gamma = 0.5,
    first: First = None,
    max_length: MaxLength = None,
    batch_tokens: BatchTokens = 8192,
    layer: Layer = None,
    device: Device = "auto",
    dtype: Numbers = DType.auto,
    model_name: Name = None,
    layers: Layers = None,
) -> None:
    """Loss, reward accuracy and win rate as only the largest v of each token are kept."""
    from dspa.fsrl.ablations import FRACTIONS, fraction_curve
    from dspa.fsrl.plots import plot_fractions

    given = _start(out, triples, first)
    lm, tokenizer, loaded = _load(model, _adapter(adapter, sae, layer, device), device, dtype)
    with loaded.attach(lm, layers=layers, model_name=model_name):
        curve = fraction_curve(
            lm,
            loaded,
            _responses(lm, tokenizer, given, max_length),
            fractions=fraction or FRACTIONS,
            beta=beta,
            gamma_beta_ratio=gamma_beta_ratio,
            batch_tokens=batch_tokens,
        )
    _write(out / "fraction.csv", curve.rows())
    plot_fractions(curve, out / "fraction.png")
    names = ("model", "fraction", "loss", "margin", "accuracy", "win_rate")
    console.print(column_table(f"{len(given)} triples", curve.rows(), names))
    console.print(f"CSV and PNG: {out}")


def mask(
    triples: Triples,
    model: Model,
    sae: SAE,
    adapter: Adapter,
    out: Out,
    latent: Annotated[list[int] | None, typer.Option(help="A latent to mask; may be given several times.")] = None,
    labels: Annotated[Path | None, typer.Option(help="Labels of latents, of which --category is masked.")] = None,
    category: Annotated[str | None, typer.Option(help="Of the labels: the category to mask.")] = None,
    rules: Rules = None,
    explainer: Explainer = None,
    n_random: Annotated[int, typer.Option(help="Random sets to compare with.", min=2)] = 20,
    seed: Annotated[int, typer.Option(help="Of the random sets.", min=0)] = 0,
    beta: Beta = 10.0,
    gamma_beta_ratio: Gamma = 0.5,
    first: First = None,
    max_length: MaxLength = None,
    batch_tokens: BatchTokens = 8192,
    layer: Layer = None,
    device: Device = "auto",
    dtype: Numbers = DType.auto,
    model_name: Name = None,
    layers: Layers = None,
) -> None:
    """What masking some latents costs, against random sets of as many that the adapter moves."""
    from dspa.fsrl.ablations import METRICS, check_latents, mask_effect
    from dspa.fsrl.plots import plot_masks
    from dspa.fsrl.usage import latent_usage
    from dspa.saes.labels import read_labels

    if bool(latent) == bool(labels) or bool(labels) != bool(category):
        raise ValueError(
            "What to mask is not told, or told twice; accepted: --latent, or --labels with --category (and --rules, "
            "--explainer)."
        )
    given = _start(out, triples, first)
    opened = _adapter(adapter, sae, layer, device)
    if labels is not None and category is not None:
        latent = read_labels(labels, opened.sae, rules=rules, explainer=explainer).of(category)
    check_latents(latent or [], opened.sae.d_sae)
    lm, tokenizer, loaded = _load(model, opened, device, dtype)
    responses = _responses(lm, tokenizer, given, max_length)
    with loaded.attach(lm, layers=layers, model_name=model_name):
        effect = mask_effect(
            lm,
            loaded,
            responses,
            latent or [],
            latent_usage(lm, loaded, responses, batch_tokens=batch_tokens, layers=layers, model_name=model_name),
            n_random=n_random,
            seed=seed,
            beta=beta,
            gamma_beta_ratio=gamma_beta_ratio,
            batch_tokens=batch_tokens,
        )
    compared = [asdict(effect.compare(metric)) for metric in METRICS]
    _write(out / "mask.csv", effect.rows())
    _write(out / "comparison.csv", compared)
    plot_masks(effect, out / "mask.png")
    moved = f"{len(effect.latents)} latents masked (of {effect.n_given} given, those that are moved)"
    console.print(column_table(f"{moved}, and {n_random} random sets", compared, tuple(compared[0])))
    console.print("low, high: 95 % interval of the mean of the random sets, Student's t.")
    console.print("percentile: of the given set among the random ones.")
    console.print(f"CSV and PNG: {out}")


def categories(
    triples: Triples,
    model: Model,
    sae: SAE,
    adapter: Adapter,
    labels: LabelFile,
    out: Out,
    rules: Rules = None,
    explainer: Explainer = None,
    hand: Annotated[
        Path | None, typer.Option(help="Labels by hand of some latents, to tell how good labels are.")
    ] = None,
    first: First = None,
    max_length: MaxLength = None,
    batch_tokens: BatchTokens = 8192,
    layer: Layer = None,
    device: Device = "auto",
    dtype: Numbers = DType.auto,
    model_name: Name = None,
    layers: Layers = None,
) -> None:
    """Share of the adapter's use by category of latents, and how good the labels are."""
    from dspa.fsrl.categories import category_shares
    from dspa.fsrl.plots import plot_categories
    from dspa.fsrl.usage import latent_usage
    from dspa.saes.labels import read_labels

    given = _start(out, triples, first)
    opened = _adapter(adapter, sae, layer, device)
    read = read_labels(labels, opened.sae, rules=rules, explainer=explainer)
    quality = NOT_MEASURED if hand is None else _agreement(read, read_labels(hand, opened.sae), out)
    lm, tokenizer, loaded = _load(model, opened, device, dtype)
    responses = _responses(lm, tokenizer, given, max_length)
    found = latent_usage(lm, loaded, responses, batch_tokens=batch_tokens, layers=layers, model_name=model_name)
    shares = category_shares(found, read)
    rows = [asdict(share) | {"label_quality": quality} for share in shares]
    _write(out / "categories.csv", rows)
    plot_categories(shares, quality, out / "categories.png")
    title = f"{len(read.categories)} of {read.d_sae} latents are labelled, {len(found.ranked)} are moved"
    console.print(column_table(title, rows, ("category", "n_latents", "latents", "active", "mass", "mass_enrichment")))
    style = "bold red" if hand is None else "bold"
    console.print(f"[{style}]Quality of the labels: {escape(quality)}[/{style}]")
    console.print(f"CSV and PNG: {out}")


def coherence(
    model: Model,
    sae: SAE,
    adapter: Adapter,
    file: Annotated[Path, typer.Option(help="Prompts: one a line, or JSON Lines with `prompt`.")],
    out: Out,
    chat: Annotated[bool, typer.Option("--chat", help="Put each prompt into the model's chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens a text, at most.", min=1)] = 200,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0)] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling and the bootstrap.", min=0)] = 0,
    batch_size: Annotated[int, typer.Option(help="Texts that are generated at once.", min=1)] = 16,
    batch_tokens: BatchTokens = 8192,
    layer: Layer = None,
    device: Device = "auto",
    dtype: Numbers = DType.auto,
    model_name: Name = None,
    layers: Layers = None,
) -> None:
    """Whether texts stay coherent: repetition, distinct n-grams, length, perplexity, without and with the adapter."""
    from dspa.data.prompts import read_prompts, tokenize_prompt
    from dspa.evaluate.coherence import METRICS, compare_texts
    from dspa.fsrl.plots import plot_coherence

    _make(out)
    texts = list(read_prompts(None, file))
    lm, tokenizer, loaded = _load(model, _adapter(adapter, sae, layer, device), device, dtype)
    prompts = [tokenize_prompt(tokenizer, text, chat)["input_ids"][0].tolist() for text in texts]
    with loaded.attach(lm, layers=layers, model_name=model_name):
        found = compare_texts(
            lm,
            tokenizer,
            loaded,
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            batch_size=batch_size,
            batch_tokens=batch_tokens,
        )
    rows = []
    for name, written, values in (
        ("base", found.base_texts, found.base),
        ("steered", found.steered_texts, found.steered),
    ):
        for n, text in enumerate(written):
            measured = {metric: float(values[metric][n]) for metric in METRICS}
            rows.append({"model": name, "prompt": texts[n], "text": text} | measured)
    _write(out / "texts.csv", rows)
    differences = [found.compare(metric, seed=seed) for metric in METRICS]
    compared = [asdict(each) for each in differences]
    _write(out / "coherence.csv", compared)
    plot_coherence(differences, out / "coherence.png")
    console.print(column_table(f"{len(texts)} prompts", compared, tuple(compared[0])))
    console.print("low, high: 95 % bootstrap interval of the mean paired difference. Perplexity: under the base model.")
    console.print(f"CSV and PNG: {out}")


COMMANDS: dict[str, Callable[..., None]] = {
    "usage": usage,
    "fraction": fraction,
    "mask": mask,
    "categories": categories,
    "coherence": coherence,
}


def _make(out: Path) -> None:
    """The folder, before the work."""
    if out.is_file() or not out.absolute().parent.is_dir():
        raise ValueError(f"--out is {out}; accepted: a folder, or one to make in a folder that exists.")
    out.mkdir(exist_ok=True)


def _start(out: Path, triples: Path, first: int | None) -> list[Triple]:
    """All triples, checked before a model is loaded."""
    from dspa.data.triples import load_triples

    _make(out)
    return list(islice(load_triples(triples), first))


def _adapter(path: Path, sae: str, layer: int | None, device: str) -> FSRLAdapter:
    from dspa.fsrl import FSRLAdapter

    return FSRLAdapter.load(path, load_sae(sae, layer, device_named(device)))


def _load(model: str, adapter: FSRLAdapter, device: str, dtype: DType) -> tuple[Any, Any, FSRLAdapter]:
    """Model and tokenizer, and the adapter with its SAE in the model's dtype."""
    lm, tokenizer = load_model(model, device, dtype)
    adapter.sae = adapter.sae.to(dtype=lm.dtype)
    return lm, tokenizer, adapter


def _responses(model: Any, tokenizer: Any, triples: Sequence[Triple], max_length: int | None) -> list[Response]:
    from dspa.evaluate.responses import responses_of

    return responses_of(model, tokenizer, triples, max_length)


def _agreement(labels: Labels, hand: Labels, out: Path) -> str:
    """Write and show how well labels agree with those by hand, and tell it in a line."""
    from dspa.saes.label_quality import compare_labels

    found = compare_labels(labels, hand)
    low, high = found.accuracy_interval()
    rows = [asdict(each) for each in found.per_category]
    summary = {
        "n": found.n,
        "accuracy": found.accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        "macro_f1": found.macro_f1,
        "mcc": found.mcc,
        "n_unlabelled": found.n_unlabelled,
    }
    _write(out / "quality.csv", [summary])
    _write(out / "quality_by_category.csv", rows)
    console.print(column_table("Labels beside labels by hand", rows, tuple(rows[0])))
    print_table("Agreement", {name: cell(value) for name, value in summary.items()})
    return (
        f"accuracy {found.accuracy:.3f} [{low:.3f}, {high:.3f}], macro F1 {found.macro_f1:.3f}, MCC {found.mcc:.3f}, "
        f"on {found.n} latents labelled by hand"
    )


def _write(path: Path, rows: Sequence[Mapping[str, object]], names: Sequence[str] = ()) -> None:
    """A CSV file; `names` are its columns where there may be no row."""
    from dspa.files import write_csv

    write_csv(path, rows, names)
