"""`dspa fsrl analyse usage | fraction | mask | categories | coherence`: what an adapter does, as CSV and PNG."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from dspa.cli.loading import load_adapter, load_model, make_folder
from dspa.cli.options import (
    FILES,
    AdapterOptions,
    OnRecordedModel,
    Options,
    RecordedModelOptions,
    SamplingOptions,
    with_options,
)
from dspa.cli.tables import cell, column_table, console, print_line, print_table, print_warning
from dspa.data.token_texts import quoted
from dspa.distributed import device_named
from dspa.errors import ModelError, refusal
from dspa.fsrl.config import USUAL_BETA, TrainingConfig

if TYPE_CHECKING:
    from dspa.data.triples import Triple
    from dspa.evaluate.responses import Response
    from dspa.fsrl.adapter import FSRLAdapter
    from dspa.fsrl.usage import Decay, Usage
    from dspa.saes.labels import Labels

# Columns of `quality_by_category.csv` that the terminal shows.
SHOWN_AGREEMENT = (
    "category",
    "n_hand",
    "n_label",
    "precision",
    "recall",
    "balanced_accuracy",
    "mcc",
    "corrected_share",
    "corrected_low",
    "corrected_high",
)
NOT_MEASURED = "NOT MEASURED (--hand FILE compares them with labels by hand)"


@dataclass(frozen=True)
class DataOptions:
    """Amount of triples to read, in all and per pass."""

    first: int | None = field(default=None, metadata={"help": "Use only the first N triples.", "min": 1})
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of prompt and response together to which a response is cut; by default the model's context."
        },
    )
    batch_tokens: int = field(default=8192, metadata={"help": "Tokens per forward pass of the model.", "min": 1})


@dataclass(frozen=True)
class LossOptions:
    """SimPO's loss, which is measured."""

    beta: float = field(default=USUAL_BETA["simpo"], metadata={"help": "SimPO's beta."})
    gamma_beta_ratio: float = field(
        default=TrainingConfig.gamma_beta_ratio, metadata={"help": "SimPO's margin gamma, as a fraction of beta."}
    )


Adapter = Annotated[AdapterOptions, Options("Adapter")]
Data = Annotated[DataOptions, Options("Data")]
Loss = Annotated[LossOptions, Options("Loss")]
Triples = Annotated[Path, typer.Argument(help=f"Preference triples, held out from training: {FILES}.")]
Out = Annotated[Path, typer.Option(help="Folder for CSV and PNG, made if there is none.")]
LabelFile = Annotated[Path, typer.Option(help="Labels of latents: a Neuronpedia export, or latents and categories.")]
Rules = Annotated[
    Path | None, typer.Option(help='JSON rules that map descriptions to categories: {"name": ["regex"]}.')
]
Explainer = Annotated[str | None, typer.Option(help="Use only the descriptions of this `explanationModelName`.")]


@with_options
def usage(
    triples: Triples,
    on: OnRecordedModel,
    adapter: Adapter,
    data: Data,
    out: Out,
    top: Annotated[int, typer.Option(help="Number of latents to list.", min=0)] = 10,
) -> None:
    """Show which latents the adapter moves, those it moves farthest first, and how fast their use decays with rank."""
    from dspa.fsrl.plots import plot_usage

    make_folder(out, ["usage.csv", "usage.png", "decay.csv"], [triples])
    held_out = _read(triples, data.first)
    model, tokenizer, loaded = _load(on, _adapter(adapter, on.device))
    measured = _usage(model, loaded, _responses(model, tokenizer, held_out, data.max_length, adapter.adapter), data, on)
    names = ("rank", "latent", "share", "mean_abs", "promotes")
    promoted = _promoted(loaded, model, tokenizer, measured, on)
    rows = [dict(zip(names, (*row, quoted(promoted.get(row[1], ()))), strict=True)) for row in measured.rows()]
    _write(out / "usage.csv", rows, names)
    console.print(column_table(f"{len(rows)} latents are moved on {measured.n_tokens} tokens", rows[:top], names))
    print_line("share: of tokens with v ≠ 0; mean_abs: mean of |v| over all tokens; promotes: by the logit lens.")
    decay = _decay(measured, out)
    plot_usage(measured, decay, out / "usage.png")
    print_line(f"CSV and PNG: {out}")


