"""Preference triples (prompt, chosen, rejected): read, validate, template, tokenise.

The formats are TRL's (https://huggingface.co/docs/trl/dataset_formats): standard or conversational, with an
explicit or an implicit prompt.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from dspa.errors import PreferenceError

if TYPE_CHECKING:
    pass

Message: TypeAlias = dict[str, str]
Text: TypeAlias = str | list[Message]

MESSAGES = "messages that are dicts with text `role` and `content`"
UNNAMED = "triple"


def _refuse(name: str, problem: str, accepted: str, advice: str) -> PreferenceError:
    return PreferenceError(f"{name}: {problem}; accepted: {accepted}. {advice}")


@dataclass(frozen=True)
class Triple:
    """One preference: what was asked, the better response, the worse one.

    `prompt`, `chosen` and `rejected` are all text, or all lists of messages `{"role": ..., "content": ...}`;
    the responses hold only what follows the prompt. `name` is what errors call the triple, such as
    "prefs.jsonl line 12"; it takes no part in comparisons.

    Errors: `PreferenceError` for another type, text mixed with messages, an empty field, a conversational
    response that does not begin with the assistant's turn, equal responses.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    name: str = field(default=UNNAMED, compare=False)

    def __post_init__(self) -> None:
        """Check the fields."""
        _check_fields(self.name, {"prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected})
        for field_name, response in (("chosen", self.chosen), ("rejected", self.rejected)):
            _check_assistant_first(self.name, field_name, response)


def load_triples(source: str | Path | Iterable[Mapping[str, Any] | Triple]) -> Iterator[Triple]:
    """Read triples one at a time, each validated as it is read.

    `source` is a path to a UTF-8 JSON Lines file (blank lines are skipped), a `datasets.Dataset` or
    `IterableDataset`, or any iterable of mappings or `Triple`s. A mapping has the keys "chosen" and
    "rejected", and usually "prompt"; others are ignored. Without "prompt", the prompt is the shared beginning
    of the two, as in TRL's `extract_prompt`. The same holds where "prompt" is text while "chosen" and
    "rejected" are conversations that carry it as a user message (UltraFeedback binarized).

    Every triple is named by its file and line, or by its number counted from 1; a `Triple` that has a name
    keeps it.

    Errors: `PreferenceError`, raised when the iteration comes to it, for a path that is no file, for anything
    that is no triple, and at the end of a source that held none. All triples before it have been yielded.
    """
    empty = True
    for name, entry in _entries(source):
        yield _triple(name, entry)
        empty = False
    if empty:
        label = str(source) if isinstance(source, (str, Path)) else type(source).__name__
        advice = "Check how it was written, or whether an iterator was already used up."
        raise _refuse(label, "holds no triple", "one triple or more", advice)


def _entries(source: object) -> Iterator[tuple[str, object]]:
    """Name and raw content of every entry of `source`."""
    accepted = "a path to a JSON Lines file, a datasets.Dataset, an iterable of dicts or Triples"
    if isinstance(source, (str, Path)):
        yield from _json_lines(source)
    elif isinstance(source, Mapping):
        problem = f"is a {type(source).__name__} with keys {sorted(map(str, source))}"
        raise _refuse("`source`", problem, accepted, "Choose one split, or put a single triple in a list.")
    elif isinstance(source, Iterable):
        for number, entry in enumerate(source, start=1):
            yield f"triple {number}", entry
    else:
        raise _refuse("`source`", f"is of type {_type(source)}", accepted, "Convert it to one of these.")


def _json_lines(path: str | Path) -> Iterator[tuple[str, object]]:
    label, accepted = repr(str(path)), "a JSON Lines file"
    if not Path(path).exists():
        call = f"datasets.load_dataset({label}, split='train')"
        advice = f"If it names a data set of the Hugging Face Hub, load that first and pass it: {call}."
        raise _refuse(label, "does not exist", accepted, advice)
    if Path(path).is_dir():
        raise _refuse(label, "is a directory", accepted, "Give the path of a file in it.")
    # Bytes, because text is decoded in blocks: a bad line would take the good ones before it along.
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                name = f"{path} line {number}"
                yield name, _parsed(name, line)


def _parsed(name: str, line: bytes) -> object:
    try:
        return json.loads(line.decode("utf-8"))
    except ValueError as error:
        problem = f"is not JSON in UTF-8 ({error}): {line[:60]!r}"
        raise _refuse(name, problem, "one JSON object a line", "Correct or remove the line.") from error


def _triple(name: str, entry: object) -> Triple:
    if isinstance(entry, Triple):
        return replace(entry, name=name) if entry.name == UNNAMED else entry
    accepted = "an object with 'chosen', 'rejected' and, unless it is their shared beginning, 'prompt'"
    if not isinstance(entry, Mapping):
        problem = f"is of type {_type(entry)}"
        raise _refuse(name, problem, accepted, "Give every triple as such an object.")
    missing = [key for key in ("chosen", "rejected") if key not in entry]
    if missing:
        problem = f"has no {' and no '.join(map(repr, missing))}, only the keys {sorted(map(str, entry))}"
        raise _refuse(name, problem, accepted, "Rename or add the keys.")
    chosen, rejected = entry["chosen"], entry["rejected"]
    if "prompt" not in entry:
        return _split(name, chosen, rejected)
    prompt = entry["prompt"]
    if isinstance(prompt, str) and isinstance(chosen, list) and isinstance(rejected, list):
        return _split(name, chosen, rejected, prompt)
    return Triple(prompt, chosen, rejected, name)


def _split(name: str, chosen: object, rejected: object, expected: str | None = None) -> Triple:
    """The triple whose prompt is the shared beginning, in which a user message has to say `expected`."""
    _check_fields(name, {"chosen": chosen, "rejected": rejected})
    chosen, rejected = cast(Text, chosen), cast(Text, rejected)
    length = _prompt_length(chosen, rejected)
    prompt = chosen[:length]
    if expected is not None and not _asked(cast(list[Message], prompt), expected):
        problem = "`prompt` is text, and no user message that `chosen` and `rejected` share says it"
        accepted = "all text, all messages, or a text prompt and conversations that begin with it"
        raise _refuse(name, problem, accepted, "Write the prompt as messages.")
    if not prompt:
        problem = "has no 'prompt', and 'chosen' and 'rejected' have no beginning in common that could be it"
        accepted = "an explicit 'prompt', or an implicit one with which both begin"
        raise _refuse(name, problem, accepted, "Add the prompt or remove the triple.")
    return Triple(prompt, chosen[length:], rejected[length:], name)


def _prompt_length(chosen: Text, rejected: Text) -> int:
    """Length of the implicit prompt, as TRL's `extract_prompt` has it.

    TRL's rule departs from the common prefix in two ways: where one of the two is the beginning of the other,
    the last shared item belongs to the responses; so does a space just before the first difference.
    """
    shared = _shared_length(chosen, rejected)
    if shared == min(len(chosen), len(rejected)):
        return max(shared - 1, 0)
    return shared - 1 if chosen[shared - 1 : shared] == " " else shared


def _shared_length(first: Sequence[object], second: Sequence[object]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _asked(messages: list[Message], text: str) -> bool:
    return any(each["role"] == "user" and each["content"].strip() == text.strip() for each in messages)


def _type(value: object) -> str:
    return type(value).__name__


def _check_fields(name: str, fields: Mapping[str, object]) -> None:
    """Raise unless the fields are all text or all messages, none is empty, and the two responses differ."""
    for field_name, value in fields.items():
        _check_type(name, field_name, value)
    kinds = {key: "text" if isinstance(value, str) else "messages" for key, value in fields.items()}
    if len(set(kinds.values())) > 1:
        problem = "; ".join(f"`{key}` is {kind}" for key, kind in kinds.items())
        raise _refuse(name, problem, "all text, or all messages", "Write the text as messages.")
    for field_name, value in fields.items():
        if not value or (isinstance(value, list) and not any(each["content"] for each in value)):
            problem = f"`{field_name}` is empty"
            raise _refuse(name, problem, "text or messages with content", "Remove the triple.")
    if fields["chosen"] == fields["rejected"]:
        problem = "`chosen` and `rejected` are equal, which prefers nothing"
        raise _refuse(name, problem, "two different responses", "Remove the triple.")


def _check_type(name: str, field_name: str, value: object) -> None:
    if not isinstance(value, (str, list)):
        problem = f"`{field_name}` is of type {_type(value)}"
        advice = "Convert it; leave the key out where a prompt is implicit."
        raise _refuse(name, problem, f"text, or a list of {MESSAGES}", advice)
    if isinstance(value, str):
        _check_encodable(name, f"`{field_name}`", value)
        return
    for number, message in enumerate(value):
        _check_message(name, f"`{field_name}[{number}]`", message)


def _check_message(name: str, where: str, message: object) -> None:
    if not isinstance(message, dict):
        raise _refuse(name, f"{where} is of type {_type(message)}", MESSAGES, "Convert it.")
    for key in ("role", "content"):
        if key not in message:
            problem = f"{where} has no {key!r}, only the keys {sorted(map(str, message))}"
            raise _refuse(name, problem, MESSAGES, "Rename or add the key.")
        if not isinstance(message[key], str):
            problem = f"the {key} of {where} is of type {_type(message[key])}"
            raise _refuse(name, problem, MESSAGES, "Keep only text, or remove the triple.")
        _check_encodable(name, f"the {key} of {where}", message[key])


def _check_encodable(name: str, where: str, text: str) -> None:
    # JSON can escape half of a surrogate pair, of which tokenizers only say that they got no text.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        problem = f"{where} has a lone surrogate {text[error.start]!r} at character {error.start}"
        raise _refuse(name, problem, "text that UTF-8 can encode", "Write the whole character.") from error


def _check_assistant_first(name: str, field_name: str, response: Text) -> None:
    if isinstance(response, list) and response[0]["role"] != "assistant":
        problem = f"`{field_name}`, after the prompt, begins with the role {response[0]['role']!r}"
        advice = "Leave 'prompt' out where the conversations repeat it, or remove the triple."
        raise _refuse(name, problem, "responses that begin with the role 'assistant'", advice)
