"""Counters and axes of style: how long, formal or cautious a text is, by rules in a file that a user can replace."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Annotated

from dspa.errors import refusal
from dspa.expressions import compile_expression, count_matches
from dspa.schemas import Number, OneOf, Text, check, parse_json, read_json, schema

FORMAT = "dspa.style.1"
# The rules that come with the package.
RULES = "style.json"
TYPOGRAPHIC = "\N{RIGHT SINGLE QUOTATION MARK}"
PER = re.compile(r"(?:([1-9]\d*) )?(\S.*)")


@schema
class Rule:
    """One counter as the file holds it, by `pattern` or by `words`.

    Attributes:
        about: one sentence that says what is counted.
        pattern: regular expression of Python's `re`, whose matches are counted.
        words: words and phrases that are counted, as whole words, in upper and lower case.
        per: the name of another rule, without `per` of its own, whose matches the count is divided by; with a number
            before it, per that many. None for the count itself.
    """

    about: Text
    pattern: Text | None = None
    words: list[Text] | None = None
    per: Text | None = None

    def __post_init__(self) -> None:
        if (self.pattern is None) == (self.words is None):
            got = "both" if self.words is not None else "neither"
            raise refusal(ValueError, "`pattern` and `words`", got, "one of them")
        if self.words is not None and not (self.words and all(word.strip() for word in self.words)):
            raise refusal(ValueError, "`words`", self.words, "words or phrases, none empty")
        if self.per is not None and not PER.fullmatch(self.per):
            raise refusal(ValueError, "`per`", repr(self.per), "the name of a rule, such as 'words', or '100 words'")

    @property
    def expression(self) -> str:
        """The regular expression whose matches are counted."""
        if self.words is None:
            return str(self.pattern)
        # The longest first, so that "thank you" is one match and not "thank".
        words = sorted(self.words, key=len, reverse=True)
        either = "|".join(re.escape(word.replace(TYPOGRAPHIC, "'")).replace("'", f"['{TYPOGRAPHIC}]") for word in words)
        return rf"(?i)(?<!\w)(?:{either})(?!\w)"


@schema
class AxisRule:
    """One axis as the file holds it: a weighted sum of counters, between two poles.

    Attributes:
        about: one sentence that names the poles, the positive one first, and what is counted.
        weights: weight of each counter in the sum, by its name.
        offset: what is added to the sum, so that a common text is near 0.
    """

    about: Text
    weights: dict[Text, Number]
    offset: Number = 0.0


@schema
class RuleFile:
    """The file: rules by the names of their counters, and of axes that combine these."""

    format: Annotated[str, OneOf((FORMAT,))]
    counters: dict[Text, Rule]
    axes: dict[Text, AxisRule] = field(default_factory=dict)


@dataclass(frozen=True)
class StyleCounter:
    """A counter of texts: `times * matches / units`, and 0 where a text has no unit.

    Attributes:
        about: one sentence that says what is counted.
        matches: expression of what is counted.
        units: expression of what the count is divided by; None for the count itself.
        times: number of units that the count is given for.
    """

    about: str
    matches: re.Pattern[str]
    units: re.Pattern[str] | None = None
    times: int = 1

    def __call__(self, prompt: str, answer: str) -> float:
        """Return the counter's value for an answer; the prompt does not matter.

        Raises:
            ValueError: a search that takes too long.
        """
        matches = count_matches(self.matches, answer)
        if self.units is None:
            return float(matches)
        units = count_matches(self.units, answer)
        return self.times * matches / units if units else 0.0

    @property
    def pattern(self) -> str:
        """The expressions, for records."""
        return self.matches.pattern + (f" per {self.times} of {self.units.pattern}" if self.units else "")


@dataclass(frozen=True)
class StyleAxis:
    """An axis of style from -1 to 1: `tanh(offset + sum of weight * counter)`.

    Attributes:
        about: one sentence that names the poles, the positive one first, and what is counted.
        terms: weights and counters.
        offset: what is added to the sum.
    """

    about: str
    terms: tuple[tuple[float, StyleCounter], ...]
    offset: float = 0.0

    def __call__(self, prompt: str, answer: str) -> float:
        """Return the axis' value for an answer; the prompt does not matter.

        Raises:
            ValueError: a search that takes too long.
        """
        return math.tanh(self.offset + sum(weight * counter(prompt, answer) for weight, counter in self.terms))

    @property
    def pattern(self) -> str:
        """The formula, for records."""
        terms = [f"{weight:+g} * ({counter.pattern})" for weight, counter in self.terms]
        return f"tanh({' '.join([f'{self.offset:g}', *terms])})"


def style_counters(path: Path | None = None) -> dict[str, StyleCounter]:
    """Return counters by name.

    Args:
        path: a file of rules; None for the rules that come with the package.

    Raises:
        ValueError: something else, an expression that does not compile, or a `per` that no rule has the name of.
        OSError: the file cannot be read.
    """
    name, file = _read(path)
    return _counters(name, file.counters)


def style_axes(path: Path | None = None) -> dict[str, StyleAxis]:
    """Return axes by name, none where the file has none.

    Args:
        path: as for `style_counters`.

    Raises:
        ValueError: as for `style_counters`, an axis of a counter that is not in the file, or one with its name.
        OSError: the file cannot be read.
    """
    name, file = _read(path)
    counters = _counters(name, file.counters)
    if doubled := sorted(file.axes.keys() & counters.keys()):
        raise refusal(ValueError, f"{name}: `axes`", f"with {doubled[0]!r}, as a counter is", "names of their own")
    for axis, rule in file.axes.items():
        unknown = sorted(rule.weights.keys() - counters.keys())
        if unknown or not rule.weights:
            got = f"of {unknown[0]!r}" if unknown else "empty"
            raise refusal(ValueError, f"{name}: {axis}: `weights`", got, f"weights of {', '.join(counters)}")
    return {
        axis: StyleAxis(rule.about, tuple((w, counters[name]) for name, w in rule.weights.items()), rule.offset)
        for axis, rule in file.axes.items()
    }


def _read(path: Path | None) -> tuple[str, RuleFile]:
    """Return the name of a file of rules for messages, and what it holds."""
    if path is None:
        text = files("dspa.evaluate").joinpath(RULES).read_text(encoding="utf-8")
        return RULES, check(RuleFile, parse_json(text, ValueError, RULES), ValueError, RULES)
    return str(path), check(RuleFile, read_json(path, ValueError), ValueError, str(path))


def _counters(name: str, rules: Mapping[str, Rule]) -> dict[str, StyleCounter]:
    """Return the counters of the rules in a file of this name."""
    patterns = {counter: _compiled(f"{name}: {counter}", rule) for counter, rule in rules.items()}
    counters = {}
    for counter, rule in rules.items():
        times, unit = 1, None
        if rule.per is not None:
            match = PER.fullmatch(rule.per)
            assert match is not None
            times, unit = int(match[1] or 1), match[2]
            whole = [other for other, of in rules.items() if of.per is None]
            if unit not in whole:
                accepted = f"a rule without `per` ({', '.join(whole)}), with a number before it or not"
                raise refusal(ValueError, f"{name}: {counter}: `per`", repr(rule.per), accepted)
        counters[counter] = StyleCounter(rule.about, patterns[counter], None if unit is None else patterns[unit], times)
    return counters


def _compiled(what: str, rule: Rule) -> re.Pattern[str]:
    try:
        return compile_expression(rule.expression)
    except ValueError as error:
        got = f"{rule.expression!r}, which does not compile ({error})"
        raise refusal(ValueError, what, got, "a regular expression of Python's re") from error
