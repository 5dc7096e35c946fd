"""Questions to a judge about answers, and its judgments: ratings of turns, and comparisons in both orders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from dspa.errors import refusal
from dspa.evaluate.benchmarks import Benchmark, BenchmarkQuestion, MethodAnswers
from dspa.evaluate.grading.prompts import Prompts
from dspa.judges.judge import Judge
from dspa.judges.questions import Answer, Question

Mode: TypeAlias = Literal["single", "pairwise"]


@dataclass(frozen=True)
class Task:
    """One question to the judge.

    Attributes:
        mode: "single" for a rating, "pairwise" for a comparison with the baseline.
        question: the question that was answered.
        method: the method whose answer is graded.
        turn: the turn that is graded, from 1.
        seed: number of the answer, from 0.
        first: the method whose answer is shown first, as A; empty for a rating.
        asked: what the judge is asked.
    """

    mode: Mode
    question: BenchmarkQuestion
    method: str
    turn: int
    seed: int
    first: str
    asked: Question[Any] = field(repr=False)


@dataclass(frozen=True)
class Judgment:
    """The judge's answer to a task.

    Attributes:
        task: the task.
        answer: the answer, whose value is a rating from 1 to 10, or a verdict "A", "B" or "C".
    """

    task: Task
    answer: Answer[Any]

    @property
    def value(self) -> float | None:
        """The rating, or 1, 0.5 or 0 for a method that is better than the baseline, as good, or worse.

        None without an answer that can be read.
        """
        given = self.answer.value
        if self.task.mode == "single" or given is None:
            return given
        if given == "C":
            return 0.5
        return float((given == "A") == (self.task.first == self.task.method))

    def record(self) -> dict[str, Any]:
        """Return everything as JSON can hold it."""
        task = self.task
        own = (
            {"rating": self.answer.value}
            if task.mode == "single"
            else {"first": task.first, "verdict": self.answer.value}
        )
        return {
            "mode": task.mode,
            "question_id": task.question.id,
            "category": task.question.category,
            "method": task.method,
            "turn": task.turn,
            "seed": task.seed,
            **own,
            "problem": self.answer.problem,
            "text": self.answer.text,
        }


def tasks(
    benchmark: Benchmark,
    methods: Sequence[MethodAnswers],
    modes: Sequence[Mode],
    baseline: str,
    prompts: Prompts | None = None,
) -> list[Task]:
    """Return what a judge is to be asked.

    Args:
        benchmark: the questions.
        methods: answers of methods, as `read_methods` returns them.
        modes: ratings, comparisons of every other method with the baseline, or both.
        baseline: name of the baseline.
        prompts: templates of the prompts; by default those of the package.

    Raises:
        ValueError: a baseline that is none of the methods, comparisons with nothing to compare, or a template that
            fails.
    """
    by_name = {one.method: one for one in methods}
    if baseline not in by_name:
        raise refusal(ValueError, "`baseline`", repr(baseline), f"one of the methods: {', '.join(by_name)}")
    if "pairwise" in modes and len(methods) < 2:
        got = f"pairwise with the answers of {baseline!r} alone"
        raise refusal(ValueError, "`mode`", got, "single, or answers of another method too")
    prompts = prompts or Prompts()
    made: list[Task] = []
    for one in methods:
        if "single" in modes:
            made += _ratings(benchmark, one, prompts)
        if "pairwise" in modes and one.method != baseline:
            made += _comparisons(benchmark, one, by_name[baseline], prompts)
    return made


def judge_tasks(judge: Judge, asked: Sequence[Task], *, progress: bool = False) -> list[Judgment]:
    """Return the judgments of tasks, in their order.

    Raises:
        JudgeError: as for `Judge.ask_all`.
    """
    answers = judge.ask_all([task.asked for task in asked], progress=progress, what="judgments")
    return [Judgment(task, answer) for task, answer in zip(asked, answers, strict=True)]


def _ratings(benchmark: Benchmark, one: MethodAnswers, prompts: Prompts) -> Iterator[Task]:
    for question in benchmark.questions.values():
        for seed, texts in enumerate(one.answers.get(question.id, ())):
            for turn in range(1, len(texts) + 1):
                asked = prompts.single(question, turn, texts)
                yield Task("single", question, one.method, turn, seed, "", asked)


def _comparisons(benchmark: Benchmark, one: MethodAnswers, baseline: MethodAnswers, prompts: Prompts) -> Iterator[Task]:
    for question in benchmark.questions.values():
        pairs = zip(one.answers.get(question.id, ()), baseline.answers.get(question.id, ()), strict=True)
        for seed, (mine, theirs) in enumerate(pairs):
            for turn in range(1, len(mine) + 1):
                for first, a, b in ((one.method, mine, theirs), (baseline.method, theirs, mine)):
                    asked = prompts.pairwise(question, turn, a, b)
                    yield Task("pairwise", question, one.method, turn, seed, first, asked)
