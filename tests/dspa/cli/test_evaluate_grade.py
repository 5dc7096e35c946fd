"""`dspa evaluate grade`: answers graded at an endpoint in a thread, stopped and repeated, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dspa.cli import main

from ..support.benchmarks import answer, question, write_lines
from ..support.endpoint import last, serving

N = 6
METHODS = ("base", "x")


@pytest.fixture
def run(capsys, monkeypatch):
    """Run a command, and return its exit code, standard output, and standard error with line breaks folded."""

    def go(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["dspa", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, " ".join(captured.err.split())

    return go


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six questions of two turns, and answers of two methods: those of x have more words."""
    asked = [question(n, "ab"[n % 2], f"ask {n}", f"more {n}") for n in range(N)]
    write_lines(tmp_path / "q.jsonl", asked)
    for m, method in enumerate(METHODS):
        records = [answer(n, method, ["w " * (n + 1 + 2 * m), "w " * (2 + m)]) for n in range(N)]
        write_lines(tmp_path / f"{method}.jsonl", records)
    monkeypatch.chdir(tmp_path)
    return tmp_path


COMMON = (
    "evaluate",
    "grade",
    "base.jsonl",
    "x.jsonl",
    "--questions",
    "q.jsonl",
    "--judge-model",
    "m",
    "--mode",
    "both",
)


def words(text: str) -> int:
    return len(re.findall(r"^w\b.*", text, re.MULTILINE)[-1].split())


def by_length(request: dict[str, Any]) -> str:
    """A judge that rates the last answer by its words, and prefers the longer one of two."""
    shown = last(request)
    if "[[C]]" not in shown:
        return f"It has words. Rating: [[{min(10, words(shown))}]]"
    a, b = (words(part) for part in shown.split('<conversation of="')[1:])
    return "[[C]]" if a == b else "[[A]]" if a > b else "[[B]]"


def test_grades_are_those_of_the_judge(run, folder):
    pytest.importorskip("openai", reason='needs openai: pip install "dspa-kernels[judge]"')
    with serving(by_length) as endpoint:
        code, out, err = run(*COMMON, "--judge", endpoint.url, "--out", "grades")
        assert code == 0, err
        n_calls = len(endpoint.requests)
    # Second turns are the same for all questions, but not the conversations before them.
    assert n_calls == 2 * N * 2 + 2 * N * 2
    assert f"{n_calls} questions to the judge, by {n_calls} calls" in out
    record = json.loads((folder / "grades" / "grades.json").read_text())
    first = [n + 1 for n in range(N)]
    assert record["single"]["base"]["mean"]["value"] == pytest.approx((sum(first) + 2 * N) / (2 * N))
    assert record["single"]["x"]["turns"]["1"]["value"] == pytest.approx(sum(n + 2 for n in first) / N)
    assert record["over_baseline"]["x"]["value"] == pytest.approx((2 + 1) / 2)
    assert record["pairwise"]["x"]["wins"]["value"] == 1 and record["pairwise"]["x"]["first_wins"]["value"] == 0.5
    assert record["settings"]["judge"] == "m" and record["settings"]["parameters"]["temperature"] == 0
    assert "Ratings, 1 to 10, 6 questions" in out and "Comparisons with base, 6 questions" in out
    assert "The mean of 2 categories is that of all ratings" in out
    lines = [json.loads(line) for line in (folder / "grades" / "judgments.jsonl").read_text().splitlines()]
    assert len(lines) == n_calls and lines[0]["text"] == "It has words. Rating: [[1]]"


def test_replies_that_nobody_can_read_are_no_grades(run, folder):
    pytest.importorskip("openai", reason='needs openai: pip install "dspa-kernels[judge]"')
    with serving(lambda _: "banana") as endpoint:
        code, out, err = run(*COMMON, "--judge", endpoint.url, "--out", "grades")
    assert code != 0 and "None of the judge's 48 replies could be read" in err and "categories" not in out
    assert f"They are in {Path('grades', 'judge')}" in err and "remove that folder" in err
    assert "banana" in (folder / "grades" / "judgments.jsonl").read_text()


