"""Prompts of a judge that grades: what it sees, and how its grades are read."""

from __future__ import annotations

from pathlib import Path

import pytest

from dspa.evaluate.benchmarks import BenchmarkQuestion
from dspa.evaluate.grading.prompts import PAIRWISE, SINGLE, Prompts, read_rating, read_verdict

MATH = BenchmarkQuestion(111, "math", ("1 + 1 <b>?", "And 2 + 2?"), ("ref-one", "ref-two"))
WRITING = BenchmarkQuestion(81, "writing", ("Write.", "Shorter."), ("ref-one", "ref-two"))


def single(question: BenchmarkQuestion, turn: int, *answers: str) -> str:
    (message,) = Prompts().single(question, turn, answers).messages
    assert message["role"] == "user"
    return message["content"]


def in_order(text: str, *parts: str) -> bool:
    places = [text.find(part) for part in parts]
    return min(places) >= 0 and places == sorted(places) and all(text.count(part) == 1 for part in parts)


def test_the_first_turn_is_shown_alone():
    text = single(MATH, 1, "two", "four")
    assert in_order(text, "1 + 1 <b>?", "ref-one", "two", "[[4]]")
    assert "And 2 + 2?" not in text and "four" not in text and "ref-two" not in text and "turns" not in text


def test_the_second_turn_is_shown_after_the_first():
    text = single(MATH, 2, "it-is-two", "it-is-four")
    assert in_order(text, "1 + 1 <b>?", "ref-one", "it-is-two", "And 2 + 2?", "ref-two", "it-is-four", "[[4]]")
    assert "has 2 turns" in text and "last answer only" in text


def test_references_are_for_math_reasoning_and_coding():
    """FastChat grades the other categories without them, though the file of MT-Bench has some."""
    for category in ("math", "reasoning", "coding", "writing", "stem"):
        text = single(BenchmarkQuestion(1, category, ("Ask.",), ("ref-one",)), 1, "Answer.")
        wanted = category in ("math", "reasoning", "coding")
        assert ("ref-one" in text) == wanted == ("Reference answers" in text)
    assert "eference" not in single(BenchmarkQuestion(1, "math", ("Ask.",), ("",)), 1, "Answer.")


def test_a_comparison_shows_both_conversations():
    (message,) = Prompts().pairwise(WRITING, 2, ("a-one", "a-two"), ("b-one", "b-two")).messages
    assert in_order(message["content"], "a-one", "a-two", "b-one", "b-two", "[[A]]", "[[B]]", "[[C]]")
    assert message["content"].count("Shorter.") == 2
    (message,) = Prompts().pairwise(MATH, 1, ("a-one", "a-two"), ("b-one", "b-two")).messages
    assert in_order(message["content"], "ref-one", "a-one", "b-one") and "two" not in message["content"]


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("Good. Rating: [[7]]", 7),
        ("[[ 8.5 ]]", 8.5),
        ("A [[1]] would be too hard, so [[10]].", 10),
        ("**Rating: [[3]]**\n", 3),
    ],
)
def test_ratings(text: str, rating: float):
    assert read_rating(text) == rating


@pytest.mark.parametrize("text", ["", "Rating: 7", "[7]", "[[0]]", "[[11]]", "[[10.5]]", "[[-3]]", "[[7/10]]", "[[A]]"])
def test_what_is_no_rating(text: str):
    with pytest.raises(ValueError, match=r"accepted: \[\[1\]\] to \[\[10\]\]"):
        read_rating(text)


def test_verdicts():
    assert [read_verdict(f"Not [[C]], but [[{name}]].") for name in "ABC"] == ["A", "B", "C"]
    for text in ("", "A", "[A]", "[[D]]", "[[a]]", "[[7]]"):
        with pytest.raises(ValueError, match=r"accepted: \[\[A\]\], \[\[B\]\] or \[\[C\]\]"):
            read_verdict(text)


def test_own_templates(tmp_path: Path):
    (tmp_path / SINGLE).write_text(
        "{% for turn in turns %}{{ turn.number }} {{ turn.question }}: {{ turn.answer }};{% endfor %}"
    )
    prompts, standard = Prompts(tmp_path), Prompts()
    assert prompts.single(WRITING, 2, ("x", "y")).messages[0]["content"] == "1 Write.: x;2 Shorter.: y;"
    assert (
        prompts.digests[SINGLE] != standard.digests[SINGLE] and prompts.digests[PAIRWISE] == standard.digests[PAIRWISE]
    )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "accepted: a folder with single.jinja or pairwise.jinja"),
        ("{% for %}", "A template is not one of Jinja2"),
        ("{{ answer }}", "single.jinja is a template that fails .*'answer' is undefined.*It gets `turns`"),
    ],
)
def test_bad_templates(tmp_path: Path, template: str | None, message: str):
    if template is not None:
        (tmp_path / SINGLE).write_text(template)
    with pytest.raises(ValueError, match=message):
        Prompts(tmp_path).single(WRITING, 1, ("x", "y"))
