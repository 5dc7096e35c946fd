"""Preference triples (prompt, chosen, rejected): formats, reading and validation.

The formats are TRL's (https://huggingface.co/docs/trl/dataset_formats): standard or conversational, with an
explicit or an implicit prompt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias, cast

from dspa.data.lines import check_encodable
from dspa.data.records import ACCEPTED as RECORDS
from dspa.data.records import read_records
from dspa.data.templates import check_names
from dspa.data.token_texts import shared_length
from dspa.errors import PreferenceError, refusal
from dspa.schemas import parse_json

Message: TypeAlias = dict[str, Any]
Text: TypeAlias = str | list[Message]

MESSAGES = "messages that are dicts with text `role` and `content`, or `tool_calls` in place of `content`"
TOOLS = "a list of JSON schemas of functions, or its JSON"
UNNAMED = "triple"


@dataclass(frozen=True)
class Triple:
    """One preference: a prompt, the better response and the worse one.

    Attributes:
        prompt, chosen, rejected: all text, or all lists of messages `{"role": ..., "content": ...}`. The responses
            hold only what follows the prompt.
        name: what errors call the triple, such as "prefs.jsonl line 12". Comparisons ignore it.
        tools: JSON schemas of functions, for the chat template. None without tools.
        chat_template_kwargs: values of the chat template's variables by name.

    Raises:
        PreferenceError: another type, text mixed with messages, an empty field, a conversational response that does
            not begin with the assistant's turn, equal responses, or a reserved name in `chat_template_kwargs`.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    name: str = field(default=UNNAMED, compare=False)
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise `PreferenceError` for invalid fields."""
        _check_fields(self.name, {"prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected})
        for field_name, response in (("chosen", self.chosen), ("rejected", self.rejected)):
            _check_assistant_first(self.name, field_name, response)
        check_names(PreferenceError, f"{self.name}: `chat_template_kwargs`", self.chat_template_kwargs)
        _check_tools(self.name, self.tools)


def load_triples(source: str | Path | Iterable[Mapping[str, Any] | Triple]) -> Iterator[Triple]:
    """Read triples one at a time, and validate each as it is read.

    A mapping has the keys "chosen" and "rejected", and usually "prompt". Conversations may have "tools" (a list of JSON
    schemas, or its JSON) and "chat_template_kwargs". Other keys are ignored. Without "prompt", the prompt is the shared
    beginning of the two responses, as in TRL's `extract_prompt`. The same holds where "prompt" is text while "chosen"
    and "rejected" are conversations that carry it as a user message (UltraFeedback binarized).
    A key whose value is None counts as absent, at any depth, because Arrow fills what is absent from a row so.

    Every triple is named by its file and line, or by its number counted from 1. A `Triple` that has a name keeps it.

    Args:
        source: a path to a file of JSON Lines, a JSON list, CSV or Parquet (`dspa.data.records`), a `datasets.Dataset`
            or `IterableDataset`, or any iterable of mappings or `Triple`s.

    Yields:
        The triples. All those before an invalid one are yielded before it raises.

    Raises:
        PreferenceError: a path that is not a file, an invalid triple, or a source without a triple.
        RuntimeError: Parquet without the package datasets.
    """
    empty = True
    for name, entry in _entries(source):
        yield _make_triple(name, entry)
        empty = False
    if empty:
        from_file = isinstance(source, (str, Path))
        what, kind = (str(source), "file") if from_file else ("`source`", type(source).__name__)
        advice = "Check how it was written, or whether an iterator was already used up."
        raise refusal(PreferenceError, what, f"a {kind} without a triple", "one triple or more", advice)


class DigestedTriples:
    """Triples that are read as by `load_triples`, and their digest and number afterwards.

    Args:
        source: what `load_triples` takes.
    """

    def __init__(self, source: str | Path | Iterable[Mapping[str, Any] | Triple]) -> None:
        self._source, self._keys = source, list[int]()

    def __iter__(self) -> Iterator[Triple]:
        """Yield the triples."""
        self._keys.clear()
        for triple in load_triples(self._source):
            self._keys.append(key_of(triple))
            yield triple

    @property
    def digest(self) -> str:
        """The `digest_of_keys` of the triples that were read."""
        return digest_of_keys(self._keys)

    @property
    def n_triples(self) -> int:
        """Number of the triples that were read."""
        return len(self._keys)


def key_of(triple: Triple) -> int:
    """Return 64 bits of the digest of a triple's content, by which it is recognised."""
    parts: list[Any] = [triple.prompt, triple.chosen, triple.rejected]
    # Left out where there is none, so that keys are those of earlier versions.
    if triple.tools is not None or triple.chat_template_kwargs:
        parts += [triple.tools, triple.chat_template_kwargs]
    content = json.dumps(parts).encode()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big", signed=True)


