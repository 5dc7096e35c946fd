"""Gradings: what is asked for files of answers, what is said about the grades, and the files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from dspa.evaluate.benchmarks import Benchmark, MethodAnswers, read_methods
from dspa.evaluate.grading.grading import LEADERBOARD, Grading
from dspa.evaluate.grading.judging import Judgment, Mode, Task, tasks
from dspa.judges.questions import Answer

from ...support.benchmarks import answer, question, write_lines, write_list

BOTH: tuple[Mode, ...] = ("single", "pairwise")


def world(folder: Path, categories: str = "aabb", *, seeds: int = 1) -> tuple[Benchmark, list[MethodAnswers]]:
    """Questions of two turns, and answers of base and of two methods, which name who wrote them."""
    asked = [question(n, category, f"first of {n}", f"second of {n}") for n, category in enumerate(categories)]
    benchmark = Benchmark.read(write_lines(folder / "question.jsonl", asked))
    paths = []
    for method in ("base", "x", "y"):
        records = [
            answer(n, method, *([f"{method} {n} {turn} {seed}" for turn in (1, 2)] for seed in range(seeds)))
            for n in range(len(categories))
        ]
        paths.append(write_lines(folder / f"{method}.jsonl", records))
    return benchmark, read_methods(paths, benchmark)


def answered(task: Task, value: Any) -> Judgment:
    return Judgment(task, Answer(value, f"[[{value}]]", "" if value is not None else "the answer is no rating"))


def rated(benchmark: Benchmark, methods: list[MethodAnswers], rate: Any) -> Grading:
    """A grading by a function of the method, the question's number and the turn."""
    asked = tasks(benchmark, methods, ("single",), "base")
    judgments = [answered(task, rate(task.method, task.question.id, task.turn)) for task in asked]
    return Grading(benchmark, methods, "base", judgments, {"judge": "m"})


def test_what_is_asked(tmp_path: Path):
    benchmark, methods = world(tmp_path, seeds=2)
    asked = tasks(benchmark, methods, BOTH, "base")
    single = [task for task in asked if task.mode == "single"]
    pairs = [task for task in asked if task.mode == "pairwise"]
    # Four questions, two seeds, two turns; three methods rated, and two compared in two orders.
    assert len(single) == 3 * 16 and len(pairs) == 2 * 16 * 2
    task = next(t for t in single if (t.method, t.question.id, t.seed, t.turn) == ("x", 2, 1, 2))
    (message,) = task.asked.messages
    assert "x 2 1 1" in message["content"] and "x 2 2 1" in message["content"] and "base" not in message["content"]
    mine, theirs = (t for t in pairs if (t.method, t.question.id, t.seed, t.turn) == ("y", 3, 0, 1))
    assert (mine.first, theirs.first) == ("y", "base")
    (one,), (two,) = mine.asked.messages, theirs.asked.messages
    assert one["content"].index("y 3 1 0") < one["content"].index("base 3 1 0")
    assert two["content"].index("base 3 1 0") < two["content"].index("y 3 1 0")
    assert "second of 3" not in one["content"]


def test_a_verdict_is_for_the_method_that_is_shown_there(tmp_path: Path):
    """A judge that knows which answer is the method's says A and B; the value is the same both ways."""
    pairs = tasks(*world(tmp_path), ("pairwise",), "base")
    for task in pairs:
        text = task.asked.messages[0]["content"]
        place = "A" if text.index(f"{task.method} {task.question.id}") < text.index(f"base {task.question.id}") else "B"
        assert answered(task, place).value == 1 and answered(task, "C").value == 0.5
        assert answered(task, "AB".replace(place, "")).value == 0 and answered(task, None).value is None


def test_a_baseline_that_is_not_there(tmp_path: Path):
    benchmark, methods = world(tmp_path)
    with pytest.raises(ValueError, match="`baseline` is 'z'; accepted: one of the methods: base, x, y"):
        tasks(benchmark, methods, BOTH, "z")
    with pytest.raises(ValueError, match="pairwise with the answers of 'base' alone"):
        tasks(benchmark, methods[:1], BOTH, "base")
    assert len(tasks(benchmark, methods[:1], ("single",), "base")) == 8


def test_files(tmp_path: Path):
    benchmark, methods = world(tmp_path)
    grading = rated(benchmark, methods, lambda method, n, turn: {"base": 4, "x": 5, "y": 4}[method] + n % 2)
    grading.write(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "judgments.jsonl").read_text().splitlines()]
    assert len(lines) == 24
    assert lines[1] == {
        "mode": "single",
        "question_id": 0,
        "category": "a",
        "method": "base",
        "turn": 2,
        "seed": 0,
        "rating": 4,
        "problem": "",
        "text": "[[4]]",
    }
    record = json.loads((tmp_path / "grades.json").read_text())
    assert record["format"] == "dspa.grades.1" and record["baseline"] == "base" and record["n_questions"] == 4
    assert record["single"]["x"]["mean"]["value"] == 5.5 and record["single"]["x"]["n_asked"] == 8
    assert record["over_baseline"]["x"] == {"value": 1.0, "low": 1.0, "high": 1.0, "p": 0.125, "n_questions": 4}
    assert record["over_baseline"]["y"]["value"] == 0 and "base" not in record["over_baseline"]
    assert record["length"] == {"base": 10.0, "x": 7.0, "y": 7.0} and "pairwise" not in record
    file = tmp_path / "x.jsonl"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert record["settings"]["answers"]["x"] == [{"file": str(file), "sha256": digest}]


