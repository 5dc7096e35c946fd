"""Questions of a benchmark and the answers of methods to them, in the layouts of FastChat (MT-Bench) and AlpacaEval."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, cast

from pydantic import StrictInt, StrictStr

from dspa.data.records import read_records
from dspa.errors import listed, refusal
from dspa.schemas import Accepts, Count, Text, check

Layout: TypeAlias = Literal["FastChat", "AlpacaEval"]
QuestionId: TypeAlias = Annotated[StrictInt | StrictStr, Accepts("a whole number or text")]

# What a record of a question, and one of an answer, has in a layout.
QUESTION = {"FastChat": "`question_id` and `turns`", "AlpacaEval": "`instruction`"}
ANSWER = {
    "FastChat": "`question_id`, `model_id` and `choices`",
    "AlpacaEval": "`instruction`, `output` and `generator`",
}


@dataclass(frozen=True)
class BenchmarkQuestion:
    """A question, which may have several turns.

    Attributes:
        id: FastChat's `question_id`; for AlpacaEval, the number of the instruction in its file, from 1.
        category: FastChat's `category`, AlpacaEval's `dataset`, or "all" without one.
        turns: what the user says.
        references: reference answers to the turns, empty where there is none.
    """

    id: QuestionId
    category: str
    turns: tuple[str, ...]
    references: tuple[str, ...]


@dataclass(frozen=True)
class Benchmark:
    """The questions of a file.

    Attributes:
        path: the file.
        layout: its layout, which files of answers share.
        questions: questions by what answers name: the `question_id`, or AlpacaEval's instruction.
    """

    path: Path
    layout: Layout
    questions: Mapping[QuestionId, BenchmarkQuestion]

    @classmethod
    def read(cls, path: Path) -> Benchmark:
        """Read a file of questions, such as FastChat's question.jsonl or AlpacaEval's alpaca_eval.json.

        Raises:
            ValueError: a file without questions, a record of another form, or a question that is there twice.
        """
        questions: dict[QuestionId, BenchmarkQuestion] = {}
        layout: Layout | None = None
        for name, record in read_records(path, ValueError):
            content = _object(name, record)
            if "choices" in content:
                raise refusal(ValueError, name, "an answer", "a question", "Is this a file of answers?")
            layout = layout or ("AlpacaEval" if "instruction" in content else "FastChat")
            if layout == "FastChat":
                key, question = _of_fastchat(name, content)
            else:
                key, question = _of_alpaca_eval(name, content, len(questions) + 1)
            if key in questions:
                raise refusal(ValueError, name, f"the question {_shown(key)} again", "one record per question")
            questions[key] = question
        if layout is None:
            raise refusal(
                ValueError, str(path), "a file without questions", f"records with {' or '.join(QUESTION.values())}"
            )
        return cls(path, layout, questions)

    def with_references(self, path: Path) -> Benchmark:
        """Return the benchmark with the reference answers of a file, which has the layout of a file of answers.

        Raises:
            ValueError: as for `MethodAnswers.read`.
        """
        given = MethodAnswers.read(path, self).answers
        questions = {
            key: replace(question, references=given[question.id][0]) if question.id in given else question
            for key, question in self.questions.items()
        }
        return replace(self, questions=questions)


@dataclass(frozen=True)
class MethodAnswers:
    """The answers of one method.

    Attributes:
        paths: the file, or one per seed.
        method: its `model_id` or `generator`.
        answers: answers by the id of the question, one per seed, each the texts of all turns.
    """

    paths: tuple[Path, ...]
    method: str
    answers: dict[QuestionId, list[tuple[str, ...]]] = field(repr=False)

    @classmethod
    def read(cls, path: Path, benchmark: Benchmark) -> MethodAnswers:
        """Read a file of answers in the layout of the questions. FastChat's `choices` are answers by different seeds.

        Raises:
            ValueError: a record of another form, answers of two methods, an answer to none of the questions, two to
                one, one without all turns, or a file without any text.
        """
        answers: dict[QuestionId, list[tuple[str, ...]]] = {}
        methods: set[str] = set()
        read = _alpaca_eval_answer if benchmark.layout == "AlpacaEval" else _fastchat_answer
        for name, record in read_records(path, ValueError):
            key, method, seeds = read(name, _object(name, record))
            question = benchmark.questions.get(key)
            if question is None:
                raise refusal(
                    ValueError, name, f"an answer to {_shown(key)}", f"answers to questions of {benchmark.path}"
                )
            if question.id in answers:
                raise refusal(ValueError, name, f"a second answer to {_shown(key)}", "one record per question")
            for turns in seeds:
                if len(turns) != len(question.turns):
                    got = f"an answer of {len(turns)} turns to {_shown(key)}"
                    raise refusal(ValueError, name, got, f"one to each of its {len(question.turns)} turns")
            answers[question.id] = seeds
            methods.add(method)
        if len(methods) > 1:
            raise refusal(ValueError, str(path), f"of the methods {listed(sorted(methods))}", "one file per method")
        if not any(text.strip() for seeds in answers.values() for turns in seeds for text in turns):
            raise refusal(ValueError, str(path), "a file without the text of an answer", "answers of a method")
        return cls((path,), methods.pop(), answers)

    @property
    def texts(self) -> list[str]:
        """All answers, every turn and seed."""
        return [text for seeds in self.answers.values() for turns in seeds for text in turns]


def read_methods(paths: Sequence[Path], benchmark: Benchmark) -> list[MethodAnswers]:
    """Read files of answers of different methods, which must have answered the same questions equally often.

    AlpacaEval's layout has one answer per question. Several files of one method are its seeds if they are named
    base.seed-0.json, base.seed-1.json, ...

    Raises:
        ValueError: as for `MethodAnswers.read`, two other files of one method, or unequal sets of questions.
    """
    methods: dict[str, list[MethodAnswers]] = {}
    first: MethodAnswers | None = None
    for path in paths:
        one = MethodAnswers.read(path, benchmark)
        first = first or one
        for same in methods.setdefault(one.method, []):
            seeds = _seed(path), _seed(same.paths[0])
            if None in seeds or seeds[0] == seeds[1]:
                got = f"of the method {one.method!r}, as is {same.paths[0]}"
                raise refusal(ValueError, str(path), got, "files of different methods", "Rename one of the methods.")
        _check_same(first, one)
        methods[one.method].append(one)
    merged = [_merged(sorted(several, key=lambda one: _seed(one.paths[0]) or 0)) for several in methods.values()]
    for one in merged[1:]:
        _check_seeds(merged[0], one)
    return merged


def _seed(path: Path) -> int | None:
    """Return the seed in the name of a file in AlpacaEval's layout."""
    match = re.search(r"\.seed-(\d+)\.json(\.gz)?$", path.name)
    return int(match[1]) if match else None


