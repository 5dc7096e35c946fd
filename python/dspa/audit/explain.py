"""Explanations of latents by a judge, from contexts with marked tokens, and their categories."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import groupby

from dspa.audit.evidence import Context
from dspa.errors import LabelError
from dspa.judges.judge import Judge
from dspa.judges.questions import Answer, Question, chat, json_as, one_of
from dspa.schemas import Flag, Text, schema

OPEN, CLOSE = "[[", "]]"
# Tokens count as active from this share of the largest value in their context.
ACTIVE = 0.3

EXPLAINER = (
    "You find out what the latents of a sparse autoencoder respond to. A latent is one direction in the activations of "
    "a language model, and it is active on some tokens of a text. You see texts in which one latent is active, with "
    f"the tokens on which it is active between {OPEN} and {CLOSE}.\n\n"
    "Look for what the marked tokens have in common: their meaning, form or place, or what stands around them. The "
    "trend counts, so do not give an idea up because of a few texts that it does not fit. Call the explanation "
    "unreliable only if the texts leave you with no idea that you would stand by."
)
FINDING = (
    'one JSON object {"reliable": true or false, "explanation": "at most two sentences", "evidence": "the marked '
    'tokens or phrases that speak for it"}'
)

# Categories of explanations, and what belongs to them.
CATEGORIES = {
    "Safety": "harm, crime, danger or abuse, and refusing or warning because of them",
    "Discourse": "how a text speaks: tone, stance, hedging, politeness, addressing the reader, linking thoughts",
    "Intent": "what somebody wants to be done: asking, instructing, offering, promising, planning",
    "Structure": "the layout of a text: lists, headings, line breaks, punctuation, markup, beginnings and ends",
    "Grammatical": "words and parts of words by their grammar: word classes, endings, tense, articles, pronouns",
    "Content": "what a text is about: subjects, things, people, places, fields of knowledge",
}
# Categories that are too rare to be counted by themselves.
FOLDED = {"Safety": "Content", "Intent": "Discourse"}

SORTER = (
    "You sort explanations of what makes a latent of a language model active. Answer with the name of one category, "
    "and with nothing else."
)


@schema
class Finding:
    """Explanation of a latent by a judge.

    Attributes:
        reliable: the judge stands by it.
        explanation: when the latent is active.
        evidence: tokens and phrases that speak for it.
    """

    reliable: Flag
    explanation: Text
    evidence: Text

    def __post_init__(self) -> None:
        """Check that it says something."""
        if not self.explanation.strip():
            raise ValueError("`explanation` is empty.")


def explain(
    judge: Judge, contexts: Mapping[int, Sequence[Context]], *, progress: bool = False
) -> dict[int, Answer[Finding]]:
    """Let a judge explain latents from contexts in which they are active.

    Args:
        judge: the judge.
        contexts: contexts by latent. Latents without one are left out.
        progress: show a bar.

    Returns:
        Answers by latent.

    Raises:
        JudgeError: as for `Judge.ask_all`.
    """
    read = json_as(Finding, FINDING)
    questions = {
        latent: Question(chat(_to_explain(latent, several), EXPLAINER), read)
        for latent, several in contexts.items()
        if several
    }
    answers = judge.ask_all(list(questions.values()), progress=progress, what="explanations")
    return dict(zip(questions, answers, strict=True))


def categorize(judge: Judge, explanations: Mapping[int, str], *, progress: bool = False) -> dict[int, Answer[str]]:
    """Let a judge give each explanation one of the six `CATEGORIES`.

    Args:
        judge: the judge.
        explanations: explanations by latent.
        progress: show a bar.

    Returns:
        Answers by latent.

    Raises:
        JudgeError: as for `Judge.ask_all`.
    """
    read = one_of(tuple(CATEGORIES))
    questions = [Question(chat(_to_sort(text), SORTER), read) for text in explanations.values()]
    answers = judge.ask_all(questions, progress=progress, what="categories")
    return dict(zip(explanations, answers, strict=True))


def fold(category: str) -> str:
    """Return the one of four categories that a category counts as: Content, Discourse, Structure or Grammatical.

    Raises:
        LabelError: a category that is not one of `CATEGORIES`.
    """
    if category not in CATEGORIES:
        raise LabelError(f"The category {category!r} is not known; accepted: {', '.join(CATEGORIES)}.")
    return FOLDED.get(category, category)


def active_places(context: Context) -> list[int]:
    """Return the places of the tokens whose value is at least `ACTIVE` of the largest in the context."""
    least = ACTIVE * max(context.values)
    return [place for place, value in enumerate(context.values) if value > 0 and value >= least]


def marked(context: Context, places: Collection[int]) -> str:
    """Return the text of a context with these tokens between `OPEN` and `CLOSE`, those next to each other together.

    Such marks that the text itself has are set apart, so that they mark nothing.
    """
    chosen, parts = set(places), list[str]()
    for is_marked, run in groupby(enumerate(context.tokens), key=lambda token: token[0] in chosen):
        text = _without_marks("".join(token for _, token in run))
        parts.append(f"{OPEN}{text}{CLOSE}" if is_marked else text)
    return "".join(parts)


def numbered(texts: Iterable[str]) -> str:
    """Return texts for a prompt, each below a line with its number."""
    return "\n".join(f"--- Text {number}\n{text}" for number, text in enumerate(texts, start=1))


def _without_marks(text: str) -> str:
    return re.sub(r"\[(?=\[)|\](?=\])", r"\g<0> ", text)


def _to_explain(latent: int, contexts: Sequence[Context]) -> str:
    texts = numbered(marked(context, active_places(context)) for context in contexts)
    return f"When is latent {latent} active? Explain it from these texts.\n\n{texts}\n---\n\nAnswer with {FINDING}."


def _to_sort(explanation: str) -> str:
    listed = "\n".join(f"{name}: {what}" for name, what in CATEGORIES.items())
    return f"Categories:\n{listed}\n\nExplanation: {explanation}\n\nWhich category does it belong to most?"