def digest_of_keys(keys: Iterable[int]) -> str:
    """Return 16 hexadecimal digits that identify triples, in any order, by their `key_of`."""
    return hashlib.sha256(" ".join(map(str, sorted(keys))).encode()).hexdigest()[:16]


def _entries(source: object) -> Iterator[tuple[str, object]]:
    """Yield the name and the raw content of every entry of `source`."""
    accepted = "the path of a file, a datasets.Dataset, an iterable of dicts or Triples"
    if isinstance(source, (str, Path)):
        yield from _records(source)
    elif isinstance(source, Mapping):
        got = f"a {type(source).__name__} with keys {sorted(map(str, source))}"
        advice = "Choose one split, or put a single triple in a list."
        raise refusal(PreferenceError, "`source`", got, accepted, advice)
    elif isinstance(source, Iterable):
        for number, entry in enumerate(source, start=1):
            yield f"triple {number}", entry
    else:
        got = f"of type {_type_name(source)}"
        raise refusal(PreferenceError, "`source`", got, accepted, "Convert it to one of these.")


def _records(path: str | Path) -> Iterator[tuple[str, object]]:
    label, accepted = repr(str(path)), f"the path of a file: {RECORDS}"
    if not Path(path).exists():
        call = f"datasets.load_dataset({label}, split='train')"
        advice = f"If it names a data set of the Hugging Face Hub, load that first and pass it: {call}."
        raise refusal(PreferenceError, label, "a path that does not exist", accepted, advice)
    if Path(path).is_dir():
        advice = (
            "Give the path of a file in it, or load it by `datasets.load_dataset` or `load_from_disk` and pass that."
        )
        raise refusal(PreferenceError, label, "a directory", accepted, advice)
    return read_records(path, PreferenceError)


def _make_triple(name: str, entry: Any) -> Triple:
    """Return the validated triple of a raw entry."""
    if isinstance(entry, Triple):
        return replace(entry, name=name) if entry.name == UNNAMED else entry
    accepted = "an object with 'chosen', 'rejected' and, unless it is their shared beginning, 'prompt'"
    if not isinstance(entry, Mapping):
        got = f"of type {_type_name(entry)}"
        raise refusal(PreferenceError, name, got, accepted, "Give every triple as such an object.")
    entry = _without_none(entry)
    missing = [key for key in ("chosen", "rejected") if key not in entry]
    if missing:
        got = f"without {' and '.join(map(repr, missing))}, with only the keys {sorted(map(str, entry))}"
        raise refusal(PreferenceError, name, got, accepted, "Rename or add the keys.")
    prompt: Any = entry.get("prompt")
    chosen, rejected = entry["chosen"], entry["rejected"]
    conversational = isinstance(chosen, list) and isinstance(rejected, list)
    if "prompt" not in entry or (conversational and isinstance(prompt, str)):
        prompt, chosen, rejected = _split_off_prompt(name, chosen, rejected, prompt)
    if not conversational:
        return Triple(prompt, chosen, rejected, name)
    tools = _parse_tools(name, entry.get("tools"))
    return Triple(prompt, chosen, rejected, name, tools, entry.get("chat_template_kwargs", {}))


def _without_none(value: Any) -> Any:
    """Return a value without the entries of its mappings that are None, at any depth, as TRL's `remove_none_values`."""
    if isinstance(value, Mapping):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list) else value


def _parse_tools(name: str, tools: Any) -> Any:
    """Return the tools of a row, which may be JSON because Arrow has no type for lists of different schemas."""
    if not isinstance(tools, str):
        return tools
    return parse_json(tools, PreferenceError, f"{name}: `tools`", TOOLS, "Correct or remove it.")


