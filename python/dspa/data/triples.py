"""Preference triples (prompt, chosen, rejected): formats, reading and validation.

The formats are TRL's (https://huggingface.co/docs/trl/dataset_formats): standard or conversational, with an
explicit or an implicit prompt. Rankings of several responses are read as triples of their best and their worst one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, cast

from dspa.data.messages import TOOLS, Message, Text, check_example, check_fields, content_of, type_name
from dspa.data.rankings import PAIRED, Ranking, falling_rewards, is_ranking, parse_ranking
from dspa.data.rankings import UNNAMED as UNNAMED_RANKING
from dspa.data.records import ACCEPTED as RECORDS
from dspa.data.records import read_records
from dspa.data.token_texts import shared_length
from dspa.errors import PreferenceError, refusal
from dspa.schemas import parse_json

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
        check_example(self.name, self.prompt, self.named_responses, self.tools, self.chat_template_kwargs)

    @property
    def named_responses(self) -> dict[str, Text]:
        """The responses by what errors call them."""
        return {"chosen": self.chosen, "rejected": self.rejected}


Example: TypeAlias = Triple | Ranking
E = TypeVar("E", Triple, Ranking)
# What examples are read from.
Source: TypeAlias = str | Path | Iterable[Mapping[str, Any] | Example]


def load_triples(source: Source) -> Iterator[Triple]:
    """Read triples one at a time, and validate each as it is read.

    A mapping has the keys "chosen" and "rejected", and usually "prompt". Conversations may have "tools" (a list of JSON
    schemas, or its JSON) and "chat_template_kwargs". Other keys are ignored. Without "prompt", the prompt is the shared
    beginning of the two responses, as in TRL's `extract_prompt`. The same holds where "prompt" is text while "chosen"
    and "rejected" are conversations that carry it as a user message (UltraFeedback binarized).
    A key whose value is None counts as absent, at any depth, because Arrow fills what is absent from a row so.

    A ranking, with "responses" and "rewards", is read as the triple of its best and its worst response.

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
    return _load(source, "triple", _make_triple)


def load_rankings(source: Source, *, plain: bool = False) -> Iterator[Ranking]:
    """Read rankings one at a time, and validate each as it is read.

    A mapping has the keys "prompt", "responses" (a list) and "rewards" (a list of as many numbers), or those of
    princeton-nlp/llama3-ultrafeedback-armorm, "prompt", "all_generated_responses" and "all_rm_scores", whose responses
    are the assistant's where "chosen" and "rejected" are conversations. Rankings may differ in their numbers of
    responses. Where the prompt is messages, a response may be the text of the assistant's turn.

    A triple, as `load_triples` reads it, is a ranking of two. Its rewards are "score_chosen" and "score_rejected", or
    "chosen_score" and "rejected_score".

    Args:
        source: as for `load_triples`.
        plain: accept examples without rewards, whose responses are in order from the best to the worst. They get the
            rewards n, n - 1, ..., 1.

    Yields:
        The rankings. All those before an invalid one are yielded before it raises.

    Raises:
        PreferenceError: a path that is not a file, an invalid ranking, or a source without a ranking.
        RuntimeError: Parquet without the package datasets.
    """
    return _load(source, "ranking", partial(_make_ranking, plain=plain))


def _load(source: Source, noun: str, make: Callable[[str, Any], E]) -> Iterator[E]:
    empty = True
    for name, entry in _entries(source, noun):
        yield make(name, entry)
        empty = False
    if empty:
        from_file = isinstance(source, (str, Path))
        what, kind = (str(source), "file") if from_file else ("`source`", type_name(source))
        advice = "Check how it was written, or whether an iterator was already used up."
        raise refusal(PreferenceError, what, f"a {kind} without a {noun}", f"one {noun} or more", advice)


class DigestedExamples:
    """Examples, and their digest and number after they were read.

    Args:
        examples: triples or rankings.
    """

    def __init__(self, examples: Iterable[Example]) -> None:
        self._examples, self._keys = examples, list[int]()

    def __iter__(self) -> Iterator[Example]:
        """Yield the examples."""
        self._keys.clear()
        for example in self._examples:
            self._keys.append(key_of(example))
            yield example

    @property
    def digest(self) -> str:
        """The `digest_of_keys` of the examples that were read."""
        return digest_of_keys(self._keys)

    @property
    def n_examples(self) -> int:
        """Number of the examples that were read."""
        return len(self._keys)


