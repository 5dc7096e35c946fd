"""A grading: the grades of all methods, what has to be said about them, and the files that keep them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dspa.errors import listed
from dspa.evaluate.benchmarks import Benchmark, BenchmarkQuestion, MethodAnswers
from dspa.evaluate.compare.measures import Figure
from dspa.evaluate.compare.table import TextTable
from dspa.evaluate.grading.grades import LOSS, TIE, WIN, MethodGrades, Paired
from dspa.evaluate.grading.judging import Judgment, Mode
from dspa.evaluate.grading.prompts import has_reference
from dspa.files import file_sha256
from dspa.outputs import write_atomically
from dspa.version import __version__

FORMAT = "dspa.grades.1"
SUMMARY, JUDGMENTS = "grades.json", "judgments.jsonl"
FILES = (SUMMARY, JUDGMENTS)
NOUNS: Mapping[Mode, str] = {"single": "ratings", "pairwise": "comparisons"}
# Means that differ by less are the same to the digits that are shown.
SAME = 0.005
LEGEND = (
    "Brackets hold 95 % bootstrap intervals over questions, all turns and seeds of a question drawn together. p: "
    "two-sided, of the sign-flip test over questions. length: characters per answer. A comparison is won if the answer "
    "is better in both orders, and a tie counts half in the win rate. first: share of single verdicts, "
    "each of one order, for the answer that was shown first, without those that call a tie."
)
LEADERBOARD = (
    "The win rate is the share of wins, a tie counting half. It is not the length-controlled figure of AlpacaEval's "
    "leaderboard, which also has another judge and prompt: compare methods within this table."
)


@dataclass(frozen=True, eq=False)
class Grading:
    """Judgments of the answers of methods, and the grades that follow from them.

    Attributes:
        benchmark: the questions.
        methods: the answers.
        baseline: name of the baseline.
        judgments: all judgments.
        settings: of the judge.
    """

    benchmark: Benchmark
    methods: Sequence[MethodAnswers]
    baseline: str
    judgments: Sequence[Judgment]
    settings: Mapping[str, Any]

    @property
    def questions(self) -> list[BenchmarkQuestion]:
        """The questions that were answered."""
        return [one for one in self.benchmark.questions.values() if one.id in self.methods[0].answers]

    @cached_property
    def grades(self) -> dict[Mode, dict[str, MethodGrades]]:
        """Grades by mode and method."""
        grouped: dict[Mode, dict[str, list[Judgment]]] = {}
        for one in self.judgments:
            grouped.setdefault(one.task.mode, {}).setdefault(one.task.method, []).append(one)
        return {
            mode: {name: MethodGrades(several, self.questions) for name, several in of_mode.items()}
            for mode, of_mode in grouped.items()
        }

    @cached_property
    def lengths(self) -> dict[str, float]:
        """Mean number of characters per answer, by method."""
        return {one.method: float(np.mean([len(text) for text in one.texts])) for one in self.methods}

    @property
    def notes(self) -> list[str]:
        """Sentences that a reader of the grades has to know."""
        notes = [*self._of_questions()]
        for mode, grades in self.grades.items():
            notes += [*self._of_unanswered(mode, grades), *self._of_categories(mode, grades)]
        if "pairwise" in self.grades and self.benchmark.layout == "AlpacaEval":
            notes.append(LEADERBOARD)
        return notes

    def record(self) -> dict[str, Any]:
        """Return the grades as JSON can hold them."""
        rated = [name for name in self.grades.get("single", {}) if name != self.baseline]
        over = {name: self.over_baseline(name) for name in rated}
        return {
            "format": FORMAT,
            "version": __version__,
            "settings": {
                **self.settings,
                "questions": {"file": str(self.benchmark.path), "sha256": file_sha256(self.benchmark.path)},
                "answers": {
                    one.method: [{"file": str(path), "sha256": file_sha256(path)} for path in one.paths]
                    for one in self.methods
                },
            },
            "baseline": self.baseline,
            "n_questions": len(self.questions),
            "length": self.lengths,
            **{mode: {name: one.record() for name, one in grades.items()} for mode, grades in self.grades.items()},
            "over_baseline": {name: paired and paired.record() for name, paired in over.items()},
            "notes": self.notes,
        }

    def write(self, folder: Path) -> None:
        """Write `grades.json` and `judgments.jsonl` to a folder.

        Raises:
            OSError: they cannot be written.
        """
        lines = [json.dumps(one.record()) + "\n" for one in self.judgments]
        write_atomically(folder / JUDGMENTS, "".join(lines).encode())
        write_atomically(folder / SUMMARY, (json.dumps(self.record(), indent=1, allow_nan=False) + "\n").encode())

    def tables(self) -> list[TextTable]:
        """Return the tables of ratings and of comparisons, those that there are."""
        made = []
        for mode, grades in self.grades.items():
            title = "Ratings, 1 to 10" if mode == "single" else f"Comparisons with {self.baseline}"
            of_mode = self._rating_columns if mode == "single" else self._comparison_columns
            made.append(_table(f"{title}, {len(self.questions)} questions", grades, of_mode))
            if len(_part_columns(next(iter(grades.values())))) > 2:
                made.append(_table(f"{title}, by turn and category", grades, _part_columns))
        return made

    def over_baseline(self, method: str) -> Paired | None:
        """Return how far the mean rating of a method is above that of the baseline, None where they share none."""
        single = self.grades["single"]
        return single[method].over(single[self.baseline])

    def _rating_columns(self, one: MethodGrades) -> dict[str, str]:
        paired = None if one.method == self.baseline else self.over_baseline(one.method)
        return {
            "mean": _shown(one.mean()),
            f"over {self.baseline}": _shown(paired.figure if paired else None, sign="+"),
            "p": f"{paired.p:.2g}" if paired else "",
            "unanswered": f"{one.n_unanswered} of {len(one.values)}",
            "length": f"{self.lengths[one.method]:.0f}",
        }

    def _comparison_columns(self, one: MethodGrades) -> dict[str, str]:
        return {
            "won/tied/lost": "/".join(str(one.count(value)) for value in (WIN, TIE, LOSS)),
            "win rate": _shown(one.mean()),
            "p": "" if one.p is None else f"{one.p:.2g}",
            "first": _shown(one.first_wins, interval=False),
            "unanswered": f"{one.n_unanswered} of {len(one.values)}",
            "length": f"{self.lengths[one.method]:.0f}/{self.lengths[self.baseline]:.0f}",
        }

    def _of_questions(self) -> Iterator[str]:
        answered, all_questions = self.questions, self.benchmark.questions
        if len(answered) < len(all_questions):
            yield f"{len(answered)} of the {len(all_questions)} questions of {self.benchmark.path} were answered."
        without = [one for one in answered if has_reference(one) and not any(one.references)]
        if without:
            kinds = listed(dict.fromkeys(one.category for one in without))
            yield f"Questions of {kinds} that were graded without a reference answer: {len(without)}."
        for one in self.methods:
            if empty := sum(not text.strip() for text in one.texts):
                yield f"{empty} of {len(one.texts)} answers of {one.method} are empty, and were graded as they are."

    def _of_unanswered(self, mode: Mode, grades: Mapping[str, MethodGrades]) -> Iterator[str]:
        for name, one in grades.items():
            if one.n_unanswered:
                yield (
                    f"{one.n_unanswered} of {len(one.values)} {NOUNS[mode]} of {name} are unanswered and count in no "
                    f"mean. The first: {one.problem}."
                )
        answered = {name: (one.n_answered, one.n_questions) for name, one in grades.items()}
        if len(set(answered.values())) > 1:
            counts = ", ".join(f"{name} {n} (on {questions} questions)" for name, (n, questions) in answered.items())
            use = f" Differences from {self.baseline} use those that both methods have." if mode == "single" else ""
            yield f"The means are over different {NOUNS[mode]}: {counts}.{use}"

    def _of_categories(self, mode: Mode, grades: Mapping[str, MethodGrades]) -> Iterator[str]:
        sizes = Counter(question.category for question in self.questions)
        if len(sizes) < 2:
            return
        equal, noun, apart = len(set(sizes.values())) == 1, NOUNS[mode], []
        for name, one in grades.items():
            mean, of_categories = one.mean(), one.mean_of_categories
            if mean is not None and (of_categories is None or abs(mean.value - of_categories) >= SAME):
                shown = "unknown" if of_categories is None else f"{of_categories:.2f}"
                apart.append(f"{name} {mean.value:.2f}, of categories {shown}")
        if apart:
            why = "answers of the judge are missing" if equal else "the categories have different numbers of questions"
            yield f"The mean of {noun} is not that of the {len(sizes)} categories, because {why}: {'; '.join(apart)}."
        elif equal and any(one.n_answered for one in grades.values()):
            yield f"The mean of {len(sizes)} categories is that of all {noun}: they have equal sizes."


def _table(
    title: str, grades: Mapping[str, MethodGrades], columns_of: Callable[[MethodGrades], dict[str, str]]
) -> TextTable:
    rows = {name: columns_of(one) for name, one in grades.items()}
    columns = list(next(iter(rows.values())))
    return TextTable(title, ["method", *columns], [[name, *row.values()] for name, row in rows.items()])


def _part_columns(one: MethodGrades) -> dict[str, str]:
    figures = {f"turn {turn}": one.mean(turn=turn) for turn in one.turns}
    figures |= {category: one.mean(category=category) for category in one.categories}
    return {name: _shown(figure, interval=False) for name, figure in figures.items()}


def _shown(figure: Figure | None, *, interval: bool = True, sign: str = "") -> str:
    if figure is None:
        return ""
    ends = f" [{figure.low:{sign}.2f}, {figure.high:{sign}.2f}]" if interval else ""
    return f"{figure.value:{sign}.2f}{ends}"