def _merged(seeds: Sequence[MethodAnswers]) -> MethodAnswers:
    """Return the answers of all files of one method."""
    answers = {question: [turns for one in seeds for turns in one.answers[question]] for question in seeds[0].answers}
    return MethodAnswers(tuple(one.paths[0] for one in seeds), seeds[0].method, answers)


def _check_same(first: MethodAnswers, other: MethodAnswers) -> None:
    for one, two in ((first, other), (other, first)):
        if missing := [question for question in one.answers if question not in two.answers]:
            got = f"without answers to the questions {listed(missing)}, which {one.paths[0]} has"
            raise refusal(ValueError, str(two.paths[0]), got, "answers to the same questions in all files")


def _check_seeds(first: MethodAnswers, other: MethodAnswers) -> None:
    for question, seeds in first.answers.items():
        if (n := len(other.answers[question])) != len(seeds):
            got = f"of {n} answers to question {question}, where {first.method} has {len(seeds)}"
            raise refusal(ValueError, f"The method {other.method!r}", got, "as many answers (seeds) in all methods")


def _object(name: str, record: object) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise refusal(ValueError, name, f"a {type(record).__name__}", "a JSON object")
    return record


def _of_fastchat(name: str, record: dict[str, Any]) -> tuple[QuestionId, BenchmarkQuestion]:
    key = _key(name, record, "FastChat", QUESTION["FastChat"])
    turns = _texts(name, record, "turns")
    if not turns or not all(map(str.strip, turns)):
        raise refusal(ValueError, f"{name}: `turns`", turns, "one or more texts that are not empty")
    references = _texts(name, record, "reference") if "reference" in record else ()
    if len(references) > len(turns):
        got = f"of {len(references)} texts"
        raise refusal(ValueError, f"{name}: `reference`", got, f"at most one per turn, of which there are {len(turns)}")
    return key, BenchmarkQuestion(key, _text(name, record, "category", "all"), turns, _filled(references, turns))


def _of_alpaca_eval(name: str, record: dict[str, Any], number: int) -> tuple[QuestionId, BenchmarkQuestion]:
    key = _key(name, record, "AlpacaEval", QUESTION["AlpacaEval"])
    return key, BenchmarkQuestion(number, _text(name, record, "dataset", "all"), (str(key),), ("",))


def _fastchat_answer(name: str, record: dict[str, Any]) -> tuple[QuestionId, str, list[tuple[str, ...]]]:
    key = _key(name, record, "FastChat", ANSWER["FastChat"])
    choices = check(list[dict[str, Any]], record.get("choices"), ValueError, f"{name}: `choices`")
    by_index = {
        check(Count, choice.get("index"), ValueError, f"{name}: `index`"): _texts(name, choice, "turns")
        for choice in choices
    }
    if not choices or sorted(by_index) != list(range(len(choices))):
        got = f"of the indices {[choice.get('index') for choice in choices]}"
        raise refusal(ValueError, f"{name}: `choices`", got, "one or more, numbered 0, 1, ...")
    return key, _text(name, record, "model_id"), [by_index[n] for n in range(len(choices))]


def _alpaca_eval_answer(name: str, record: dict[str, Any]) -> tuple[QuestionId, str, list[tuple[str, ...]]]:
    key = _key(name, record, "AlpacaEval", ANSWER["AlpacaEval"])
    return key, _text(name, record, "generator"), [(_text(name, record, "output"),)]


def _key(name: str, record: dict[str, Any], layout: Layout, accepted: str) -> QuestionId:
    """Return what names a question: its `question_id`, or AlpacaEval's instruction."""
    column, kind = ("instruction", Text) if layout == "AlpacaEval" else ("question_id", QuestionId)
    if column not in record:
        raise refusal(ValueError, name, f"without `{column}`", f"{accepted}, as in {layout}'s layout")
    key: QuestionId = check(cast(Any, kind), record[column], ValueError, f"{name}: `{column}`")
    if not str(key).strip():
        raise refusal(ValueError, f"{name}: `{column}`", "empty", "a text")
    return key


def _text(name: str, record: dict[str, Any], column: str, default: str | None = None) -> str:
    return check(Text, record.get(column, default), ValueError, f"{name}: `{column}`")


def _texts(name: str, record: dict[str, Any], column: str) -> tuple[str, ...]:
    return tuple(check(list[Text], record.get(column), ValueError, f"{name}: `{column}`"))


def _filled(references: tuple[str, ...], turns: tuple[str, ...]) -> tuple[str, ...]:
    return references + ("",) * (len(turns) - len(references))


def _shown(key: QuestionId) -> str:
    return repr(key if isinstance(key, int) or len(key) <= 60 else f"{key[:60]}...")