@with_options
def fraction(
    triples: Triples,
    on: OnRecordedModel,
    adapter: Adapter,
    data: Data,
    loss: Loss,
    out: Out,
    fraction: Annotated[
        list[float] | None,
        typer.Option(help="Share of the nonzero entries of each token's v to keep; may be given several times."),
    ] = None,
) -> None:
    """Measure loss, reward accuracy and win rate with only the largest entries of each token's v kept."""
    from dspa.fsrl.ablations import FRACTIONS, fraction_curve
    from dspa.fsrl.plots import plot_fractions

    make_folder(out, ["fraction.csv", "fraction.png"], [triples])
    held_out = _read(triples, data.first)
    model, tokenizer, loaded = _load(on, _adapter(adapter, on.device))
    with loaded.attach(model, **on.names):
        curve = fraction_curve(
            model,
            loaded,
            _responses(model, tokenizer, held_out, data.max_length, adapter.adapter),
            fractions=fraction or FRACTIONS,
            beta=loss.beta,
            gamma_beta_ratio=loss.gamma_beta_ratio,
            batch_tokens=data.batch_tokens,
        )
    _write(out / "fraction.csv", curve.rows())
    plot_fractions(curve, out / "fraction.png")
    names = ("model", "fraction", "loss", "margin", "accuracy", "win_rate")
    console.print(column_table(f"{len(held_out)} triples", curve.rows(), names))
    print_line(f"CSV and PNG: {out}")


@with_options
def mask(
    triples: Triples,
    on: OnRecordedModel,
    adapter: Adapter,
    data: Data,
    loss: Loss,
    out: Out,
    latent: Annotated[list[int] | None, typer.Option(help="Latent to mask; may be given several times.")] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Labels of latents that have the --category: as for categories.")
    ] = None,
    category: Annotated[str | None, typer.Option(help="Category of the labels whose latents are masked.")] = None,
    rules: Rules = None,
    explainer: Explainer = None,
    n_random: Annotated[int, typer.Option(help="Number of random sets to compare with.", min=2)] = 20,
    seed: Annotated[int, typer.Option(help="Seed of the random sets.", min=0)] = 0,
) -> None:
    """Measure what the adapter loses without some latents, compared with random sets of as many that it moves."""
    from dspa.fsrl.ablations import METRICS, check_latents, mask_effect
    from dspa.fsrl.plots import plot_masks
    from dspa.saes.labels import read_labels

    if bool(latent) == bool(labels) or bool(labels) != bool(category):
        raise ValueError("Say what to mask in exactly one way: --latent, or --labels with --category.")
    make_folder(out, ["mask.csv", "comparison.csv", "mask.png"], [triples, labels, rules])
    held_out = _read(triples, data.first)
    loaded = _adapter(adapter, on.device)
    if labels is not None and category is not None:
        latent = read_labels(labels, loaded.sae, rules=rules, explainer=explainer).of(category)
    check_latents(latent or [], loaded.sae.d_sae)
    model, tokenizer, loaded = _load(on, loaded)
    responses = _responses(model, tokenizer, held_out, data.max_length, adapter.adapter)
    with loaded.attach(model, **on.names):
        effect = mask_effect(
            model,
            loaded,
            responses,
            latent or [],
            _usage(model, loaded, responses, data, on),
            n_random=n_random,
            seed=seed,
            beta=loss.beta,
            gamma_beta_ratio=loss.gamma_beta_ratio,
            batch_tokens=data.batch_tokens,
        )
    compared = [asdict(effect.compare(metric)) for metric in METRICS]
    _write(out / "mask.csv", effect.rows())
    _write(out / "comparison.csv", compared)
    plot_masks(effect, out / "mask.png")
    moved = f"{len(effect.latents)} latents masked (of {effect.n_given} given, those that are moved)"
    console.print(column_table(f"{moved}, and {n_random} random sets", compared, tuple(compared[0])))
    console.print("low, high: 95 % interval of the mean of the random sets, Student's t.")
    console.print("percentile: of the given set among the random ones.")
    print_line(f"CSV and PNG: {out}")