def test_a_stopped_grading_goes_on_and_is_replayed(run, folder):
    pytest.importorskip("openai", reason='needs openai: pip install "dspa-kernels[judge]"')
    left = iter(range(10))
    with serving(lambda request: by_length(request) if next(left, None) is not None else (401, "{}")) as endpoint:
        options = ["--judge", endpoint.url, "--out", "grades", "--judge-calls", 1]
        code, _, err = run(*COMMON, *options)
        assert code == 2 and "does not let you in" in err and not (folder / "grades" / "grades.json").exists()
        endpoint.requests.clear()
        endpoint.answer = by_length
        code, out, err = run(*COMMON, *options)
        assert code == 0 and len(endpoint.requests) == 38 and "48 questions to the judge, by 38 calls." in out, err
    code, out, err = run(*COMMON, "--replay", "--judge-cache", "grades/judge", "--out", "again")
    assert code == 0 and "by 0 calls" in out, err
    for name in ("grades.json", "judgments.jsonl"):
        assert (folder / "again" / name).read_bytes() == (folder / "grades" / name).read_bytes()


def test_answers_that_cannot_be_read_are_counted(run, folder):
    pytest.importorskip("openai", reason='needs openai: pip install "dspa-kernels[judge]"')
    with serving(lambda request: "A fine answer." if "ask 3" in last(request) else by_length(request)) as endpoint:
        code, out, _ = run(*COMMON, "--judge", endpoint.url, "--out", "grades")
    assert code == 0 and out.count("2 of 12") >= 3
    assert "2 of 12 ratings of base are unanswered and count in no mean. The first: the answer ends 'A fine" in out
    record = json.loads((folder / "grades" / "grades.json").read_text())
    assert record["single"]["x"]["n_unanswered"] == 2 and record["over_baseline"]["x"]["n_questions"] == N - 1
    assert record["pairwise"]["x"]["n_unanswered"] == 2
    lines = [json.loads(line) for line in (folder / "grades" / "judgments.jsonl").read_text().splitlines()]
    (unread,) = (x for x in lines if (x["mode"], x["method"], x["question_id"], x["turn"]) == ("single", "x", 3, 1))
    assert unread["rating"] is None and unread["text"] == "A fine answer." and "accepted: [[1]]" in unread["problem"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--judge is missing; accepted: the address of an endpoint. Or pass --replay."),
        (
            ["--judge", "http://127.0.0.1:1/v1", "--mode", "triple"],
            "--mode is 'triple'; accepted: single, pairwise, both",
        ),
        (["--replay", "--baseline", "dpo"], "--baseline is 'dpo'; accepted: one of the methods: base, x"),
        (["--replay", "x.jsonl"], "x.jsonl is of the method 'x', as is x.jsonl"),
        (["--replay", "none.jsonl"], "none.jsonl is not a file"),
        (
            ["--replay", "short.jsonl"],
            "short.jsonl is without answers to the questions 1, 2, 3, 4, 5, which base.jsonl",
        ),
        (["--replay", "one-turn.jsonl"], "an answer of 1 turns to 0; accepted: one to each of its 2 turns"),
        (["--replay", "--questions", "other.jsonl"], "base.jsonl line 1 is an answer to 0; accepted: answers to"),
        (["--replay", "--references", "none.jsonl"], "none.jsonl is not a file"),
        (["--replay", "--templates", "."], "accepted: a folder with single.jinja or pairwise.jinja"),
        (["--replay"], "48 of 48 questions have no reply in grades/judge, and the judge may not be called"),
    ],
)
def test_bad_input_is_refused_before_any_call(run, folder, arguments, message):
    write_lines(folder / "short.jsonl", [answer(0, "short", ["a", "b"])])
    write_lines(folder / "one-turn.jsonl", [answer(0, "one", ["a"])])
    write_lines(folder / "other.jsonl", [question(99, "a", "?")])
    code, _, err = run(*COMMON, "--out", "grades", *arguments)
    assert code == 2 and message in err, err
    assert not list((folder / "grades").glob("*"))


def test_files_that_are_read_are_not_overwritten(run, folder):
    (folder / "grades").mkdir()
    write_lines(folder / "grades" / "grades.json", [question(n, "a", "?", "?") for n in range(N)])
    before = (folder / "grades" / "grades.json").read_text()
    code, _, err = run(*COMMON, "--replay", "--questions", "grades/grades.json", "--out", "grades")
    assert code == 2 and "--out is grades/grades.json, as grades/grades.json is" in err
    assert (folder / "grades" / "grades.json").read_text() == before
