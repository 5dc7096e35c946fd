r"""Regular expressions of users, with an end to searches that have none.

They are written as for Python's `re`, and run by the package `regex`, which has its syntax, look-around and references
to groups included, and stops a search that takes too long. Engines of linear time, such as RE2, have neither. `regex`
reads more into two things: `[[:alpha:]]`, and braces with an error, as in `(?:cat){e<=1}`.
"""

from __future__ import annotations

import re
from functools import cache
from itertools import islice
from typing import Any

import regex

# Of one CPU, for all matches in one text. Rules and counters in use take microseconds.
SECONDS = 1.0
FLAGS = ("ASCII", "IGNORECASE", "MULTILINE", "DOTALL", "VERBOSE")


def compile_expression(text: str, flags: int = 0) -> re.Pattern[str]:
    """Return a compiled expression, which `count_matches` can run.

    Args:
        text: the expression.
        flags: those of `re`.

    Raises:
        ValueError: an invalid expression.
    """
    try:
        pattern = re.compile(text, flags)
        _bounded(pattern)
    except (re.error, regex.error, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(str(error)) from error
    return pattern


def count_matches(pattern: re.Pattern[str], text: str, most: int | None = None) -> int:
    """Return the number of matches of an expression in a text, at most `most`.

    Raises:
        ValueError: a search that takes more than `SECONDS`.
    """
    try:
        return sum(1 for _ in islice(_bounded(pattern).finditer(text, timeout=SECONDS), most))
    except TimeoutError as error:
        raise ValueError(
            f"The expression {pattern.pattern!r} takes more than {SECONDS:g} s on {text[:60]!r}. Repeat no group that "
            "repeats, as in (a|aa)+."
        ) from error


@cache
def _bounded(pattern: re.Pattern[str]) -> Any:
    """Return the same expression, compiled by `regex`."""
    flags = [getattr(regex, name) for name in FLAGS if pattern.flags & getattr(re, name)]
    return regex.compile(pattern.pattern, sum(flags) | regex.VERSION0)
