"""`dspa map show`: a report on a map, and what its latents mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from dspa.cli.loading import check_writable, described_latents, load_made_with
from dspa.cli.options import FILES, Options, RecordedModelOptions, RecordedSAEPairOptions, with_options
from dspa.cli.tables import console, print_figures, print_line, print_warning
from dspa.data.token_texts import quoted
from dspa.errors import refusal

if TYPE_CHECKING:
    from dspa.audit.evidence import Context
    from dspa.maps.cdmap import ConditionalDifferenceMap
    from dspa.maps.reports import Column, Row

N_TOKENS = 100_000
Plot = Annotated[Path | None, typer.Option(help="Write a plot here, as PNG.")]


@with_options
def map_show(
    path: Annotated[Path, typer.Argument(help="Map to show.")],
    on: Annotated[RecordedModelOptions, Options("Model and SAEs, for --texts and maps without tokens")],
    pair: Annotated[RecordedSAEPairOptions, Options("Model and SAEs, for --texts and maps without tokens")],
    top: Annotated[
        int, typer.Option(help="Number of output latents to list at each end, and of input latents.", min=0)
    ] = 10,
    delta: Annotated[
        float, typer.Option(help="Level of the confidence radius of rows: 0.05 for 95 % confidence.")
    ] = 0.05,
    labels: Annotated[
        Path | None,
        typer.Option(help="Labels of the output SAE's latents: a Neuronpedia export, or categories in JSON."),
    ] = None,
    explainer: Annotated[
        str | None, typer.Option(help="Use only the descriptions of this `explanationModelName`.")
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(
            help="Also show where in this file the listed latents are strongest; it is read by the model. Text, one "
            f"document per line; {FILES} with `text`; or preference triples."
        ),
    ] = None,
    n_tokens: Annotated[
        int | None,
        typer.Option("--tokens", help=f"Tokens of --texts to read, from its start; by default {N_TOKENS:,}.", min=1),
    ] = None,
    plot: Plot = None,
) -> None:
    """Show what a map was made from, how sure its rows are, and which latents it moves most.

    Each line says what its figure means, and warnings say what to do. Latents come with the tokens that they promote
    most, by the logit lens, as the map records them. With --model they are computed, also for maps without them.

    For example: `dspa map show map.dspa.safetensors --plot map.png`
    """
    from dspa.maps.cdmap import ConditionalDifferenceMap
    from dspa.maps.reports import origin, places, summary, top_columns, top_rows, warnings

    read = {"the map": path, "--labels": labels, "--texts": texts, "--model": on.model}
    check_writable("--plot", plot, read | {"--sae-in": pair.sae_in, "--sae-out": pair.sae_out})
    if not 0 < delta < 1:
        raise refusal(ValueError, "--delta", delta, "a number between 0 and 1")
    if n_tokens is not None and texts is None:
        raise refusal(ValueError, "--tokens", f"{n_tokens} without --texts", "both, or neither")
    cdmap = ConditionalDifferenceMap.load(path)
    described = described_latents(labels, cdmap.meta, explainer)
    augmented, ablated = top_columns(cdmap, top)
    rows = top_rows(cdmap, top)
    listed = {
        "sae_in": [row.latent for row in rows],
        "sae_out": list(dict.fromkeys([*(c.latent for c in (*augmented, *ablated)), *(row.column for row in rows)])),
    }
    contexts = {}
    if texts is not None or on != RecordedModelOptions() or pair != RecordedSAEPairOptions():
        contexts = _read_meanings(cdmap, listed, on, pair, texts, n_tokens or N_TOKENS)
    print_figures(f"{path}", [*origin(cdmap.meta), *places(cdmap)])
    print_figures("What it holds", summary(cdmap, delta))
    promoted = cdmap.promoted.get("sae_out", {})
    for title, columns in (("most augmented", augmented), ("most ablated", ablated)):
        if columns:
            _print_columns(title, columns, promoted, described)
    if rows:
        _print_rows(rows, cdmap.promoted, described)
    for title, name in (("Output", "sae_out"), ("Input", "sae_in")):
        if contexts.get(name):
            _print_contexts(f"{title} latents, where they are strongest in {texts}", contexts[name])
    if not promoted:
        print_line("This map does not record which tokens its latents promote; --model shows them.")
    for text in warnings(cdmap):
        print_warning(text)
    if plot is not None:
        from dspa.maps.plots import plot_map

        plot_map(cdmap, plot, delta=delta)
        print_line(f"Plot: {plot}")


def _read_meanings(
    cdmap: ConditionalDifferenceMap,
    listed: Mapping[str, Sequence[int]],
    on: RecordedModelOptions,
    pair: RecordedSAEPairOptions,
    texts: Path | None,
    n_tokens: int,
) -> dict[str, dict[int, list[Context]]]:
    """Put the tokens that latents promote into a map, and return where in `texts` they are strongest."""
    from dspa.audit.evidence import top_contexts
    from dspa.data.texts import TextFile
    from dspa.saes.meanings import top_tokens

    file = None if texts is None else TextFile(texts)
    model, tokenizer, saes = load_made_with(cdmap, on, pair)
    contexts = {}
    for (name, latents), sae in zip(listed.items(), saes, strict=True):
        given: dict[str, Any] = {"layers": on.layers, "model_name": on.model_name}
        cdmap.promoted[name] = top_tokens(sae, model, tokenizer, cdmap.latents()[name], **given)
        if file is not None:
            contexts[name] = top_contexts(sae, model, tokenizer, file, latents, n_tokens=n_tokens, **given)
    return contexts


def _print_contexts(title: str, contexts: Mapping[int, Sequence[Context]]) -> None:
    """Print where latents are strongest, each token within `**`."""
    table = Table("latent", "value", "context", title=title)
    for latent, strongest in contexts.items():
        for n, context in enumerate(strongest):
            text = f"{context.before}**{context.token}**{context.after}".replace("\n", "\\n")
            table.add_row("" if n else str(latent), f"{context.value:.4g}", text)
        if not strongest:
            table.add_row(str(latent), "", "not active there")
    console.print(table)


def _print_rows(
    rows: Sequence[Row], promoted: Mapping[str, Mapping[int, Sequence[str]]], described: Mapping[int, str]
) -> None:
    """Print some rows of a map, with what is known of their latents."""
    table = Table(title="Input latents with the largest entries of A, and the output latents that these move")
    for name in ("latent", "promotes", "prompts", "entry", "output latent"):
        table.add_column(name, justify="left" if name in ("promotes", "output latent") else "right")
    for row in rows:
        tokens, moved = (
            quoted(promoted.get(name, {}).get(latent, ()))
            for name, latent in (("sae_in", row.latent), ("sae_out", row.column))
        )
        moved = f"{row.column} {moved} {described.get(row.column, '')}"
        table.add_row(str(row.latent), tokens, str(row.n_open), f"{row.value:+.4g}", moved)
    console.print(table)


def _print_columns(
    title: str, columns: Sequence[Column], promoted: Mapping[int, Sequence[str]], described: Mapping[int, str]
) -> None:
    """Print some columns of a map, with what is known of their latents."""
    table = Table(title=f"Output latents that are {title}, by column sum of A")
    for name in ("latent", "column sum", "rows"):
        table.add_column(name, justify="right")
    meanings = {"promotes": {latent: quoted(texts) for latent, texts in promoted.items()}, "label": described}
    for name, known in meanings.items():
        if known:
            table.add_column(name)
    for column in columns:
        meaning = (texts.get(column.latent, "") for texts in meanings.values() if texts)
        table.add_row(str(column.latent), f"{column.total:+.4g}", str(column.n_rows), *meaning)
    console.print(table)
