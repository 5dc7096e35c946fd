"""`dspa fsrl analyse report`: the report of an audit on what an adapter moves."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from dspa.cli.audit import BATCH_SIZE, N_TOKENS, evidence_of, meanings
from dspa.cli.fsrl_analyse import Adapter, Explainer
from dspa.cli.generate import warn_of_other_template
from dspa.cli.loading import load_adapter, load_model, make_folder, open_judge
from dspa.cli.options import (
    FILES,
    ChatTemplateKwargs,
    JudgedBy,
    OnRecordedModel,
    Options,
    SamplingOptions,
    changed,
    check_used,
    with_options,
)
from dspa.cli.tables import print_line
from dspa.distributed import device_named


@with_options
def report(
    prompts: Annotated[
        Path,
        typer.Argument(
            help=f"Prompts to answer with and without the adapter. Text, one per line, or {FILES} with `prompt`."
        ),
    ],
    on: OnRecordedModel,
    adapter: Adapter,
    out: Annotated[
        Path, typer.Option(help="Folder for report.html, audit.json and latents.csv, made if there is none.")
    ],
    sampling: Annotated[SamplingOptions, Options("Sampling")],
    judged: JudgedBy,
    texts: Annotated[
        Path | None,
        typer.Option(help="Also show where in this file latents are strongest, and how often, as for `dspa audit`."),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Labels of latents: a Neuronpedia export, or categories in JSON.")
    ] = None,
    explainer: Explainer = None,
    hand: Annotated[
        Path | None,
        typer.Option(help="Categories of some latents by hand, to measure how good those of the judge are."),
    ] = None,
    top: Annotated[int, typer.Option(help="Number of latents per group: raised, lowered and random ones.", min=1)] = 50,
    contexts: Annotated[int, typer.Option(help="Number of contexts per latent.", min=1)] = 10,
    n_tokens: Annotated[
        int | None,
        typer.Option("--tokens", help=f"Tokens of --texts to read, from its start; by default {N_TOKENS:,}.", min=1),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Number of prompts that are answered together.", min=1)] = BATCH_SIZE,
    chat_template_kwargs: ChatTemplateKwargs = None,
) -> None:
    """Report which latents an adapter moves in texts, how often and how far, and what they stand for.

    The report is that of `dspa audit`: one HTML file with the latents that the adapter raises and lowers most, random
    active ones as a control, and texts with and without it in which moved tokens are marked. --texts adds evidence, and
    --judge explanations.

    For example: `dspa fsrl analyse report prompts.txt --adapter adapter --texts texts.txt --out report`
    """
    from dspa.audit.judged import folded
    from dspa.audit.moves import AdapterMoves, moved_latents
    from dspa.audit.record import audit_of
    from dspa.audit.report import FILES as WRITTEN
    from dspa.audit.report import write_report
    from dspa.audit.samples import sample_texts
    from dspa.audit.words import summary
    from dspa.data.prompts import read_prompt_file, tokenize_prompt
    from dspa.data.texts import TextFile
    from dspa.fsrl.training import trained_template
    from dspa.saes.labels import read_descriptions, read_explanations, read_labels

    check_used("--texts", texts, ["--tokens"] * bool(n_tokens) + changed(judged))
    check_used("--labels", labels, ["--explainer"] * bool(explainer))
    judge = open_judge(judged, out)
    check_used("--judge", judge, ["--hand"] * bool(hand))
    files = {"texts": texts, "prompts": prompts, "labels": labels, "hand": hand}
    make_folder(out, WRITTEN, [adapter.adapter, *files.values()])
    asked, file = read_prompt_file("PROMPTS", prompts), None if texts is None else TextFile(texts)
    loaded = load_adapter(adapter.adapter, adapter, device_named(on.device))
    described = {} if labels is None else read_descriptions(labels, loaded.sae, explainer=explainer)
    given = None if labels is None else read_explanations(labels, loaded.sae, explainer=explainer)
    by_hand = None if hand is None else folded(read_labels(hand, loaded.sae))
    model, tokenizer = load_model(on, loaded.trained_on)
    loaded.sae = loaded.sae.to(dtype=model.dtype)
    options = asdict(sampling) | {"batch_size": batch_size}
    if chat := options.pop("chat"):
        warn_of_other_template([("--adapter", trained_template(tokenizer, adapter.adapter)[1])], chat_template_kwargs)
    encode = partial(tokenize_prompt, tokenizer, chat=chat, chat_template_kwargs=chat_template_kwargs)
    with loaded.attach(model, **on.names):
        moves = AdapterMoves(model, loaded, tokenizer, layers=on.layers)
        samples, edits = sample_texts(*(model, tokenizer, loaded, moves.of, asked, encode), progress=True, **options)
    groups = moved_latents(edits, moves.active, top, seed=sampling.seed)
    known: dict[str, Any] = meanings(model, tokenizer, loaded.sae, groups, on)
    if file is not None:
        read: dict[str, Any] = {"n": contexts, "n_tokens": n_tokens or N_TOKENS, "seed": sampling.seed}
        known |= evidence_of(model, tokenizer, loaded.sae, groups, file, on, judge, given, by_hand, **read)
    made = audit_of(
        None,
        groups,
        title=adapter.adapter.name,
        settings={name: str(path) for name, path in files.items() if path}
        | {"adapter": str(adapter.adapter), "layer": loaded.layer, "latents of the SAE": loaded.sae.d_sae}
        | asdict(loaded.config)
        | asdict(sampling)
        | ({} if judge is None else {"judge": judge.model, "parameters of the judge": json.dumps(judge.parameters)}),
        labels=described,
        edits=edits,
        samples=samples,
        **known,
    )
    write_report(made, out)
    for sentence in summary(made):
        print_line(sentence)
    print_line(f"Report: {out / 'report.html'}")
