"""Prompts and responses as text or messages, and their validation."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from types import MappingProxyType
from typing import Any, TypeAlias

from dspa.data.lines import check_encodable
from dspa.data.templates import check_names
from dspa.errors import PreferenceError, refusal

Message: TypeAlias = dict[str, Any]
Text: TypeAlias = str | list[Message]

MESSAGES = "messages that are dicts with text `role` and `content`, or `tool_calls` in place of `content`"
TOOLS = "a list of JSON schemas of functions, or its JSON"


def content_of(message: Message) -> str:
    """Return the text of a message, empty where it only calls tools."""
    return message.get("content") or ""


def type_name(value: object) -> str:
    """Return the name of a value's type, for messages."""
    return type(value).__name__


def check_example(
    name: str,
    prompt: object,
    responses: Mapping[str, object],
    tools: object = None,
    chat_template_kwargs: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Check a prompt and the responses to it.

    Args:
        name: what errors call the example.
        prompt: the prompt.
        responses: the responses by what errors call them. They hold only what follows the prompt.
        tools: JSON schemas of functions.
        chat_template_kwargs: values of the chat template's variables.

    Raises:
        PreferenceError: another type, text mixed with messages, an empty field, a conversational response that does
            not begin with the assistant's turn, two equal responses, or a reserved name in `chat_template_kwargs`.
    """
    check_fields(name, {"prompt": prompt, **responses})
    for field_name, response in responses.items():
        if isinstance(response, list) and response[0]["role"] != "assistant":
            what = f"{name}: the first role of `{field_name}` after the prompt"
            advice = "Leave 'prompt' out where the conversations repeat it, or remove the example."
            raise refusal(PreferenceError, what, repr(response[0]["role"]), "'assistant'", advice)
    check_names(PreferenceError, f"{name}: `chat_template_kwargs`", chat_template_kwargs)
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise refusal(PreferenceError, f"{name}: `tools`", repr(tools)[:60], TOOLS, "Convert it.")


def check_fields(name: str, fields: Mapping[str, object]) -> None:
    """Raise unless the fields are all text or all messages, none is empty, and all but the prompt differ."""
    for field_name, value in fields.items():
        check_text(name, field_name, value)
    kinds = {key: "text" if isinstance(value, str) else "messages" for key, value in fields.items()}
    if len(set(kinds.values())) > 1:
        got = f"mixed: {'; '.join(f'`{key}` is {kind}' for key, kind in kinds.items())}"
        raise refusal(PreferenceError, name, got, "all text, or all messages", "Write the text as messages.")
    for field_name, value in fields.items():
        if not value or (
            isinstance(value, list) and not any(content_of(message) or message.get("tool_calls") for message in value)
        ):
            what, accepted = f"{name}: `{field_name}`", "text or messages with content"
            raise refusal(PreferenceError, what, "empty", accepted, "Remove the example.")
    check_different(name, {key: value for key, value in fields.items() if key != "prompt"}, "")


def check_different(name: str, responses: Mapping[str, object], when: str) -> None:
    """Raise `PreferenceError` for equal responses; `when` says when they are, or is empty."""
    for (one, value), (other, same) in combinations(responses.items(), 2):
        if value == same:
            got = f"equal to `{other}`{when}, which prefers nothing"
            raise refusal(
                PreferenceError, f"{name}: `{one}`", got, "different responses", "Remove one, or the example."
            )


def check_text(name: str, field_name: str, value: object) -> None:
    """Raise `PreferenceError` unless a field of a record is text or messages."""
    if not isinstance(value, (str, list)):
        advice = "Convert it; leave the key out where a prompt is implicit."
        accepted = f"text, or a list of {MESSAGES}"
        raise refusal(PreferenceError, f"{name}: `{field_name}`", f"of type {type_name(value)}", accepted, advice)
    if isinstance(value, str):
        check_encodable(PreferenceError, f"{name}: `{field_name}`", value)
        return
    for number, message in enumerate(value):
        _check_message(name, f"`{field_name}[{number}]`", message)


def _check_message(name: str, where: str, message: object) -> None:
    if not isinstance(message, dict):
        raise refusal(PreferenceError, f"{name}: {where}", f"of type {type_name(message)}", MESSAGES, "Convert it.")
    for key in ("role",) if message.get("tool_calls") and not content_of(message) else ("role", "content"):
        if key not in message:
            got = f"without {key!r}, with only the keys {sorted(map(str, message))}"
            raise refusal(PreferenceError, f"{name}: {where}", got, MESSAGES, "Rename or add the key.")
        what = f"{name}: the {key} of {where}"
        if not isinstance(message[key], str):
            got, advice = f"of type {type_name(message[key])}", "Keep only text, or remove the example."
            raise refusal(PreferenceError, what, got, MESSAGES, advice)
        check_encodable(PreferenceError, what, message[key])
