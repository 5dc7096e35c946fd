"""Questions to a judge, and how its answers are read: as one of several names, as JSON, or as they are."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

from dspa.schemas import Number, Text, check, schema

T = TypeVar("T")

Messages: TypeAlias = list[dict[str, str]]

# The end of what a reasoning model writes before its answer.
THOUGHT = "</think>"
# Signs around a name that is the whole answer.
WRAPPING = " \t\r\n\"'`*.:[](){}"


@dataclass(frozen=True)
class Question(Generic[T]):
    """Messages for a judge, and the reader of its answer.

    Attributes:
        messages: chat messages, as `chat` makes them.
        read: takes the text of an answer, without a reasoning model's thoughts, and returns its value. It raises
            `ValueError`, with the reason, for a text that is not an answer.
    """

    messages: Messages
    read: Callable[[str], T]


@schema
class Token:
    """A token of a judge's answer.

    Attributes:
        text: its text.
        likely: log-probabilities by the texts of the likeliest tokens in its place.
    """

    text: Text
    likely: dict[Text, Number]


@dataclass(frozen=True)
class Answer(Generic[T]):
    """Answer of a judge to a question.

    Attributes:
        value: what `Question.read` made of the text, or None if the question is unanswered.
        text: text of the answer, empty if the endpoint refused the question.
        problem: why the question is unanswered, or empty.
        tokens: tokens of the text, None where the endpoint does not give their log-probabilities.
    """

    value: T | None
    text: str
    problem: str = ""
    tokens: Sequence[Token] | None = None

    @property
    def answered(self) -> bool:
        """True if the text could be read."""
        return not self.problem


def chat(user: str, system: str = "") -> Messages:
    """Return the messages of one question, with a system message if it is not empty."""
    messages = [{"role": "system", "content": system}] if system else []
    return [*messages, {"role": "user", "content": user}]


def read_answer(question: Question[T], text: str, *, cut: bool = False) -> Answer[T]:
    """Return the answer that a text is to a question.

    Args:
        question: the question.
        text: what the judge wrote.
        cut: the text ends where the judge's limit of tokens was reached.
    """
    try:
        return Answer(question.read(text.rpartition(THOUGHT)[2].strip()), text)
    except ValueError as error:
        limit = ", and it was cut at the limit of tokens" if cut else ""
        return Answer(None, text, f"{error}{limit}")


def one_of(names: Sequence[str]) -> Callable[[str], str]:
    """Return a reader of answers that are one of these names and nothing else, in upper or lower case."""
    known = {name.casefold(): name for name in names}

    def read(text: str) -> str:
        name = known.get(text.strip(WRAPPING).casefold())
        if name is None:
            raise ValueError(f"the answer is {text[:60]!r}; accepted: {', '.join(names)}")
        return name

    return read


def json_as(kind: type[T], accepted: str) -> Callable[[str], T]:
    """Return a reader of answers that hold a JSON value. The last value in the text that fits the schema counts.

    Args:
        kind: schema of the value, as for `dspa.schemas.check`.
        accepted: the value in words, for the reason why a text is not an answer.
    """

    def read(text: str) -> T:
        fitting = None
        for value in _json_values(text):
            try:
                fitting = [check(kind, value, ValueError, "the answer")]
            except ValueError:
                continue
        if fitting is None:
            raise ValueError(f"the answer is {text[:60]!r}; accepted: {accepted}")
        return fitting[0]

    return read


def _json_values(text: str) -> Iterator[Any]:
    """Yield the JSON objects and lists in a text that are in no other one."""
    decoder, place = json.JSONDecoder(), 0
    while place < len(text):
        end = place + 1
        if text[place] in "{[":
            try:
                value, end = decoder.raw_decode(text, place)
                yield value
            except RecursionError:
                # Brackets that are nested too deeply for JSON, as when a model repeats itself. The next thousands of
                # brackets would be no better, and each would take as long.
                return
            except ValueError:
                pass
        place = end
