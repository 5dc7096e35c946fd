"""Chat templates: applying them, the variables they read, the settings they are passed, and the date they write."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from inspect import signature
from pathlib import Path
from string import ascii_letters
from types import FrameType
from typing import Any, cast

import jinja2
from jinja2 import Environment, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from transformers import PreTrainedTokenizerBase

from dspa.errors import ChatTemplateError, refusal

# Function by which templates read the clock.
CLOCK = "strftime_now"
# Names that transformers passes to every template itself, or that are arguments of `apply_chat_template`.
RESERVED = frozenset(signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {"self", "kwargs"} | {
    "messages",
    "raise_exception",
    CLOCK,
}
# Steps that a template may take, and characters that it may write, whatever it is given, and per character of that.
# Published templates take up to 100 steps per message, and those that look at each character take 50 for one.
STEPS, STEPS_PER_CHARACTER = 10_000_000, 100
# Compiled templates, and what runs in them.
TEMPLATE_CODE = ("<template>", str(Path(jinja2.__file__).parent))


def apply_template(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], **options: Any) -> Any:
    """Return `tokenizer.apply_chat_template(messages, **options)`, with an end to templates that have none.

    Args:
        tokenizer: a tokenizer that has a chat template.
        messages: the conversation.
        options: further arguments of the method.

    Raises:
        ChatTemplateError: the template refuses the messages or fails, or takes more steps than any published one would.
    """
    size = len(str((messages, options)))
    meter, tracing = _Meter(STEPS + STEPS_PER_CHARACTER * size), sys.gettrace()
    # Steps are counted by tracing, which works in every thread, and does not depend on how fast a machine is.
    sys.settrace(meter.trace)
    try:
        return tokenizer.apply_chat_template(cast(Any, messages), **options)
    except _TooManyStepsError as error:
        raise ChatTemplateError(
            f"The chat template does not come to an end after {meter.limit:,} steps or characters, on a conversation "
            f"of {size:,} characters. Do not use the model that brings it, or set tokenizer.chat_template."
        ) from error
    # A template that does not expect a message raises what its expressions do.
    except Exception as error:
        raise ChatTemplateError(f"The chat template refuses the messages ({error}).") from error
    finally:
        sys.settrace(tracing)


class _TooManyStepsError(BaseException):
    """The end of a template, past all handlers of `Exception` in what it calls."""


class _Meter:
    """The count of the lines of Python that a template has run, and of the characters that these have returned."""

    def __init__(self, limit: int) -> None:
        self.limit, self.steps, self.characters = limit, 0, 0

    def trace(self, frame: FrameType, event: str, result: object) -> Any:
        """Count an event, and return what traces the lines of its function; see `sys.settrace`."""
        self.steps += 1
        if event == "return" and isinstance(result, str):
            self.characters += len(result)
        if max(self.steps, self.characters) > self.limit:
            raise _TooManyStepsError
        return self.trace if frame.f_code.co_filename.startswith(TEMPLATE_CODE) else None


def check_template_kwargs(tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any] | None) -> None:
    """Check settings for the chat template, so that none is without effect.

    Args:
        tokenizer: the model's tokenizer.
        kwargs: values of the template's variables by name, or None.

    Raises:
        ValueError: a reserved name, a name that the template does not read, a value that is not JSON, or a tokenizer
            without a chat template.
    """
    if not kwargs:
        return
    what = "`chat_template_kwargs`"
    if not tokenizer.chat_template:
        got = f"{dict(kwargs)}, and the tokenizer has no chat template"
        raise refusal(ValueError, what, got, "a tokenizer that has one", "Set tokenizer.chat_template.")
    check_names(ValueError, what, kwargs)
    if unread := unread_names(tokenizer, kwargs):
        read = ", ".join(sorted(template_variables(tokenizer) - RESERVED)) or "none"
        got = f"with {', '.join(unread)}, which the chat template does not read"
        raise refusal(ValueError, what, got, f"variables of the template ({read})", "Correct the name or leave it out.")


def check_names(kind: type[Exception], what: str, kwargs: object) -> None:
    """Check that settings for a chat template are named values, none of which has a reserved name.

    Args:
        kind: class of the error.
        what: what the error calls them.
        kwargs: the settings.
    """
    accepted = "an object of names and JSON values"
    if not isinstance(kwargs, Mapping) or not all(isinstance(name, str) for name in kwargs):
        raise refusal(kind, what, repr(kwargs), accepted)
    if reserved := sorted(RESERVED & kwargs.keys()):
        got = f"with {', '.join(reserved)}, reserved for the call of the template"
        raise refusal(kind, what, got, accepted, "Leave it out.")
    try:
        json.dumps(dict(kwargs))
    except (TypeError, ValueError) as error:
        raise refusal(kind, what, f"not JSON ({error})", accepted) from error


def unread_names(tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]) -> list[str]:
    """Return the names that the chat template does not read, in order."""
    return sorted(kwargs.keys() - template_variables(tokenizer))


def template_variables(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """Return the names of the variables that the tokenizer's chat templates read."""
    templates = tokenizer.chat_template or {}
    texts = templates.values() if isinstance(templates, Mapping) else [templates]
    return frozenset().union(*map(_variables, texts))


class _Generation(Extension):
    """The tag with which templates mark the assistant's text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache
def _variables(template: str) -> frozenset[str]:
    # It parses templates, and renders none.
    environment = Environment(extensions=[loopcontrols, _Generation])  # noqa: S701
    return frozenset(meta.find_undeclared_variables(environment.parse(template)))


def date_of_today(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return today's date, as `2026-03-01`, where the tokenizer's chat templates may write it, and None elsewhere."""
    if CLOCK not in template_variables(tokenizer):
        return None
    nothing = [{"role": "user", "content": ""}]
    # The date of the clock that the templates read.
    return cast(
        str, tokenizer.apply_chat_template(nothing, chat_template=f"{{{{ {CLOCK}('%Y-%m-%d') }}}}", tokenize=False)
    )


def at_date(tokenizer: PreTrainedTokenizerBase, date: str | None) -> PreTrainedTokenizerBase:
    """Return a tokenizer whose chat templates write a given date instead of today's; all else is the same.

    Args:
        tokenizer: the tokenizer, which is not changed.
        date: as from `date_of_today`. The time of day is midnight. None leaves the tokenizer as it is.
    """
    if date is None:
        return tokenizer
    templates, clock = tokenizer.chat_template, _clock(date)
    dated = copy.copy(tokenizer)
    if isinstance(templates, Mapping):
        dated.chat_template = {name: clock + template for name, template in templates.items()}
    else:
        dated.chat_template = clock + templates
    return dated


def _clock(date: str) -> str:
    """Return a macro to put before a template, which hides the function of its name that reads the clock.

    A function cannot be passed in its place: newer transformers pass templates nothing but plain data.
    """
    midnight = datetime.fromisoformat(date)
    # Flags of padding, case and era come before the letter, as in "%-d".
    directives = [f"%{flag}{letter}" for flag in ("", *"-_0^#EO") for letter in ascii_letters]
    written = json.dumps([(directive, midnight.strftime(directive)) for directive in directives])
    # A line break after a tag is removed, so the template still begins at the beginning of a line.
    return (
        f"{{% macro {CLOCK}(format) %}}{{% for part in format.split('%%') %}}{{% set text = namespace(is=part) %}}"
        f"{{% for directive, value in {written} %}}{{% set text.is = text.is | replace(directive, value) %}}"
        "{% endfor %}{{ '' if loop.first else '%' }}{{ text.is }}{% endfor %}{% endmacro %}\n"
    )
