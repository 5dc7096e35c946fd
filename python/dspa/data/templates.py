"""Chat templates: the variables they read, and the settings that a user passes to them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from inspect import signature
from typing import Any

from jinja2 import Environment, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from transformers import PreTrainedTokenizerBase

from dspa.errors import refusal

# Names that transformers passes to every template itself, or that are arguments of `apply_chat_template`.
RESERVED = frozenset(signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {"self", "kwargs"} | {
    "messages",
    "raise_exception",
    "strftime_now",
}


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
    environment = Environment(extensions=[loopcontrols, _Generation])
    return frozenset(meta.find_undeclared_variables(environment.parse(template)))
