"""Scores of explanations: how well a judge that reads an explanation foresees what the latent does.

*Detection* shows texts with and without the latent, and asks in which it is active. *Fuzzing* marks tokens in texts,
and asks where the marked tokens are those on which it is active. Both are as in Delphi (arXiv 2410.13928). A judge that
guesses, or reads an explanation that says nothing, has a balanced accuracy of 0.5.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from random import Random
from typing import Annotated, Literal, TypeAlias, get_args

import numpy as np
from pydantic import Field, StrictInt
from scipy import stats
from torch import Tensor

from dspa.audit.evidence import Context, LatentEvidence
from dspa.audit.explain import CLOSE, OPEN, active_places, marked, numbered
from dspa.confusion import Confusion
from dspa.errors import refusal
from dspa.judges.judge import Judge
from dspa.judges.questions import Question, Token, chat, json_as
from dspa.schemas import PositiveInt, Seed, check

# "fuzzing" marks wrong tokens in texts in which the latent is not active, "fuzzing-active" in texts in which it is.
Kind: TypeAlias = Literal["detection", "fuzzing", "fuzzing-active"]

# Texts per question; the last question may have fewer.
PER_QUESTION = 5
# 1 for a text that fits the explanation, 0 for another.
Bits: TypeAlias = list[Annotated[StrictInt, Field(ge=0, le=1)]]

FITS = "Say for each text whether a part of it fits the explanation."
MARKS_FIT = (
    f"In each text some tokens are between {OPEN} and {CLOSE}. Say for each text whether the marked tokens are those "
    "that the explanation describes. A text whose marks are on other tokens does not fit, whatever else it says."
)
SCORER = (
    "You check explanations of what makes a latent of a language model active. You see one explanation and some "
    "numbered texts. {task} Judge each text by itself: any number of them may fit, all and none included."
)


@dataclass(frozen=True)
class Score:
    """Score of one explanation, or of several together.

    Attributes:
        n_asked: number of texts that the judge was asked about.
        confusion: its answers against where the latent is active. Unanswered texts count nowhere in it.
        problem: why the first of the unanswered questions is unanswered, or empty.
        probabilities: for texts whose answer has log-probabilities, whether the text fits and the probability of 1 over
            that of 0 or 1.
    """

    n_asked: int
    confusion: Confusion
    problem: str = ""
    probabilities: tuple[tuple[bool, float], ...] = ()

    @property
    def n_answered(self) -> int:
        """Number of texts with an answer."""
        return self.confusion.n

    @property
    def n_unanswered(self) -> int:
        """Number of texts without an answer."""
        return self.n_asked - self.n_answered

    @property
    def auc(self) -> float | None:
        """Area under the ROC curve of the probabilities, None without those of texts that fit and of others."""
        fits = np.array([fit for fit, _ in self.probabilities], dtype=bool)
        n, m = int(fits.sum()), int((~fits).sum())
        if not (n and m):
            return None
        ranks = stats.rankdata([probability for _, probability in self.probabilities])
        return float((ranks[fits].sum() - n * (n + 1) / 2) / (n * m))


@dataclass(frozen=True)
class Example:
    """A text as the judge sees it, and whether it fits a right explanation."""

    text: str
    fits: bool


def score(
    judge: Judge,
    kind: Kind,
    explanations: Mapping[int, str],
    evidence: Mapping[int, LatentEvidence],
    *,
    seen: Mapping[int, Collection[Context]] | None = None,
    n: int = 50,
    seed: int = 0,
    progress: bool = False,
) -> dict[int, Score]:
    """Score explanations of latents by what a judge foresees from them.

    Args:
        judge: the judge.
        kind: what the judge is asked.
        explanations: explanations by latent.
        evidence: contexts by latent, of which the random samples are shown.
        seen: contexts that the explanations were made from, by latent. Texts of the same entries are not shown.
        n: texts per latent that fit, one of each of n equal parts by the latent's value, and as many that do not.
        seed: seed of the choice and the order of texts.
        progress: show a bar.

    Returns:
        Scores by latent. One without contexts has a score of no texts.

    Raises:
        JudgeError: as for `Judge.ask_all`.
        ValueError: an unknown kind, or an invalid `n` or `seed`.
    """
    if kind not in get_args(Kind):
        raise refusal(ValueError, "`kind`", repr(kind), ", ".join(get_args(Kind)))
    check(PositiveInt, n, ValueError, "`n`")
    check(Seed, seed, ValueError, "`seed`")
    batches: list[tuple[int, list[Example]]] = []
    for latent in explanations:
        # Of the latent alone, so that its questions are the same whichever others are scored.
        random = Random(f"{seed} {kind} {latent}")
        examples = _examples(kind, evidence[latent], (seen or {}).get(latent, ()), n, random)
        starts = range(0, len(examples), PER_QUESTION)
        batches += [(latent, examples[start : start + PER_QUESTION]) for start in starts]
    questions = [_question(kind, explanations[latent], examples) for latent, examples in batches]
    answers = judge.ask_all(questions, progress=progress, what=kind)
    scores = {}
    for latent in explanations:
        own = [(examples, answer) for (of, examples), answer in zip(batches, answers, strict=True) if of == latent]
        fits = [example.fits for examples, answer in own if answer.answered for example in examples]
        given = [bool(bit) for _, answer in own for bit in answer.value or ()]
        problem = next((answer.problem for _, answer in own if not answer.answered), "")
        probabilities = tuple(
            (example.fits, probability)
            for examples, answer in own
            if answer.answered
            for example, probability in zip(examples, _probabilities(answer.tokens, len(examples)), strict=False)
        )
        n_asked = sum(len(examples) for examples, _ in own)
        scores[latent] = Score(n_asked, Confusion.of(fits, given), problem, probabilities)
    return scores


def pooled(scores: Collection[Score]) -> Score:
    """Return the score of all texts of several scores together."""
    counts = [(s.confusion.tp, s.confusion.fn, s.confusion.fp, s.confusion.tn) for s in scores]
    total = Confusion(*(sum(column) for column in zip(*counts, strict=True))) if counts else Confusion(0, 0, 0, 0)
    problem = next((s.problem for s in scores if s.problem), "")
    return Score(sum(s.n_asked for s in scores), total, problem, tuple(chain(*(s.probabilities for s in scores))))


def weighted_f1(scores: Mapping[int, Score], density: Tensor) -> float | None:
    """Return the mean F1 of latents, each weighted by its density, as in Delphi.

    Args:
        scores: scores by latent. One without an answered text is left out, and F1 is 0 where it is not defined.
        density: share of the tokens on which each latent is active [d_sae].

    Returns:
        None without a latent that is active.
    """
    weights = {latent: float(density[latent]) for latent, one in scores.items() if one.n_answered}
    total = sum(weights.values())
    if not total:
        return None
    return sum(weight * (scores[latent].confusion.f1 or 0.0) for latent, weight in weights.items()) / total


def _examples(kind: Kind, evidence: LatentEvidence, seen: Collection[Context], n: int, random: Random) -> list[Example]:
    """Return texts that fit and texts that do not, in a random order."""
    entries = {context.entry for context in seen}
    active, inactive = (
        [context for context in contexts if context.entry not in entries]
        for contexts in (evidence.active, evidence.inactive)
    )
    fitting, unfitting = _spread(active, n, random), active if kind == "fuzzing-active" else inactive
    unfitting = random.sample(unfitting, min(n, len(unfitting)))
    if kind == "detection":
        examples = [Example("".join(context.tokens), True) for context in fitting]
        examples += [Example("".join(context.tokens), False) for context in unfitting]
    else:
        right = [active_places(context) for context in fitting]
        n_marks = round(sum(map(len, right)) / max(1, len(right)))
        wrong = [_wrong_places(context, n_marks, random) for context in unfitting]
        examples = [Example(marked(*shown), True) for shown in zip(fitting, right, strict=True)]
        examples += [Example(marked(*shown), False) for shown in zip(unfitting, wrong, strict=True) if shown[1]]
    random.shuffle(examples)
    return examples


def _spread(contexts: Sequence[Context], n: int, random: Random) -> list[Context]:
    """Return one of each of n equal parts of the contexts, ordered by value, or all if there are fewer."""
    ordered = sorted(contexts, key=lambda context: (context.value, context.entry))
    n = min(n, len(ordered))
    return [random.choice(ordered[len(ordered) * k // n : len(ordered) * (k + 1) // n]) for k in range(n)]


def _wrong_places(context: Context, n: int, random: Random) -> list[int]:
    """Return the places of at most n tokens on which the latent is not active.

    The context's own place is one of them if it can be, because it is marked in all texts that fit: where the marks are
    must not give the answer away.
    """
    right = set(active_places(context))
    places = [place for place in range(len(context.tokens)) if place not in right]
    random.shuffle(places)
    return sorted(places, key=lambda place: place != context.place)[:n]


def _probabilities(tokens: Sequence[Token] | None, n: int) -> list[float]:
    """Return P(1) / (P(0) + P(1)) in the places of the last list of n numbers, nothing where that is not known."""
    if tokens is None:
        return []
    text = "".join(token.text for token in tokens)
    lists = list(re.finditer(rf"\[\s*[01](\s*,\s*[01]){{{n - 1}}}\s*\]", text))
    if not lists:
        return []
    places = [place for place in range(*lists[-1].span()) if text[place] in "01"]
    ends = list(accumulate(len(token.text) for token in tokens))
    numbers = [bisect_right(ends, place) for place in places]
    if len(set(numbers)) < n:
        # One token has two of the numbers.
        return []
    probabilities = []
    for likely in (tokens[number].likely for number in numbers):
        one, zero = (
            sum(math.exp(value) for text, value in likely.items() if bit in text and other not in text)
            for bit, other in ("10", "01")
        )
        if not one + zero:
            return []
        probabilities.append(one / (one + zero))
    return probabilities


def _question(kind: Kind, explanation: str, examples: Sequence[Example]) -> Question[Bits]:
    accepted = f"a JSON list of {len(examples)} numbers, in the order of the texts: 1 for a text that fits, 0 if not"
    texts = numbered(example.text for example in examples)
    user = f"Explanation: {explanation}\n\n{texts}\n---\n\nAnswer with {accepted}."
    read = json_as(Bits, accepted)

    def read_all(text: str) -> Bits:
        bits = read(text)
        if len(bits) != len(examples):
            raise ValueError(f"the answer is {len(bits)} numbers; accepted: {accepted}")
        return bits

    return Question(chat(user, SCORER.format(task=FITS if kind == "detection" else MARKS_FIT)), read_all)