def key_of(example: Example) -> int:
    """Return 64 bits of the digest of an example's content, by which it is recognised."""
    parts: list[Any] = [example.prompt, *example.named_responses.values()]
    if isinstance(example, Ranking):
        parts.append(list(example.rewards))
    # Left out where there is none, so that keys are those of earlier versions.
    if example.tools is not None or example.chat_template_kwargs:
        parts += [example.tools, example.chat_template_kwargs]
    content = json.dumps(parts).encode()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big", signed=True)


def digest_of_keys(keys: Iterable[int]) -> str:
    """Return 16 hexadecimal digits that identify examples, in any order, by their `key_of`."""
    return hashlib.sha256(" ".join(map(str, sorted(keys))).encode()).hexdigest()[:16]


def _entries(source: object, noun: str) -> Iterator[tuple[str, object]]:
    """Yield the name and the raw content of every entry of `source`; `noun` says what one is."""
    accepted = f"the path of a file, a datasets.Dataset, an iterable of dicts or {noun.capitalize()}s"
    if isinstance(source, (str, Path)):
        yield from _records(source)
    elif isinstance(source, Mapping):
        got = f"a {type(source).__name__} with keys {sorted(map(str, source))}"
        advice = f"Choose one split, or put a single {noun} in a list."
        raise refusal(PreferenceError, "`source`", got, accepted, advice)
    elif isinstance(source, Iterable):
        for number, entry in enumerate(source, start=1):
            yield f"{noun} {number}", entry
    else:
        got = f"of type {type_name(source)}"
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
    entry = entry if isinstance(entry, Ranking) else _as_mapping(name, entry, accepted)
    if isinstance(entry, Ranking) or (is_ranking(entry) and "chosen" not in entry):
        ranking = _make_ranking(name, entry, plain=False)
        return Triple(ranking.prompt, *ranking.extremes, ranking.name, ranking.tools, ranking.chat_template_kwargs)
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


def _make_ranking(name: str, entry: Any, *, plain: bool) -> Ranking:
    """Return the validated ranking of a raw entry, or of a triple."""
    if isinstance(entry, Ranking):
        return replace(entry, name=name) if entry.name == UNNAMED_RANKING else entry
    accepted = "an object with 'prompt', 'responses' and 'rewards', or with 'chosen' and 'rejected'"
    if not isinstance(entry, Triple):
        entry = _as_mapping(name, entry, accepted)
        if is_ranking(entry):
            conversational = isinstance(entry.get("chosen"), list)
            prompt = _make_triple(name, entry).prompt if conversational else entry.get("prompt")
            return parse_ranking(name, entry, prompt, _parse_tools(name, entry.get("tools")), plain=plain)
        if not {"chosen", "rejected"} <= entry.keys():
            got = f"an object with only the keys {sorted(map(str, entry))}"
            raise refusal(PreferenceError, name, got, accepted, "Rename or add the keys.")
    triple, scores = _make_triple(name, entry), {} if isinstance(entry, Triple) else entry
    names = next((names for names in PAIRED if any(key in scores for key in names)), PAIRED[0])
    rewards = [scores[key] for key in names if key in scores]
    rewards = rewards or falling_rewards(triple.name, "' and '".join(names), 2, plain=plain)
    responses = (triple.chosen, triple.rejected)
    return Ranking(triple.prompt, responses, rewards, triple.name, triple.tools, triple.chat_template_kwargs)


def _as_mapping(name: str, entry: Any, accepted: str) -> Any:
    """Return a raw entry that is a mapping, without what is None in it."""
    if not isinstance(entry, Mapping):
        raise refusal(
            PreferenceError, name, f"of type {type_name(entry)}", accepted, "Give each one as such an object."
        )
    return _without_none(entry)


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
    check_fields(name, {"chosen": chosen, "rejected": rejected})
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
        raise refusal(PreferenceError, name, got, accepted, "Add the prompt or remove the example.")
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
