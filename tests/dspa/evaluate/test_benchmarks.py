"""Files of questions and answers: what is read from them, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dspa.evaluate.benchmarks import Benchmark, MethodAnswers, read_methods

from ..support.benchmarks import answer, question, write_lines, write_list

QUESTIONS = [
    question(81, "writing", "Write a post.", "Shorter."),
    question(111, "math", "1 + 1?", "And 2 + 2?", reference=["2", "4"]),
    question(131, "extraction", "Which year?", "And month?", reference=["1999"]),
]
INSTRUCTIONS = [
    {"instruction": "Say hello.", "output": "x", "generator": "davinci", "dataset": "koala"},
    {"instruction": "Count.", "output": "y", "generator": "davinci", "dataset": "vicuna"},
]


@pytest.fixture
def mt_bench(tmp_path: Path) -> Benchmark:
    return Benchmark.read(write_lines(tmp_path / "question.jsonl", QUESTIONS))


@pytest.fixture
def alpaca(tmp_path: Path) -> Benchmark:
    return Benchmark.read(write_list(tmp_path / "alpaca_eval.json", INSTRUCTIONS))


def generated(*pairs: tuple[str, str], generator: str = "m") -> list[dict[str, Any]]:
    return [{"instruction": text, "output": output, "generator": generator} for text, output in pairs]


def test_questions_of_fastchat(mt_bench: Benchmark):
    assert mt_bench.layout == "FastChat" and list(mt_bench.questions) == [81, 111, 131]
    one = mt_bench.questions[111]
    assert (one.id, one.category, one.turns, one.references) == (111, "math", ("1 + 1?", "And 2 + 2?"), ("2", "4"))
    assert mt_bench.questions[81].references == ("", "")
    assert mt_bench.questions[131].references == ("1999", "")


def test_questions_of_alpaca_eval(alpaca: Benchmark):
    assert alpaca.layout == "AlpacaEval" and list(alpaca.questions) == ["Say hello.", "Count."]
    one = alpaca.questions["Count."]
    assert (one.id, one.category, one.turns, one.references) == (2, "vicuna", ("Count.",), ("",))


def test_answers_of_fastchat(mt_bench: Benchmark, tmp_path: Path):
    records = [answer(n, "m", (f"a{n}", f"b{n}"), (f"c{n}", "")) for n in (111, 81, 131)]
    one = MethodAnswers.read(write_lines(tmp_path / "m.jsonl", records), mt_bench)
    assert one.method == "m" and one.answers[81] == [("a81", "b81"), ("c81", "")]
    assert len(one.texts) == 12 and one.texts.count("") == 3


def test_answers_of_alpaca_eval(alpaca: Benchmark, tmp_path: Path):
    path = write_list(tmp_path / "m.json", generated(("Count.", "1, 2"), ("Say hello.", "Hello")))
    one = MethodAnswers.read(path, alpaca)
    assert one.method == "m" and one.answers == {2: [("1, 2",)], 1: [("Hello",)]}


def test_references_of_a_file(mt_bench: Benchmark, tmp_path: Path):
    path = write_lines(tmp_path / "gpt-4.jsonl", [answer(131, "gpt-4", ("in 1999", "May"))])
    given = mt_bench.with_references(path)
    assert given.questions[131].references == ("in 1999", "May")
    assert given.questions[111] == mt_bench.questions[111]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "a file without questions; accepted: records with `question_id` and `turns` or `instruction`"),
        ([{"prompt": "x"}], "line 1 is without `question_id`; accepted: `question_id` and `turns`, as in FastChat's"),
        (["x"], "line 1 is a str; accepted: a JSON object"),
        ([question(True, "a", "x")], "line 1: `question_id` is True; accepted: a whole number or text"),  # type: ignore[arg-type]
        ([question(1, "a")], r"`turns` is \(\); accepted: one or more texts"),
        ([question(1, "a", "x", " ")], "accepted: one or more texts that are not empty"),
        ([question(1, "a", "x"), question(1, "a", "y")], "line 2 is the question 1 again"),
        ([question(1, "a", "x", reference="four")], "`reference` is 'four'; accepted: a list"),
        ([question(1, "a", "x", reference=["4", "5"])], "`reference` is of 2 texts; accepted: at most one per turn"),
        ([answer(1, "m", ("a", "b"))], "line 1 is an answer; accepted: a question. Is this a file of answers"),
        ([{"instruction": ""}], "`instruction` is empty; accepted: a text"),
        ([{"instruction": "a"}, {"instruction": "a"}], "line 2 is the question 'a' again"),
        ([{"instruction": "a"}, question(1, "a", "x")], "line 2 is without `instruction`.*AlpacaEval's"),
    ],
)
def test_bad_questions(tmp_path: Path, records: list[Any], message: str):
    with pytest.raises(ValueError, match=message):
        Benchmark.read(write_lines(tmp_path / "q.jsonl", records))


def changed(**entries: Any) -> dict[str, Any]:
    return {**answer(81, "m", ("a", "b")), **entries}


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (
            [answer(82, "m", ("a", "b"))],
            r"line 1 is an answer to 82; accepted: answers to questions of .*question.jsonl",
        ),
        ([changed(question_id="81")], "an answer to '81'"),
        ([answer(81, "m", ("a", "b")), answer(81, "m", ("a", "b"))], "line 2 is a second answer to 81"),
        ([answer(81, "m", ("a",))], "an answer of 1 turns to 81; accepted: one to each of its 2 turns"),
        ([answer(81, "m", ("a", "b"), ("a",))], "an answer of 1 turns to 81"),
        ([answer(81, "m")], r"`choices` is of the indices \[\]; accepted: one or more, numbered 0, 1"),
        ([changed(choices=[{"index": 1, "turns": ["a", "b"]}])], r"of the indices \[1\]"),
        ([changed(choices=[{"index": 0, "turns": ["a", None]}])], "`turns.*None; accepted: text"),
        ([changed(choices=[{"turns": ["a", "b"]}])], "`index` is None"),
        ([changed(model_id=None)], "`model_id` is None; accepted: text"),
        (
            [answer(81, "m", ("a", "b")), answer(111, "n", ("a", "b"))],
            "of the methods m, n; accepted: one file per method",
        ),
        ([answer(81, "m", ("", " "))], "a file without the text of an answer"),
        ([], "a file without the text of an answer"),
        (generated(("Count.", "1")), "line 1 is without `question_id`.*`model_id` and `choices`, as in FastChat's"),
    ],
)
def test_bad_answers(mt_bench: Benchmark, tmp_path: Path, records: list[Any], message: str):
    with pytest.raises(ValueError, match=message):
        MethodAnswers.read(write_lines(tmp_path / "m.jsonl", records), mt_bench)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (generated(("Count!", "1")), "entry 1 is an answer to 'Count!'"),
        (generated(("x" * 90, "1")), "an answer to '" + "x" * 60 + r"\.\.\.'"),
        (generated(("Count.", "1"), ("Count.", "2")), "entry 2 is a second answer to 'Count.'"),
        ([{"instruction": "Count.", "generator": "m"}], "`output` is None; accepted: text"),
        ([answer(81, "m", ("a", "b"))], "without `instruction`; accepted: `instruction`, `output` and `generator`"),
    ],
)
def test_bad_answers_of_alpaca_eval(alpaca: Benchmark, tmp_path: Path, records: list[Any], message: str):
    with pytest.raises(ValueError, match=message):
        MethodAnswers.read(write_list(tmp_path / "m.json", records), alpaca)


ONE = ("a", "b")


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ([answer(81, "m", ONE)], [answer(81, "m", ONE)], r"b.jsonl is of the method 'm', as is .*a.jsonl"),
        (
            [answer(81, "m", ONE), answer(111, "m", ONE)],
            [answer(81, "n", ONE)],
            r"b.jsonl is without .* 111, which .*a.jsonl",
        ),
        (
            [answer(81, "m", ONE)],
            [answer(81, "n", ONE), answer(111, "n", ONE)],
            r"a.jsonl is without .* 111, which .*b.jsonl",
        ),
        (
            [answer(81, "m", ONE, ONE)],
            [answer(81, "n", ONE)],
            "The method 'n' is of 1 answers to question 81, where m has 2; accepted: as many",
        ),
    ],
)
def test_files_that_do_not_fit_each_other(mt_bench: Benchmark, tmp_path: Path, first: Any, second: Any, message: str):
    paths = [write_lines(tmp_path / "a.jsonl", first), write_lines(tmp_path / "b.jsonl", second)]
    with pytest.raises(ValueError, match=message):
        read_methods(paths, mt_bench)


def test_files_in_another_order_fit(mt_bench: Benchmark, tmp_path: Path):
    a = write_lines(tmp_path / "a.jsonl", [answer(81, "m", ONE), answer(111, "m", ONE)])
    b = write_lines(tmp_path / "b.jsonl", [answer(111, "n", ONE), answer(81, "n", ONE)])
    assert [one.method for one in read_methods([a, b], mt_bench)] == ["m", "n"]


def test_seeds_of_alpaca_eval_are_files(alpaca: Benchmark, tmp_path: Path):
    """They are in the order of their numbers, whatever that of the files."""
    seeds = {
        n: write_list(tmp_path / f"m.seed-{n}.json", generated(("Count.", f"c{n}"), ("Say hello.", f"h{n}")))
        for n in (10, 2)
    }
    other = [
        write_list(tmp_path / f"n.seed-{n}.json", generated(("Say hello.", "x"), ("Count.", "y"), generator="n"))
        for n in (2, 10)
    ]
    m, n = read_methods([*seeds.values(), *other], alpaca)
    assert m.answers == {1: [("h2",), ("h10",)], 2: [("c2",), ("c10",)]} and m.paths == (seeds[2], seeds[10])
    assert n.method == "n" and n.answers[2] == [("y",), ("y",)]
    with pytest.raises(ValueError, match="The method 'n' is of 1 answers to question 2, where m has 2"):
        read_methods([*seeds.values(), other[0]], alpaca)
    for again in (seeds[2], write_list(tmp_path / "m.json", generated(("Count.", "c"), ("Say hello.", "h")))):
        with pytest.raises(ValueError, match="of the method 'm', as is"):
            read_methods([seeds[2], again], alpaca)
    one = write_list(tmp_path / "m.seed-3.json", generated(("Count.", "c")))
    with pytest.raises(ValueError, match=r"m.seed-3.json is without answers to the questions 1, which .*m.seed-2.json"):
        read_methods([seeds[2], one], alpaca)
