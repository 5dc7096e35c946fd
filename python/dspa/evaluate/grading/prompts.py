"""Prompts of a judge that grades answers, and its grades as FastChat has them: `[[7]]`; `[[A]]`, `[[B]]` or `[[C]]`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, FileSystemLoader, PackageLoader, StrictUndefined, TemplateError

from dspa.errors import refusal
from dspa.evaluate.benchmarks import BenchmarkQuestion
from dspa.files import digest_of
from dspa.judges.questions import Question, chat

SINGLE, PAIRWISE = "single.jinja", "pairwise.jinja"
TEMPLATES = (SINGLE, PAIRWISE)
# Categories of MT-Bench whose questions FastChat grades with a reference answer.
WITH_REFERENCE = ("math", "reasoning", "coding")
WORST, BEST = 1, 10
RATING = re.compile(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]")
VERDICT = re.compile(r"\[\[\s*([ABC])\s*\]\]")


class Prompts:
    """Templates of Jinja2 for the two questions, `single.jinja` and `pairwise.jinja`.

    They get `turns`, a list up to the turn that is graded. Each has `number`, `question`, `reference` (empty without
    one), and `answer`, or `answer_a` and `answer_b` for a comparison.

    Attributes:
        digests: digests of the templates, by name.
    """

    def __init__(self, folder: Path | None = None) -> None:
        """Read the templates.

        Args:
            folder: folder of one template or both, in place of those of the package.

        Raises:
            ValueError: no template in the folder, or one that Jinja2 cannot read.
        """
        if folder is not None and not any((folder / name).is_file() for name in TEMPLATES):
            accepted = f"a folder with {' or '.join(TEMPLATES)}"
            raise refusal(ValueError, "The folder of templates", folder, accepted)
        own = [] if folder is None else [FileSystemLoader(folder)]
        loader = ChoiceLoader([*own, PackageLoader("dspa.evaluate.grading")])
        environment = Environment(
            loader=loader,
            # Prompts are text.
            autoescape=False,  # noqa: S701
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        try:
            self._templates = {name: environment.get_template(name) for name in TEMPLATES}
            self.digests = {name: digest_of(loader.get_source(environment, name)[0]) for name in TEMPLATES}
        except (TemplateError, UnicodeDecodeError) as error:
            raise refusal(ValueError, "A template", f"not one of Jinja2 ({error})", "a template of Jinja2") from error

    def single(self, question: BenchmarkQuestion, turn: int, answers: Sequence[str]) -> Question[float]:
        """Return the question for a rating of the answer to one turn, from 1, after the conversation before it."""
        turns = [shown | {"answer": text} for shown, text in zip(_shown(question, turn), answers, strict=False)]
        return Question(self._rendered(SINGLE, turns), read_rating)

    def pairwise(self, question: BenchmarkQuestion, turn: int, a: Sequence[str], b: Sequence[str]) -> Question[str]:
        """Return the question which of two answers to one turn, from 1, is better: "A", "B", or "C" for neither."""
        shown = _shown(question, turn)
        turns = [one | {"answer_a": x, "answer_b": y} for one, x, y in zip(shown, a, b, strict=False)]
        return Question(self._rendered(PAIRWISE, turns), read_verdict)

    def _rendered(self, name: str, turns: list[dict[str, Any]]) -> list[dict[str, str]]:
        try:
            return chat(self._templates[name].render(turns=turns))
        except TemplateError as error:
            got = f"a template that fails ({error})"
            raise refusal(ValueError, name, got, "one that uses what it gets", "It gets `turns` alone.") from error


def read_rating(text: str) -> float:
    """Return the last rating in a judge's answer, such as 7 of "Rating: [[7]]"."""
    given = RATING.findall(text)
    if not given or not WORST <= float(given[-1]) <= BEST:
        raise ValueError(f"the answer ends {text[-60:]!r}; accepted: [[{WORST}]] to [[{BEST}]]")
    return float(given[-1])


def read_verdict(text: str) -> str:
    """Return the last verdict in a judge's answer: "A", "B", or "C" for a tie."""
    given: list[str] = VERDICT.findall(text)
    if not given:
        raise ValueError(f"the answer ends {text[-60:]!r}; accepted: [[A]], [[B]] or [[C]]")
    return given[-1]


def has_reference(question: BenchmarkQuestion) -> bool:
    """Return True for a question that should be graded with a reference answer."""
    return question.category in WITH_REFERENCE


def _shown(question: BenchmarkQuestion, turn: int) -> list[dict[str, Any]]:
    """Return what the judge sees of a question up to a turn."""
    references = question.references if has_reference(question) else ("",) * len(question.turns)
    pairs = zip(question.turns[:turn], references, strict=False)
    return [{"number": n, "question": text, "reference": reference} for n, (text, reference) in enumerate(pairs, 1)]
