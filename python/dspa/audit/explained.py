"""Explained latents and groups of them: their explanations with categories and scores, from a judge or a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from dspa.audit.evidence import Context, LatentEvidence
from dspa.audit.explain import categorize, explain, fold
from dspa.audit.scoring import Score, pooled, score, weighted_f1
from dspa.audit.shares import CategoryTest, compare_shares
from dspa.errors import refusal
from dspa.judges.judge import Judge
from dspa.saes.labels import Explanation

# Name of the method by which a judge explains.
METHOD = "dspa_marked-contexts"


@dataclass(frozen=True)
class ExplainedLatent:
    """The meaning of one latent, as far as it is known.

    Attributes:
        text: the explanation, or empty if there is none.
        explainer: name of the model that wrote it, or empty if unknown.
        method: name of the method, or empty if unknown.
        reliable: the judge that explained it stands by the explanation, None if it comes from a file.
        evidence: tokens and phrases that the judge gives for it.
        category: one of the four folded categories, None without an answer.
        detection: score by detection, None if it was not scored.
        fuzzing: score by fuzzing, None if it was not scored.
        problem: why there is no explanation or no category, as a sentence, or empty.
    """

    text: str = ""
    explainer: str = ""
    method: str = ""
    reliable: bool | None = None
    evidence: str = ""
    category: str | None = None
    detection: Score | None = None
    fuzzing: Score | None = None
    problem: str = ""


@dataclass(frozen=True)
class ExplainedGroup:
    """A group of latents, compared with the control.

    Attributes:
        n_latents: number of its latents.
        n_explained: number of those with an explanation.
        n_sorted: number of those with a category.
        detection: score by detection of all its texts together.
        fuzzing: score by fuzzing of all its texts together.
        detection_f1: mean F1 by detection, weighted by the densities of latents; None where they are not known.
        fuzzing_f1: that by fuzzing.
        tests: shares of categories, against those of the control; none for the control itself, and none if it or the
            group has no category.
    """

    n_latents: int
    n_explained: int
    n_sorted: int
    detection: Score
    fuzzing: Score
    detection_f1: float | None
    fuzzing_f1: float | None
    tests: tuple[CategoryTest, ...]


def explain_latents(
    judge: Judge,
    evidence: Mapping[int, LatentEvidence],
    given: Mapping[int, Sequence[Explanation]] | None = None,
    *,
    n: int = 50,
    seed: int = 0,
    progress: bool = False,
) -> dict[int, ExplainedLatent]:
    """Explain latents, sort the explanations into categories, and score them by detection and fuzzing.

    Args:
        judge: the judge.
        evidence: contexts by latent. It is explained from its `top`, and scored on the random samples.
        given: explanations of a file, which are sorted and scored, in place of those by the judge. Several of one
            latent are joined.
        n: texts with the latent, and without it, per score.
        seed: seed of the choice of texts.
        progress: show bars.

    Returns:
        What is known of each latent of `evidence`.

    Raises:
        JudgeError: as for `Judge.ask_all`.
    """
    top = {latent: kept.top for latent, kept in evidence.items()}
    if given is None:
        latents = _by_judge(judge, top, progress)
    else:
        latents = {latent: from_file(given.get(latent, ())) for latent in evidence}
    texts = {latent: one.text for latent, one in latents.items() if one.text}
    categories = categorize(judge, texts, progress=progress)
    options: dict[str, Any] = {"seen": top if given is None else {}, "n": n, "seed": seed, "progress": progress}
    detection = score(judge, "detection", texts, evidence, **options)
    fuzzing = score(judge, "fuzzing", texts, evidence, **options)
    for latent, answer in categories.items():
        latents[latent] = replace(
            latents[latent],
            category=None if answer.value is None else fold(answer.value),
            detection=detection[latent],
            fuzzing=fuzzing[latent],
            problem=answer.problem and f"Without a category: {answer.problem}.",
        )
    return latents


def from_file(explanations: Sequence[Explanation]) -> ExplainedLatent:
    """Return what a file says of a latent, several texts joined."""
    texts, explainers, methods = (
        "; ".join(dict.fromkeys(filter(None, column)))
        for column in (
            [one.text for one in explanations],
            [one.explainer for one in explanations],
            [one.method for one in explanations],
        )
    )
    return ExplainedLatent(texts, explainers, methods, problem="" if texts else "The file does not explain it.")


def _by_judge(judge: Judge, contexts: Mapping[int, Sequence[Context]], progress: bool) -> dict[int, ExplainedLatent]:
    latents = {latent: ExplainedLatent(problem="It is active in none of the texts.") for latent in contexts}
    for latent, answer in explain(judge, contexts, progress=progress).items():
        if answer.value is None:
            latents[latent] = ExplainedLatent(problem=f"Without an explanation: {answer.problem}.")
        else:
            latents[latent] = ExplainedLatent(
                text=answer.value.explanation,
                explainer=judge.model,
                method=METHOD,
                reliable=answer.value.reliable,
                evidence=answer.value.evidence,
            )
    return latents


def compare_groups(
    latents: Mapping[int, ExplainedLatent],
    groups: Mapping[str, Sequence[int]],
    control: str,
    density: Tensor | None = None,
) -> dict[str, ExplainedGroup]:
    """Compare groups of explained latents with a control.

    Args:
        latents: the explained latents.
        groups: latents of each group.
        control: name of the group that is the control.
        density: share of the tokens on which each latent is active [d_sae], as `Evidence.density`.

    Raises:
        ValueError: a control that is not one of the groups.
    """
    if control not in groups:
        raise refusal(ValueError, "`control`", repr(control), ", ".join(groups))
    categories = {
        name: [category for latent in group if (category := latents[latent].category) is not None]
        for name, group in groups.items()
    }
    compared = {}
    for name, group in groups.items():
        tests: tuple[CategoryTest, ...] = ()
        if name != control and categories[name] and categories[control]:
            tests = tuple(compare_shares(categories[name], categories[control]))
        detection, fuzzing = (
            {latent: one for latent in group if (one := getattr(latents[latent], kind)) is not None}
            for kind in ("detection", "fuzzing")
        )
        compared[name] = ExplainedGroup(
            n_latents=len(group),
            n_explained=sum(bool(latents[latent].text) for latent in group),
            n_sorted=len(categories[name]),
            detection=pooled(detection.values()),
            fuzzing=pooled(fuzzing.values()),
            detection_f1=None if density is None else weighted_f1(detection, density),
            fuzzing_f1=None if density is None else weighted_f1(fuzzing, density),
            tests=tests,
        )
    return compared
