"""How answers are read."""

from __future__ import annotations

from typing import TypeAlias

import pytest

from dspa.judges.questions import Question, chat, json_as, one_of, read_answer
from dspa.schemas import Flag, schema


@schema
class Verdict:
    reliable: Flag


Bits: TypeAlias = list[Flag]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Content", "Content"),
        (" **content**.\n", "Content"),
        ('"Structure"', "Structure"),
        ("<think>Structure? No.</think>\nContent", "Content"),
        ("Content or Structure", None),
        ("not Content", None),
        ("", None),
    ],
)
def test_one_of_several_names(text: str, value: str | None):
    answer = read_answer(Question(chat("?"), one_of(("Content", "Structure"))), text)
    assert answer.value == value
    assert answer.answered == (value is not None)
    assert answer.text == text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"reliable": true}', True),
        ('```json\n{"reliable": false}\n```', False),
        ('Braces {like these} aside, {"reliable": true}.', True),
        ('{"reliable": true}, no: {"reliable": false}', False),
        ('{"reliable": true} {"other": 1}', True),
        ('{"other": {"reliable": true}}', None),
        ('{"reliable": 1}', None),
        ('{"reliable": true', None),
        ("[" * 100_000, None),
        ("yes", None),
    ],
)
def test_json_in_an_answer(text: str, value: bool | None):
    answer = read_answer(Question(chat("?"), json_as(Verdict, "a verdict")), text)
    assert (answer.value and answer.value.reliable) == value
    assert answer.answered == (value is not None)
    assert answer.answered or answer.problem.endswith("accepted: a verdict")


def test_a_list_in_an_answer():
    read = json_as(Bits, "a list of true and false")
    assert read("Text [1] fits, so: [true, false]") == [True, False]
    with pytest.raises(ValueError, match="a list of true and false"):
        read("[1]")
