"""Expressions of users: the matches of `re`, and an end to every search."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from dspa.cli.compare import _counter
from dspa.errors import LabelError
from dspa.evaluate.compare.measures import check_counters, count
from dspa.expressions import compile_expression, count_matches
from dspa.saes.labels import read_labels
from dspa.testing import make_sae

SLOW = {
    r"(a+)+$": "a" * 60 + "!",
    r"(a|aa)+$": "a" * 60 + "!",
    r"(?:a?){40}a{40}$": "a" * 39 + "!",
    r"(\w+\s?)*!$": "word " * 40 + "?",
    r"((a*)*)*b": "a" * 60,
    r"(x+x+)+y": "x" * 60,
    r"^(([a-z])+.)+[A-Z]([a-z])+$": "a" * 60,
    r"(?=(a+)+b)a": "a" * 60,
    r"(.*)(.*)(.*)(.*)(.*)(.*)\1z": "ab" * 400,
}


@pytest.mark.parametrize(("expression", "text"), SLOW.items())
def test_every_search_ends(expression: str, text: str):
    """Within a second of CPU time, with the right number of matches, which is 0, or with an error."""
    started = time.process_time()
    try:
        assert count_matches(compile_expression(expression), text) == 0
    except ValueError as error:
        assert "takes more than 1 s on" in str(error) and repr(expression) in str(error)
    assert time.process_time() - started < 10


def test_some_searches_take_too_long():
    with pytest.raises(ValueError, match=r"'\(a\|aa\)\+\$' takes more than 1 s on 'aaa.*Repeat no group"):
        count_matches(compile_expression(r"(a|aa)+$"), SLOW[r"(a|aa)+$"])


TEXT = "Thank you, THANKS!\nA naïve straße in İstanbul; 12 cats,\tcat cat. [[x]] {e}\n\n- one\n- two\n\u017f K ß"


@pytest.mark.parametrize(
    "expression",
    [
        *(r"(?i)\b(thank|thanks)\b", r"(?im)^- ", r"^$", r"(?m)^\s*$", r"\w+", r"(\w+) \1", r"(?<=, )\w+", r"cat(?!s)"),
        *(
            r"(?i)STRASSE|straße",
            r"(?P<x>c)at",
            r"\d{1,3}",
            r"(?s).*",
            r".*",
            r"",
            r"\b",
            r"[\[\]]",
            r"\{e\}",
            r"(?a)\w+",
        ),
        *(r"(?x) c a t # a cat", r"(?i)[a-k]", r"\S+\Z", r"(?:a|)", r"x*?", r"[^\W\d_]+", r"(?i)s", r"(?a)\w+"),
    ],
)
def test_matches_are_those_of_re(expression: str):
    assert count_matches(compile_expression(expression), TEXT) == len(list(re.finditer(expression, TEXT)))


@pytest.mark.parametrize("flags", [0, re.I, re.M, re.S, re.A, re.I | re.A, re.X])
def test_flags_are_those_of_re(flags: int):
    for expression in (r"thank", r"^- ", r"a.*k", r"\w+", r"c a t"):
        assert count_matches(compile_expression(expression, flags), TEXT) == len(re.findall(expression, TEXT, flags))


@pytest.mark.parametrize("expression", ["(", "[a", r"\q", "a{99999999999}", "(" * 10_000, "(?P<a>x)(?P<a>y)", "*", 3])
def test_invalid_expressions(expression: object, tmp_path: Path):
    with pytest.raises(ValueError):
        compile_expression(expression)  # type: ignore[arg-type]
    (tmp_path / "rules.json").write_text(json.dumps({"x": [expression]}))
    (tmp_path / "labels.json").write_text('[{"index": 0, "description": "a"}]')
    with pytest.raises(LabelError, match="'x' has an invalid expression"):
        read_labels(tmp_path / "labels.json", make_sae(1, 4, seed=1), rules=tmp_path / "rules.json")
    if isinstance(expression, str):
        with pytest.raises(ValueError, match=r"--count n is .*, which does not compile"):
            _counter(f"n={expression}", {})


def test_rules_that_take_too_long(tmp_path: Path):
    (tmp_path / "rules.json").write_text(json.dumps({"x": [r"(a|aa)+$"]}))
    (tmp_path / "labels.json").write_text(json.dumps([{"index": 0, "description": "a" * 60 + "!"}]))
    with pytest.raises(LabelError, match=r"labels.json entry 1: The expression .* takes more than 1 s"):
        read_labels(tmp_path / "labels.json", make_sae(1, 4, seed=1), rules=tmp_path / "rules.json")


def test_counters_that_take_too_long():
    counters = {"x": re.compile(r"(a|aa)+$", re.IGNORECASE)}
    check_counters(counters)
    with pytest.raises(ValueError, match="takes more than 1 s"):
        count("x", counters["x"], "", "A" * 60 + "!")
