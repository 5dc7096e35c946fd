"""Judgments of latents, as the report of an audit shows them: one per latent, and tables of groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from dspa.audit.explain import fold
from dspa.audit.explained import ExplainedGroup, ExplainedLatent
from dspa.audit.record import Judgment, Section
from dspa.audit.scoring import Score
from dspa.saes.label_quality import compare_labels
from dspa.saes.labels import Labels

QUALITY = (
    "How well the judge foresees from explanations where latents are active, over all texts of a group. Detection asks "
    "in which texts, fuzzing in which texts the marked tokens are right. The figures are balanced accuracies, of which "
    "guessing has 0.5, F1 as the mean of latents weighted by their densities, and AUC, the area under the ROC curve of "
    "the judge's probabilities. AUC is empty where its endpoint gives no log-probabilities: --judge-parameters has to "
    "ask for `logprobs` and `top_logprobs`. A weak judge has low scores for good explanations, too."
)
SHARES = (
    "Shares of the categories of explanations with 95 % intervals (Wilson), against those of the control by Fisher's "
    "exact test (two-sided). Each p-value is that of one test: of many, some are small by chance."
)
BY_HAND = (
    "Categories by the judge, compared with labels by hand on the latents that have both. The corrected share is what "
    "the share of a category in all audited latents becomes with the errors that these show (Rogan and Gladen). There "
    "is none where they show no more than guesses. Intervals are of 95 %, by bootstrap over the labels by hand."
)


def judgment_of(latent: ExplainedLatent) -> Judgment:
    """Return what is known of the meaning of a latent, for its line and its page."""
    scores = [score for score in (latent.detection, latent.fuzzing) if score is not None]
    notes = {
        "explained by": ", by ".join(filter(None, (latent.explainer, latent.method))),
        "the judge stands by it": {True: "yes", False: "no", None: ""}[latent.reliable],
        "evidence": latent.evidence,
        "F1": _by_kind(latent, lambda score: score.confusion.f1),
        "AUC": _by_kind(latent, lambda score: score.auc),
        "problems": " ".join(filter(None, (latent.problem, *(_unanswered(score) for score in scores)))),
    }
    return Judgment(
        explanation=latent.text,
        category=latent.category or "",
        scores={
            "detection": _accuracy(latent.detection),
            "fuzzing": _accuracy(latent.fuzzing),
            "answered": sum(score.n_answered for score in scores),
            "unanswered": sum(score.n_unanswered for score in scores),
        },
        notes={name: note for name, note in notes.items() if note},
    )


def group_sections(groups: Mapping[str, ExplainedGroup]) -> list[Section]:
    """Return tables of the scores of groups, and of their shares of categories where there is a control to compare."""
    scored = ("detection", "F1", "AUC", "answered", "fuzzing", "F1", "AUC", "answered")
    rows = [
        (
            name,
            one.n_latents,
            one.n_explained,
            one.n_sorted,
            *_quality(one.detection, one.detection_f1),
            *_quality(one.fuzzing, one.fuzzing_f1),
        )
        for name, one in groups.items()
    ]
    sections = [
        Section("Quality of the explanations", QUALITY, ("group", "latents", "explained", "sorted", *scored), rows)
    ]
    shares = [
        (name, test.category, test.n_sample, test.share, test.share_low, test.share_high, test.control_share, test.p)
        for name, one in groups.items()
        for test in one.tests
    ]
    if shares:
        columns = ("group", "category", "latents", "share", "from", "to", "share in the control", "p")
        sections.append(Section("Categories", SHARES, columns, shares))
    return sections


def folded(hand: Labels) -> Labels:
    """Return labels by hand with the four categories in place of the six.

    Raises:
        LabelError: another category.
    """
    return Labels({latent: fold(category) for latent, category in hand.categories.items()}, hand.d_sae)


def hand_section(latents: Mapping[int, ExplainedLatent], hand: Labels) -> Section:
    """Return a table of how well the categories agree with labels by hand.

    Args:
        latents: the explained latents.
        hand: labels by hand, with the four categories.

    Raises:
        LabelError: no latent that has both.
    """
    judged = Labels({latent: one.category for latent, one in latents.items() if one.category}, hand.d_sae)
    agreement = compare_labels(judged, hand)
    low, high = agreement.mcc_interval()
    text = (
        f"{BY_HAND} On {agreement.n} latents the accuracy is {agreement.accuracy:.3f} and Matthews' correlation "
        f"{agreement.mcc:.3f} [{low:.3f}, {high:.3f}]; {agreement.n_unlabelled} more have a label by hand alone."
    )
    measured = ("precision", "recall", "balanced accuracy", "correlation", "from", "to", "share")
    rows = [
        (
            *(one.category, one.n_hand, one.n_label, one.n_both, one.precision, one.recall, one.balanced_accuracy),
            *(one.mcc, one.mcc_low, one.mcc_high, one.share, one.corrected_share),
            *(one.corrected_low, one.corrected_high),
        )
        for one in agreement.per_category
    ]
    return Section(
        "Categories compared with labels by hand",
        text,
        ("category", "by hand", "by the judge", "by both", *measured, "corrected share", "from", "to"),
        rows,
    )


def _accuracy(score: Score | None) -> float | None:
    return None if score is None else score.confusion.balanced_accuracy


def _by_kind(latent: ExplainedLatent, figure_of: Callable[[Score], float | None]) -> str:
    scores = {"detection": latent.detection, "fuzzing": latent.fuzzing}
    figures = {name: figure_of(score) for name, score in scores.items() if score is not None}
    return ", ".join(f"{name} {figure:.3f}" for name, figure in figures.items() if figure is not None)


def _quality(score: Score, f1: float | None) -> tuple[float | None, float | None, float | None, str]:
    return _accuracy(score), f1, score.auc, f"{score.n_answered} of {score.n_asked}"


def _unanswered(score: Score) -> str:
    return f"Unanswered: {score.problem}." if score.problem else ""