def _split_off_prompt(name: str, chosen: object, rejected: object, expected: str | None) -> tuple[Text, Text, Text]:
    """Return the shared beginning, in which a user message has to say `expected`, and what follows it in both."""
    _check_fields(name, {"chosen": chosen, "rejected": rejected})
    chosen, rejected = cast(Text, chosen), cast(Text, rejected)
    length = _prompt_length(chosen, rejected)
    prompt = chosen[:length]
    if expected is not None and not _user_says(cast(list[Message], prompt), expected):
        got = "text, and no user message that `chosen` and `rejected` share says it"
        accepted = "all text, all messages, or a text prompt and conversations that begin with it"
        raise refusal(PreferenceError, f"{name}: `prompt`", got, accepted, "Write the prompt as messages.")
    if not prompt:
        got = "without 'prompt', and 'chosen' and 'rejected' have no beginning in common that could be it"
        accepted = "an explicit 'prompt', or an implicit one with which both begin"
        raise refusal(PreferenceError, name, got, accepted, "Add the prompt or remove the triple.")
    return prompt, chosen[length:], rejected[length:]


def _prompt_length(chosen: Text, rejected: Text) -> int:
    """Return the length of the implicit prompt, as TRL's `extract_prompt` has it.

    TRL's rule departs from the common prefix in two ways. Where one of the two is the beginning of the other, the last
    shared item belongs to the responses. So does a space just before the first difference.
    """
    shared = shared_length(chosen, rejected)
    if shared == min(len(chosen), len(rejected)):
        return max(shared - 1, 0)
    return shared - 1 if chosen[shared - 1 : shared] == " " else shared


def _user_says(messages: list[Message], text: str) -> bool:
    return any(message["role"] == "user" and content_of(message).strip() == text.strip() for message in messages)


def content_of(message: Message) -> str:
    """Return the text of a message, empty where it only calls tools."""
    return message.get("content") or ""


def _type_name(value: object) -> str:
    return type(value).__name__


def _check_fields(name: str, fields: Mapping[str, object]) -> None:
    """Raise unless the fields are all text or all messages, none is empty, and the two responses differ."""
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
            raise refusal(PreferenceError, what, "empty", accepted, "Remove the triple.")
    if fields["chosen"] == fields["rejected"]:
        got = "equal to `rejected`, which prefers nothing"
        raise refusal(PreferenceError, f"{name}: `chosen`", got, "two different responses", "Remove the triple.")


def check_text(name: str, field_name: str, value: object) -> None:
    """Raise `PreferenceError` unless a field of a record is text or messages."""
    if not isinstance(value, (str, list)):
        advice = "Convert it; leave the key out where a prompt is implicit."
        accepted = f"text, or a list of {MESSAGES}"
        raise refusal(PreferenceError, f"{name}: `{field_name}`", f"of type {_type_name(value)}", accepted, advice)
    if isinstance(value, str):
        check_encodable(PreferenceError, f"{name}: `{field_name}`", value)
        return
    for number, message in enumerate(value):
        _check_message(name, f"`{field_name}[{number}]`", message)


def _check_message(name: str, where: str, message: object) -> None:
    if not isinstance(message, dict):
        raise refusal(PreferenceError, f"{name}: {where}", f"of type {_type_name(message)}", MESSAGES, "Convert it.")
    for key in ("role",) if message.get("tool_calls") and not content_of(message) else ("role", "content"):
        if key not in message:
            got = f"without {key!r}, with only the keys {sorted(map(str, message))}"
            raise refusal(PreferenceError, f"{name}: {where}", got, MESSAGES, "Rename or add the key.")
        what = f"{name}: the {key} of {where}"
        if not isinstance(message[key], str):
            got, advice = f"of type {_type_name(message[key])}", "Keep only text, or remove the triple."
            raise refusal(PreferenceError, what, got, MESSAGES, advice)
        check_encodable(PreferenceError, what, message[key])


def _check_tools(name: str, tools: object) -> None:
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise refusal(PreferenceError, f"{name}: `tools`", repr(tools)[:60], TOOLS, "Convert it.")


def _check_assistant_first(name: str, field_name: str, response: Text) -> None:
    if isinstance(response, list) and response[0]["role"] != "assistant":
        what = f"{name}: the first role of `{field_name}` after the prompt"
        advice = "Leave 'prompt' out where the conversations repeat it, or remove the triple."
        raise refusal(PreferenceError, what, repr(response[0]["role"]), "'assistant'", advice)