@with_options
def categories(
    triples: Triples,
    on: OnRecordedModel,
    adapter: Adapter,
    data: Data,
    labels: LabelFile,
    out: Out,
    rules: Rules = None,
    explainer: Explainer = None,
    hand: Annotated[
        Path | None,
        typer.Option(help="Labels of some latents that were made by hand, to measure how good --labels are."),
    ] = None,
) -> None:
    """Show how the adapter's use is shared among categories of latents, and how good the labels are."""
    from dspa.fsrl.categories import category_shares
    from dspa.fsrl.plots import plot_categories
    from dspa.saes.labels import read_labels

    make_folder(
        out,
        ["categories.csv", "categories.png", "quality.csv", "quality_by_category.csv"],
        [triples, labels, rules, hand],
    )
    held_out = _read(triples, data.first)
    loaded = _adapter(adapter, on.device)
    labelled = read_labels(labels, loaded.sae, rules=rules, explainer=explainer)
    quality = NOT_MEASURED if hand is None else _agreement(labelled, read_labels(hand, loaded.sae), out)
    model, tokenizer, loaded = _load(on, loaded)
    measured = _usage(model, loaded, _responses(model, tokenizer, held_out, data.max_length, adapter.adapter), data, on)
    shares = category_shares(measured, labelled)
    rows = [asdict(share) | {"label_quality": quality} for share in shares]
    _write(out / "categories.csv", rows)
    plot_categories(shares, quality, out / "categories.png")
    title = f"{len(labelled.categories)} of {labelled.d_sae} latents are labelled, {len(measured.ranked)} are moved"
    console.print(column_table(title, rows, ("category", "n_latents", "latents", "active", "mass", "mass_enrichment")))
    style = "bold red" if hand is None else "bold"
    console.print(Text(f"Quality of the labels: {quality}", style=style))
    print_line(f"CSV and PNG: {out}")


@with_options
def coherence(
    on: OnRecordedModel,
    adapter: Adapter,
    file: Annotated[Path, typer.Option(help=f"Prompts: text, one per line, or {FILES} with `prompt`.")],
    out: Out,
    sampling: Annotated[SamplingOptions, Options("Sampling", without=["top_p"])],
    data: Annotated[DataOptions, Options("Data", without=["first", "max_length"])],
    batch_size: Annotated[int, typer.Option(help="Number of texts to generate at once.", min=1)] = 16,
) -> None:
    """Compare texts without and with the adapter: repetition, distinct n-grams, length, perplexity under the base.

    The seed of the sampling is also that of the bootstrap.
    """
    from dspa.data.prompts import read_prompts, tokenize_prompt
    from dspa.evaluate.coherence import METRICS, compare_texts
    from dspa.fsrl.plots import plot_coherence
    from dspa.fsrl.training import trained_template

    if sampling.seed < 0:
        raise refusal(ValueError, "--seed", sampling.seed, "a whole number >= 0")
    make_folder(out, ["texts.csv", "coherence.csv", "coherence.png"], [file])
    texts = list(read_prompts(None, file))
    model, tokenizer, loaded = _load(on, _adapter(adapter, on.device))
    kwargs = trained_template(tokenizer, adapter.adapter)[1] if sampling.chat else None
    prompts = [tokenize_prompt(tokenizer, text, sampling.chat, kwargs) for text in texts]
    with loaded.attach(model, **on.names):
        measured = compare_texts(
            model,
            tokenizer,
            loaded,
            prompts,
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            seed=sampling.seed,
            batch_size=batch_size,
            batch_tokens=data.batch_tokens,
        )
    rows = []
    for name, written, values in (
        ("base", measured.base_texts, measured.base),
        ("steered", measured.steered_texts, measured.steered),
    ):
        for n, text in enumerate(written):
            metrics = {metric: float(values[metric][n]) for metric in METRICS}
            rows.append({"model": name, "prompt": texts[n], "text": text} | metrics)
    _write(out / "texts.csv", rows)
    changes = [measured.compare(metric, seed=sampling.seed) for metric in METRICS]
    compared = [asdict(change) for change in changes]
    _write(out / "coherence.csv", compared)
    plot_coherence(changes, out / "coherence.png")
    console.print(column_table(f"{len(texts)} prompts", compared, tuple(compared[0])))
    console.print("low, high: 95 % bootstrap interval of the mean paired difference. Perplexity: under the base model.")
    print_line(f"CSV and PNG: {out}")


COMMANDS: dict[str, Callable[..., None]] = {
    "usage": usage,
    "fraction": fraction,
    "mask": mask,
    "categories": categories,
    "coherence": coherence,
}


