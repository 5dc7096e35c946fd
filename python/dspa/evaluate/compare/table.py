"""Tables of a comparison, for a terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from dspa.evaluate.compare.figures import Figures
from dspa.evaluate.compare.measures import EDITED, MARGIN, OF_TRIPLES, PERPLEXITY, TOUCHED, Figure
from dspa.evaluate.compare.methods import BASE, Method

# Counters per table, as many as 80 columns hold.
COUNTERS = 2
LEGEND = (
    "Brackets hold 95 % bootstrap intervals of the paired difference to the base model, over prompts or triples, all "
    "seeds of a prompt drawn together. Controls are indented below their method. *: the interval is above 0 and above "
    "those of all controls. perplexity: of all answers' tokens under the base model; tokens: per answer; ended: share "
    "of answers that end by themselves; edited: share of tokens that were predicted from an edited residual; "
    "touched: share that a gate let through, or that were junctions; unsteered: prompts that select nothing to edit; "
    "GFLOP: per token of an answer, at most, without reading prompts. Junction steering has no log-probabilities of "
    "given responses, since it gives all but its candidates a probability of 0."
)


@dataclass(frozen=True)
class TextTable:
    """A table of text, whose first column is the method."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    def rich(self) -> Table:
        """Return the table for a terminal."""
        table = Table(
            title=Text(self.title, style="table.title"), box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left"
        )
        for n, column in enumerate(self.columns):
            intervals = any("[" in row[n] for row in self.rows) and n > 0
            table.add_column(Text(column), justify="right" if n else "left", overflow="fold", no_wrap=intervals)
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table

    def markdown(self) -> str:
        """Return the table in Markdown, under its title."""
        rule = ["---", *("---:" for _ in self.columns[1:])]
        rows = [[cell.replace("|", "\\|").replace("  ", "&emsp;") for cell in row] for row in self.rows]
        return "\n".join([f"**{self.title}**", "", *(f"| {' | '.join(row)} |" for row in (self.columns, rule, *rows))])


def tables(comparison: Figures) -> list[TextTable]:
    """Return the tables of held-out triples, of counters and of answers, those that there are."""
    n_prompts, n_seeds = len(comparison.prompts), len(comparison.seeds)
    texts = f"{n_prompts} prompts, {n_seeds} seed{'s' * (n_seeds > 1)}"
    made = []
    if comparison.scores:
        n_triples = len(comparison.scores[BASE][0].chosen)
        made.append(_table(comparison, f"Log-probability per token on {n_triples} held-out triples", _of_triples))
    names = list(comparison.counters)
    for start in range(0, len(names), COUNTERS):
        cells = partial(_of_counters, names=names[start : start + COUNTERS])
        made.append(_table(comparison, f"Mean per answer to {texts}", cells))
    made.append(_table(comparison, f"Answers to {texts}: perplexity under the base model, repetition", _of_answers))
    made.append(_table(comparison, f"Answers to {texts}: length, edits, speed", _of_runs))
    return made


Cells = list[tuple[str, str]]


def _table(comparison: Figures, title: str, cells: Callable[[Figures, Method], Cells]) -> TextTable:
    rows = [(label(method), cells(comparison, method)) for method in comparison.methods]
    columns = [name for name, _ in rows[0][1]]
    return TextTable(title, ["method", *columns], [[name, *(text for _, text in row)] for name, row in rows])


def label(method: Method) -> str:
    """Return the name of a method in a table: of a control, its own part of it, indented."""
    return f"  {method.name.removeprefix(f'{method.control_of}: ')}" if method.control_of else method.name


def _of_triples(comparison: Figures, method: Method) -> Cells:
    chosen, rejected, margin, accuracy = (comparison.figure(measure, method.name) for measure in OF_TRIPLES)
    return [
        ("chosen", _number(chosen, "+.3f")),
        ("rejected", _number(rejected, "+.3f")),
        ("margin", _number(margin, "+.3f")),
        ("over base", _gain(comparison, MARGIN, method) + _star(comparison, MARGIN, method)),
        ("accuracy", _number(accuracy, ".1%")),
    ]


def _of_counters(comparison: Figures, method: Method, names: Sequence[str]) -> Cells:
    return [
        cell
        for name in names
        for cell in (
            (name, _number(comparison.figure(name, method.name), ".2f")),
            ("over base", _gain(comparison, name, method, ".2f") + _star(comparison, name, method)),
        )
    ]


def _of_answers(comparison: Figures, method: Method) -> Cells:
    def number(measure: str, style: str) -> str:
        return _number(comparison.figure(measure, method.name), style)

    return [
        (PERPLEXITY, number(PERPLEXITY, ".2f")),
        ("over base", _gain(comparison, PERPLEXITY, method, ".1%")),
        ("distinct-1, 2, 3", " ".join(number(f"distinct_{n}", ".2f") for n in (1, 2, 3))),
    ]


def _of_runs(comparison: Figures, method: Method) -> Cells:
    unsteered = comparison.unsteered(method.name)
    return [
        ("tokens", _number(comparison.figure("length", method.name), ".1f")),
        ("ended", _number(comparison.figure("ended", method.name), ".0%")),
        ("edited", _number(comparison.figure(EDITED, method.name), ".0%")),
        *_of_gates(comparison, method),
        ("unsteered", "" if unsteered is None else str(unsteered)),
        ("tokens/s", f"{comparison.speed(method.name):.0f}"),
    ]


def _of_gates(comparison: Figures, method: Method) -> Cells:
    """Return what only comparisons with gates or junctions show."""
    if not any(TOUCHED in sums for sums in comparison.sums.values()):
        return []
    operations = comparison.operations.get(method.name)
    return [
        (TOUCHED, _number(comparison.figure(TOUCHED, method.name), ".0%")),
        ("GFLOP", "" if operations is None else f"{1e-9 * operations:.4g}"),
    ]


def _number(figure: Figure | None, style: str) -> str:
    return "" if figure is None else format(figure.value, style)


def _star(comparison: Figures, measure: str, method: Method) -> str:
    return "*" if comparison.controls(method.name) and comparison.apart(measure, method.name) else ""


def _gain(comparison: Figures, measure: str, method: Method, style: str = ".3f") -> str:
    gain = None if method.name == BASE else comparison.gain(measure, method.name)
    if gain is None:
        return ""
    value, low, high = (format(number, f"+{style}") for number in (gain.value, gain.low, gain.high))
    return f"{value} [{low}, {high}]"
