"""`dspa audit`: a report on what a map edits, and what the edited latents stand for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dspa.cli.generate import warn_of_other_template
from dspa.cli.loading import described_latents, latent_space, load_made_with, make_folder, open_judge
from dspa.cli.options import (
    FILES,
    ChatTemplateKwargs,
    JudgedBy,
    OnRecordedModel,
    Options,
    RecordedModelOptions,
    RecordedSAEPair,
    RecordedSAEPairOptions,
    SamplingOptions,
    changed,
    check_used,
    with_options,
)
from dspa.cli.tables import print_line
from dspa.config import SteeringConfig
from dspa.errors import LabelError

if TYPE_CHECKING:
    from dspa.audit.edits import TextEdits
    from dspa.audit.evidence import Evidence
    from dspa.audit.record import Sample
    from dspa.data.messages import Text
    from dspa.data.texts import TextFile
    from dspa.judges.judge import Judge
    from dspa.maps.cdmap import ConditionalDifferenceMap
    from dspa.saes.frozen import FrozenSAE
    from dspa.saes.labels import Explanation, Labels
    from dspa.steering.dspa import Steering

N_TOKENS = 200_000
# Tokens per latent that the logit lens shows.
N_PROMOTED = 8
# Random contexts per latent, with it and without it, for the scores of explanations. Half of them are shown.
N_SAMPLE = 100
BATCH_SIZE = 16


@with_options
def audit(
    map_path: Annotated[Path, typer.Option("--map", help="Map to audit, a file that dspa map build wrote.")],
    out: Annotated[
        Path, typer.Option(help="Folder for report.html, audit.json and latents.csv, made if there is none.")
    ],
    on: OnRecordedModel,
    pair: RecordedSAEPair,
    config: Annotated[SteeringConfig, Options("Steering of --prompts", without=["ridge", "delta"])],
    sampling: Annotated[SamplingOptions, Options("Sampling for --prompts")],
    judged: JudgedBy,
    trace: Annotated[
        Path | None,
        typer.Option(help="Edits to audit, which dspa generate --trace wrote; by default those of --prompts."),
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(
            help="Also show where in this file latents are strongest, and how often they are active. Text, one "
            f"document per line; {FILES} with `text`; or preference triples."
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Answer these prompts with and without steering, and show the texts with their edits. Text, one per "
            f"line, or {FILES} with `prompt`."
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(help="Labels of the output SAE's latents: a Neuronpedia export, or categories in JSON."),
    ] = None,
    explainer: Annotated[
        str | None, typer.Option(help="Use only the descriptions of this `explanationModelName`.")
    ] = None,
    hand: Annotated[
        Path | None,
        typer.Option(help="Categories of some latents by hand, to measure how good those of the judge are."),
    ] = None,
    top: Annotated[
        int, typer.Option(help="Number of latents per group: largest and smallest columns, and random ones.", min=1)
    ] = 50,
    contexts: Annotated[int, typer.Option(help="Number of contexts per latent.", min=1)] = 10,
    n_tokens: Annotated[
        int | None,
        typer.Option("--tokens", help=f"Tokens of --texts to read, from its start; by default {N_TOKENS:,}.", min=1),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(help="Number of --prompts that are answered together.", min=1)
    ] = BATCH_SIZE,
    chat_template_kwargs: ChatTemplateKwargs = None,
) -> None:
    """Report which latents a map edits, how often and how far, and what they stand for.

    The report is one HTML file that opens in any browser, without a network. It holds the columns of the map with the
    largest and the smallest sums, random latents as a control, and what else was edited: in the texts of a trace, or in
    those that the model writes after --prompts. --texts adds the evidence that needs no labels: where each latent is
    strongest, and how often it is active. With --judge, a language model explains the latents from it, or reads the
    explanations of --labels, gives them categories and is tested on them.

    For example: `dspa audit --map map.dspa.safetensors --prompts prompts.txt --texts texts.txt --out audit`
    """
    from dspa.audit.edits import audited_latents, read_edits
    from dspa.audit.record import audit_of, with_edited
    from dspa.audit.report import FILES as WRITTEN
    from dspa.audit.report import write_report
    from dspa.audit.words import summary
    from dspa.data.prompts import read_prompt_file
    from dspa.data.texts import TextFile
    from dspa.maps.cdmap import ConditionalDifferenceMap
    from dspa.saes.labels import read_explanations
    from dspa.steering.dspa import Steering

    # The seed also draws the control, and k_diff is that of a trace's steering.
    of_prompts = [*changed(sampling, "--seed"), *changed(config, "--k-diff")]
    of_prompts += ["--batch-size"] * (batch_size != BATCH_SIZE)
    of_prompts += ["--chat-template-kwargs"] * bool(chat_template_kwargs)
    check_used("--prompts", prompts, of_prompts)
    check_used("--texts", texts, ["--tokens"] * bool(n_tokens) + changed(judged))
    judge = open_judge(judged, out)
    check_used("--judge", judge, ["--hand"] * bool(hand))
    files = {"trace": trace, "texts": texts, "prompts": prompts, "labels": labels, "hand": hand}
    make_folder(out, WRITTEN, [map_path, *files.values()])
    cdmap = ConditionalDifferenceMap.load(map_path)
    asked = None if prompts is None else read_prompt_file("--prompts", prompts)
    file = None if texts is None else TextFile(texts)
    described = described_latents(labels, cdmap.meta, explainer)
    by_hand = None if hand is None else _by_hand(hand, cdmap)
    groups = audited_latents(cdmap, top, seed=sampling.seed)
    edits = None if trace is None else read_edits(trace, cdmap)
    groups = with_edited(groups, edits, top)
    known: dict[str, Any] = {}
    if asked is not None or file is not None or on != RecordedModelOptions() or pair != RecordedSAEPairOptions():
        model, tokenizer, (sae_in, sae_out) = load_made_with(cdmap, on, pair)
        if asked is not None:
            if sampling.chat:
                warn_of_other_template([("--map", cdmap.meta.chat_template_kwargs)], chat_template_kwargs)
            steering = Steering(sae_in, sae_out, cdmap, config, record=True)
            known["samples"], own = _samples(
                *(model, tokenizer, steering, asked, on, sampling),
                batch_size=batch_size,
                chat_template_kwargs=chat_template_kwargs,
            )
            if edits is None:
                edits, groups = own, with_edited(groups, own, top)
        known |= meanings(model, tokenizer, sae_out, groups, on)
        if file is not None:
            given = None if labels is None else read_explanations(labels, sae_out, explainer=explainer)
            read: dict[str, Any] = {"n": contexts, "n_tokens": n_tokens or N_TOKENS, "seed": sampling.seed}
            known |= evidence_of(model, tokenizer, sae_out, groups, file, on, judge, given, by_hand, **read)
    made = audit_of(
        cdmap,
        groups,
        title=map_path.name,
        settings={name: str(path) for name, path in files.items() if path}
        | asdict(config)
        | asdict(sampling)
        | ({} if judge is None else {"judge": judge.model, "parameters of the judge": json.dumps(judge.parameters)}),
        k_diff=config.k_diff,
        labels=described,
        edits=edits,
        **known,
    )
    write_report(made, out)
    for sentence in summary(made):
        print_line(sentence)
    print_line(f"Report: {out / 'report.html'}")


def _samples(
    model: Any,
    tokenizer: Any,
    steering: Steering,
    prompts: Sequence[Text],
    on: RecordedModelOptions,
    sampling: SamplingOptions,
    *,
    batch_size: int,
    chat_template_kwargs: Mapping[str, Any] | None,
) -> tuple[list[Sample], TextEdits]:
    """Answer --prompts with and without steering."""
    from dspa.audit.samples import sample_texts, traced
    from dspa.data.prompts import tokenize_prompt

    options = asdict(sampling) | {"batch_size": batch_size}
    encode = partial(tokenize_prompt, tokenizer, chat=options.pop("chat"), chat_template_kwargs=chat_template_kwargs)
    with steering.attach(model, **on.names):
        return sample_texts(
            *(model, tokenizer, steering, traced(steering, tokenizer), prompts, encode), progress=True, **options
        )


def meanings(
    model: Any, tokenizer: Any, sae: FrozenSAE, groups: Mapping[str, Sequence[int]], on: RecordedModelOptions
) -> dict[str, dict[int, list[str]]]:
    """Return the tokens that latents promote and suppress, by the logit lens."""
    from dspa.saes.meanings import top_tokens

    latents = [latent for several in groups.values() for latent in several]
    return {
        name: top_tokens(
            *(sae, model, tokenizer, latents),
            n=N_PROMOTED,
            suppressed=name == "suppresses",
            layers=on.layers,
            model_name=on.model_name,
        )
        for name in ("promotes", "suppresses")
    }


def evidence_of(
    model: Any,
    tokenizer: Any,
    sae: FrozenSAE,
    groups: Mapping[str, Sequence[int]],
    file: TextFile,
    on: RecordedModelOptions,
    judge: Judge | None,
    given: Mapping[int, Sequence[Explanation]] | None,
    hand: Labels | None,
    *,
    n: int,
    n_tokens: int,
    seed: int,
) -> dict[str, Any]:
    """Return the evidence of latents in --texts, and with a judge what it makes of that, as for `audit_of`."""
    from dspa.audit.evidence import collect_evidence

    latents = [latent for several in groups.values() for latent in several]
    evidence = collect_evidence(
        *(sae, model, tokenizer, file, latents),
        n=n,
        n_sample=N_SAMPLE if judge else 0,
        n_tokens=n_tokens,
        layers=on.layers,
        model_name=on.model_name,
    )
    judged = {} if judge is None else _judge(judge, evidence, groups, given, hand, seed)
    return {"evidence": evidence, **judged}


def _by_hand(hand: Path, cdmap: ConditionalDifferenceMap) -> Labels:
    """Read --hand, with four categories in place of the judge's six."""
    from dspa.audit.judged import folded
    from dspa.saes.labels import read_labels

    return folded(read_labels(hand, latent_space(cdmap.meta)))


def _judge(
    judge: Judge,
    evidence: Evidence,
    groups: Mapping[str, Sequence[int]],
    given: Mapping[int, Sequence[Explanation]] | None,
    hand: Labels | None,
    seed: int,
) -> dict[str, Any]:
    """Return the judgments of latents and tables of groups, from a judge."""
    from dspa.audit.edits import CONTROL
    from dspa.audit.explained import compare_groups, explain_latents
    from dspa.audit.judged import group_sections, hand_section, judgment_of

    if hand is not None and not hand.categories.keys() & evidence.latents.keys():
        raise LabelError("--hand labels none of the audited latents; accepted: labels of some of them.")
    explained = explain_latents(judge, evidence.latents, given, seed=seed, progress=True)
    sections = group_sections(compare_groups(explained, groups, CONTROL, evidence.density))
    if hand is not None:
        sections.append(hand_section(explained, hand))
    return {"judgments": {latent: judgment_of(one) for latent, one in explained.items()}, "sections": sections}