def _read(triples: Path, first: int | None) -> list[Triple]:
    """Return all triples, checked before a model is loaded."""
    from dspa.data.triples import load_triples

    return list(islice(load_triples(triples), first))


def _adapter(options: AdapterOptions, device: str) -> FSRLAdapter:
    """Load an adapter and its SAE."""
    return load_adapter(options.adapter, options, device_named(device))


def _load(options: RecordedModelOptions, adapter: FSRLAdapter) -> tuple[Any, Any, FSRLAdapter]:
    """Load model and tokenizer, and bring the adapter's SAE to the model's dtype."""
    model, tokenizer = load_model(options, adapter.trained_on)
    adapter.sae = adapter.sae.to(dtype=model.dtype)
    return model, tokenizer, adapter


def _responses(
    model: Any, tokenizer: Any, triples: Sequence[Triple], max_length: int | None, adapter: Path
) -> list[Response]:
    """Return the responses of triples, whose chat template is as in the training of the adapter."""
    from dspa.evaluate.responses import responses_of
    from dspa.fsrl.training import trained_template

    dated, kwargs = trained_template(tokenizer, adapter)
    return responses_of(model, dated, triples, max_length, kwargs)


def _usage(
    model: Any, adapter: FSRLAdapter, responses: Sequence[Response], data: DataOptions, on: RecordedModelOptions
) -> Usage:
    from dspa.fsrl.usage import latent_usage

    return latent_usage(
        *(model, adapter, responses), batch_tokens=data.batch_tokens, layers=on.layers, model_name=on.model_name
    )


def _promoted(
    adapter: FSRLAdapter, model: Any, tokenizer: Any, usage: Usage, on: RecordedModelOptions
) -> dict[int, list[str]]:
    """Return the tokens that the moved latents promote; nothing, with a warning, where the model does not show them."""
    from dspa.saes.meanings import top_tokens

    given: dict[str, Any] = {"layers": on.layers, "model_name": on.model_name, "progress": True}
    try:
        return top_tokens(adapter.sae, model, tokenizer, usage.ranked.tolist(), **given)
    except ModelError as error:
        print_warning(f"It is not shown what the latents promote. {error}")
        return {}


def _decay(usage: Usage, out: Path) -> Decay | None:
    """Write and show the decay of use with rank, or warn why there is none."""
    from dspa.fsrl.usage import fit_decay

    try:
        decay = fit_decay(usage)
    except ValueError as error:
        print_warning(f"No decay is fitted. {error}")
        (out / "decay.csv").unlink(missing_ok=True)
        return None
    _write(out / "decay.csv", [asdict(decay) | {"n_tokens": usage.n_tokens, "n_latents": decay.last}])
    console.print(
        f"share = {decay.a:.4g} exp(-rank / {decay.tau:.4g}), R2 {decay.r2:.4f}, ranks 1 to {decay.last} by share"
    )
    return decay


def _agreement(labels: Labels, hand: Labels, out: Path) -> str:
    """Write and show how well labels agree with those by hand, and return it in one line."""
    from dspa.saes.label_quality import compare_labels

    agreement = compare_labels(labels, hand)
    low, high = agreement.accuracy_interval()
    mcc_low, mcc_high = agreement.mcc_interval()
    rows = [asdict(category) for category in agreement.per_category]
    summary = {
        "n": agreement.n,
        "accuracy": agreement.accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        "macro_f1": agreement.macro_f1,
        "mcc": agreement.mcc,
        "mcc_low": mcc_low,
        "mcc_high": mcc_high,
        "n_unlabelled": agreement.n_unlabelled,
    }
    _write(out / "quality.csv", [summary])
    _write(out / "quality_by_category.csv", rows)
    console.print(column_table("Labels compared with labels by hand", rows, SHOWN_AGREEMENT))
    print_table("Agreement", {name: cell(value) for name, value in summary.items()})
    return (
        f"accuracy {agreement.accuracy:.3f} [{low:.3f}, {high:.3f}], macro F1 {agreement.macro_f1:.3f}, "
        f"MCC {agreement.mcc:.3f} [{mcc_low:.3f}, {mcc_high:.3f}], on {agreement.n} latents labelled by hand"
    )


def _write(path: Path, rows: Sequence[Mapping[str, object]], names: Sequence[str] = ()) -> None:
    """Write a CSV file; `names` are its columns where there may be no row."""
    from dspa.files import write_csv

    write_csv(path, rows, names)