def test_tables(tmp_path: Path):
    benchmark, methods = world(tmp_path)
    table, parts = rated(benchmark, methods, lambda m, n, turn: turn + 2 * (m == "x") + n).tables()
    assert table.title == "Ratings, 1 to 10, 4 questions"
    assert table.columns == ["method", "mean", "over base", "p", "unanswered", "length"]
    base, x, _ = table.rows
    assert base[0] == "base" and base[1].startswith("3.00 [") and base[2:] == ["", "", "0 of 8", "10"]
    assert x[2:] == ["+2.00 [+2.00, +2.00]", "0.12", "0 of 8", "7"]
    assert parts.columns == ["method", "turn 1", "turn 2", "a", "b"]
    assert parts.rows[1] == ["x", "4.50", "5.50", "4.00", "6.00"]


def test_a_table_of_comparisons(tmp_path: Path):
    benchmark, methods = world(tmp_path)
    pairs = tasks(benchmark, methods, ("pairwise",), "base")
    # x wins by its first turns alone, and y never.
    judgments = [answered(t, "C" if t.method == "y" else "A" if t.turn == 2 or t.first == "x" else "B") for t in pairs]
    grading = Grading(benchmark, methods, "base", judgments, {})
    table, parts = grading.tables()
    x, y = table.rows
    assert table.title == "Comparisons with base, 4 questions"
    assert table.columns == ["method", "won/tied/lost", "win rate", "p", "first", "unanswered", "length"]
    assert x == ["x", "4/4/0", "0.75 [0.75, 0.75]", "0.12", "0.75", "0 of 8", "7/10"]
    assert y == ["y", "0/8/0", "0.50 [0.50, 0.50]", "1", "", "0 of 8", "7/10"]
    assert parts.rows[0] == ["x", "1.00", "0.50", "0.75", "0.75"]
    record = grading.record()
    assert record["pairwise"]["x"]["wins"]["value"] == 0.5 and record["pairwise"]["y"]["first_wins"] is None
    assert record["over_baseline"] == {}


def test_equal_categories_have_the_mean_of_all(tmp_path: Path):
    (note,) = rated(*world(tmp_path), lambda m, n, turn: n + 1).notes
    assert note == "The mean of 2 categories is that of all ratings: they have equal sizes."


def test_unequal_categories_are_said(tmp_path: Path):
    (note,) = rated(*world(tmp_path, "aaab"), lambda m, n, turn: 9 if n == 3 else 3).notes
    assert note == (
        "The mean of ratings is not that of the 2 categories, because the categories have different numbers of "
        "questions: base 4.50, of categories 6.00; x 4.50, of categories 6.00; y 4.50, of categories 6.00."
    )


def test_missing_ratings_are_said(tmp_path: Path):
    grading = rated(*world(tmp_path), lambda m, n, turn: None if m == "x" and n < 1 else 1 + n)
    missing, counts, categories = grading.notes
    assert missing == "2 of 8 ratings of x are unanswered and count in no mean. The first: the answer is no rating."
    assert counts.startswith("The means are over different ratings: base 8 (on 4 questions), x 6 (on 3 questions), y 8")
    assert "because answers of the judge are missing: x 3.00, of categories 2.75." in categories
    assert grading.record()["over_baseline"]["x"]["n_questions"] == 3
    assert grading.tables()[0].rows[1][4] == "2 of 8"


def test_references_that_are_missing_are_said(tmp_path: Path):
    asked = [question(1, "math", "1 + 1?"), question(2, "math", "2 + 2?", reference=["4"]), question(3, "stem", "?")]
    benchmark = Benchmark.read(write_lines(tmp_path / "q.jsonl", [*asked, question(4, "coding", "?")]))
    path = write_lines(tmp_path / "base.jsonl", [answer(n, "base", ["x" if n > 1 else ""]) for n in (1, 2, 3)])
    notes = rated(benchmark, read_methods([path], benchmark), lambda m, n, turn: 5).notes
    assert notes[0] == f"3 of the 4 questions of {tmp_path / 'q.jsonl'} were answered."
    assert notes[1] == "Questions of math that were graded without a reference answer: 1."
    assert notes[2] == "1 of 3 answers of base are empty, and were graded as they are."


def test_a_win_rate_is_not_that_of_the_leaderboard(tmp_path: Path):
    asked = [{"instruction": f"do {n}", "dataset": "d"} for n in range(3)]
    benchmark = Benchmark.read(write_list(tmp_path / "q.json", asked))
    paths = [
        write_list(tmp_path / f"{m}.json", [{"instruction": f"do {n}", "output": m, "generator": m} for n in range(3)])
        for m in ("base", "x")
    ]
    methods = read_methods(paths, benchmark)
    judgments = [answered(task, "A") for task in tasks(benchmark, methods, ("pairwise",), "base")]
    grading = Grading(benchmark, methods, "base", judgments, {})
    assert grading.notes == [LEADERBOARD] and len(grading.tables()) == 1
