"""`dspa personal`: personas, which ablate the latents that serve a reader's taste."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dspa.cli.generate import warn_of_other_template
from dspa.cli.loading import check_writable, load_made_with
from dspa.cli.options import (
    FILES,
    ChatTemplateKwargs,
    OnRecordedModel,
    RecordedSAEPair,
    messages_of_options,
    with_options,
)
from dspa.cli.tables import column_table, console, print_line, print_next
from dspa.errors import refusal
from dspa.outputs import write_atomically

if TYPE_CHECKING:
    from dspa.evaluate.style import StyleAxis
    from dspa.maps.cdmap import ConditionalDifferenceMap
    from dspa.personal.persona import Persona

HELP = """Personas: answers to the taste of a reader, by ablating SAE latents that were measured to move their style.

Measure once what the ablation of each latent does to axes of style (`effects`). Then any weights of the axes make a
persona (`make`), a small file that `dspa generate` and `dspa compare` take, with a map or without.
"""
app = typer.Typer(help=HELP, no_args_is_help=True)
# Latents per axis and direction that are shown.
SHOWN = 3
Axes = Annotated[
    Path | None,
    typer.Option("--counters", help="Axes of style, by rules in a JSON file as for `dspa compare`; by default ours."),
]


@app.command()
@with_options
def effects(
    prompts: Annotated[
        Path,
        typer.Argument(
            help=f"Prompts: text, one per line, or {FILES} with `prompt`, as text or messages, such as triples."
        ),
    ],
    map_path: Annotated[
        Path, typer.Option("--map", help="Map that gives the model, its output SAE and candidates to measure.")
    ],
    out: Annotated[
        Path, typer.Option(help="File of the effects, JSON Lines; the same command continues a stopped measurement.")
    ],
    on: OnRecordedModel,
    pair: RecordedSAEPair,
    candidates: Annotated[
        int, typer.Option(help="Latents to measure: half with the largest column sums, half with the smallest.", min=1)
    ] = 40,
    latent: Annotated[
        list[int] | None,
        typer.Option(help="Latent to measure, in place of `--candidates`. May be given several times."),
    ] = None,
    alpha: Annotated[
        float, typer.Option(help="Strength of the ablation; 1 sets a latent to 0 wherever it is active.", min=0)
    ] = 1.0,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Largest number of tokens per answer; by default 200.", min=1)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Number of answers that are generated together.", min=1)] = 16,
    chat: Annotated[
        bool, typer.Option(help="Put prompts that are text into the model's chat template, as a user's turn.")
    ] = False,
    csv: Annotated[
        Path | None, typer.Option(help="Also write mean changes and standard errors here, one line per latent.")
    ] = None,
    counters: Axes = None,
    chat_template_kwargs: ChatTemplateKwargs = None,
) -> None:
    """Measure what the ablation of each candidate latent does to the style of answers.

    The model answers every prompt by greedy decoding, as it is and with each latent alone ablated. Answers are kept, so
    that other axes need no other measurement.
    """
    from dspa.data.prompts import read_prompt_file
    from dspa.evaluate.compare.prompts import encode
    from dspa.files import write_csv
    from dspa.maps.cdmap import ConditionalDifferenceMap
    from dspa.personal.effects import measure_effects

    read = {"PROMPTS": prompts, "--map": map_path, "--counters": counters}
    check_writable("--out", out, read)
    check_writable("--csv", csv, read | {"--out": out})
    axes = _axes(counters)
    texts = read_prompt_file("PROMPTS", prompts)
    cdmap = ConditionalDifferenceMap.load(map_path)
    chosen = _candidates(cdmap, candidates) if latent is None else latent
    if outside := [one for one in chosen if not 0 <= one < cdmap.meta.d_sae_out]:
        raise refusal(ValueError, "--latent", outside[0], f"0 to {cdmap.meta.d_sae_out - 1}, latents of the output SAE")
    model, tokenizer, (_, sae) = load_made_with(cdmap, on, pair)
    if chat or not all(isinstance(text, str) for text in texts):
        warn_of_other_template([("--map", cdmap.meta.chat_template_kwargs)], chat_template_kwargs)
    with messages_of_options({"alpha": "--alpha", "max_new_tokens": "--max-new-tokens", "prompts": "PROMPTS"}):
        measured = measure_effects(
            *(model, tokenizer, sae, texts),
            lambda prompt: encode(tokenizer, prompt, "", chat=chat, chat_template_kwargs=chat_template_kwargs),
            *(chosen, out),
            alpha=alpha,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            layers=on.layers,
            model_name=on.model_name,
        )
    rows = measured.summary(axes)
    if csv is not None:
        write_csv(csv, rows)
    _print_effects(rows, axes, len(texts))
    print_line(f"Answers: {out}")
    print_next("personal", "make", out, "--weight", f"{next(iter(axes))}=1", "--out", "mine.persona")


def _candidates(cdmap: ConditionalDifferenceMap, n: int) -> list[int]:
    """Return the columns of a map with the largest and with the smallest sums, about half of each."""
    from dspa.maps.reports import top_columns

    largest, smallest = top_columns(cdmap, n)
    return [column.latent for column in (*largest[: n - n // 2], *smallest[: n // 2])]


def _axes(path: Path | None) -> dict[str, StyleAxis]:
    """Return the axes of --counters."""
    from dspa.evaluate.style import style_axes

    axes = style_axes(path)
    if not axes:
        raise refusal(ValueError, "--counters", f"{path}, a file without axes", "a file of rules with `axes`")
    return axes


def _print_effects(rows: Sequence[Mapping[str, float]], axes: Iterable[str], n_prompts: int) -> None:
    """Print the latents that move each axis most, either way."""

    def extreme(axis: str, sign: int) -> str:
        order = sorted((row for row in rows if sign * row[axis] > 0), key=lambda row: -sign * row[axis])
        return "\n".join(f"{row['latent']}: {row[axis]:+.3f} ± {row[f'{axis}_error']:.3f}" for row in order[:SHOWN])

    shown = [{"axis": axis, "raised most": extreme(axis, 1), "lowered most": extreme(axis, -1)} for axis in axes]
    title = f"Ablated latents that move each axis, mean over {n_prompts} prompts ± standard error"
    console.print(column_table(title, shown, ["axis", "raised most", "lowered most"]))


@app.command()
@with_options
def shots(
    prompts: Annotated[
        Path,
        typer.Argument(
            help=f"Prompts: text, one per line, or {FILES} with `prompt`, as text or messages, such as triples."
        ),
    ],
    examples: Annotated[
        Path, typer.Option(help=f"Prompts with answers that the reader likes: preference triples, {FILES}.")
    ],
    out: Annotated[Path, typer.Option(help="File of prompts to write, JSON Lines of messages.")],
    k: Annotated[int, typer.Option("--shots", help="Number of examples per prompt.", min=1)] = 5,
) -> None:
    """Put the examples most like each prompt before it, as earlier turns of a conversation.

    Likeness is the cosine of TF-IDF vectors of the prompts, and the chosen responses are the answers. `dspa compare`
    takes the prompts, so that a persona can be combined with few-shot examples.
    """
    from dspa.data.prompts import read_prompt_file
    from dspa.data.triples import load_triples
    from dspa.personal.shots import Examples, examples_of

    check_writable("--out", out, {"PROMPTS": prompts, "--examples": examples})
    texts = read_prompt_file("PROMPTS", prompts)
    known = Examples(examples_of(load_triples(examples)))
    lines = [json.dumps({"prompt": known.shown(text, k)}) + "\n" for text in texts]
    write_atomically(out, "".join(lines).encode())
    print_line(f"Written to {out}: {len(lines)} prompts, {min(k, len(known.examples))} examples before each.")
    print_next("compare", out, "--persona", "PERSONA")


@app.command()
@with_options
def make(
    effects_path: Annotated[Path, typer.Argument(metavar="EFFECTS", help="File that dspa personal effects wrote.")],
    out: Annotated[Path, typer.Option(help="File of the persona to write.")],
    weight: Annotated[
        list[str] | None,
        typer.Option(metavar="AXIS=NUMBER", help="Weight of an axis, below 0 for its other pole. Several times."),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Weights in a JSON file in place of `--weight`: numbers by axis.")
    ] = None,
    top: Annotated[
        int, typer.Option(help="Largest number of latents to ablate, those of the largest gains.", min=1)
    ] = 5,
    unconstrained: Annotated[
        bool, typer.Option(help="Ablate all latents of a positive gain, in place of `--top`.")
    ] = False,
    counters: Axes = None,
) -> None:
    """Make a persona from weights of the axes: what a reader likes.

    Its gain from a latent is the weighted sum of the mean changes of the axes. For example, for a reader who likes it
    short and formal:

    `dspa personal make effects.jsonl --weight conciseness=1 --weight friendliness=-1 --out brief.persona`
    """
    from dspa.personal.effects import Effects
    from dspa.personal.persona import Persona, read_weights

    check_writable("--out", out, {"EFFECTS": effects_path, "--weights": weights, "--counters": counters})
    if (weight is None) == (weights is None):
        got = "missing" if weight is None else "given together with --weights"
        raise refusal(ValueError, "--weight", got, "one --weight or more, or a file of --weights")
    given = read_weights(weights) if weights is not None else dict(map(_weight, weight or []))
    if weight is not None and len(given) < len(weight):
        raise refusal(ValueError, "--weight", "one axis twice", "different axes")
    persona = Persona.of(Effects.read(effects_path), _axes(counters), given, top=None if unconstrained else top)
    persona.save(out)
    print_gains(persona)
    print_line(f"Written to {out}.")
    print_next("generate", "--persona", out, "--prompt", "How do I ...")


def _weight(text: str) -> tuple[str, float]:
    """Return the axis and the number of one --weight."""
    axis, _, number = text.partition("=")
    try:
        return axis.strip(), float(number)
    except ValueError:
        raise refusal(ValueError, "--weight", repr(text), "AXIS=NUMBER, such as conciseness=1") from None


def print_gains(persona: Persona) -> None:
    """Print the latents that a persona ablates, with their gains."""
    gains = persona.gains
    rows = [
        {"latent": latent, "gain": f"{gains[latent][0]:+.4f}", "standard error": f"{gains[latent][1]:.4f}"}
        for latent in persona.latents
    ]
    title = f"Latents that the persona ablates, of {len(gains)} measured on {persona.record.n_prompts} prompts"
    console.print(column_table(title, rows, ["latent", "gain", "standard error"]))
