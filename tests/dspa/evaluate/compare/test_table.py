"""Tables of a comparison: their rows and numbers, on a terminal and in Markdown."""

from __future__ import annotations

import io

from rich.console import Console

from dspa.evaluate.compare.table import TextTable, label

from .test_recommendation import made


def test_tables_of_a_comparison():
    comparison = made({"a": 0.1, "a: random set": 0.02}, {"a": 11.0})
    triples, counters, answers, runs = comparison.tables()
    assert triples.title.endswith("40 held-out triples") and counters.title == "Mean per answer to 40 prompts, 1 seed"
    assert [row[0] for row in triples.rows] == ["base", "a", "  random set"]
    assert [label(method) for method in comparison.methods] == [row[0] for row in runs.rows]
    gain = comparison.gain("margin", "a")
    assert triples.rows[1][4] == f"{gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]*" and triples.rows[0][4] == ""
    assert counters.columns == ["method", "the", "over base"] and counters.rows[1][1] == "1.00"
    assert answers.rows[1][1:3] == ["11.00", "+10.0% [+10.0%, +10.0%]"]
    assert runs.rows[0][1:] == ["1.0", "0%", "", "", "40"]


def test_a_star_is_for_intervals_above_those_of_all_controls():
    stars = [row[4][-1:] == "*" for row in made({"a": 0.1, "a: x": 0.02, "a: y": 0.03}).tables()[0].rows]
    assert stars == [False, True, False, False]
    for margins in ({"a": 0.1, "a: x": 0.02, "a: y": 0.1}, {"a": -0.1, "a: x": -0.5}, {"a": 0.1}):
        assert not any(row[4][-1:] == "*" for row in made(margins).tables()[0].rows)


def test_markdown():
    table = TextTable("A | B", ["method", "x"], [["base", "1"], ["  a|b", "2"]])
    assert table.markdown().splitlines() == [
        "**A | B**",
        "",
        "| method | x |",
        "| --- | ---: |",
        "| base | 1 |",
        "| &emsp;a\\|b | 2 |",
    ]


def test_a_terminal_of_80_columns_breaks_names_and_no_numbers():
    comparison = made({"DSPA ablate 0.2": 0.1, "DSPA ablate 0.2: random set": 0.02})
    output = io.StringIO()
    console = Console(file=output, width=80)
    for table in comparison.tables():
        console.print(table.rich())
    text = output.getvalue()
    gain = comparison.gain("margin", "DSPA ablate 0.2")
    assert f"{gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]" in text and "DSPA ablate 0.2 " in text
    assert max(map(len, text.splitlines())) <= 80
