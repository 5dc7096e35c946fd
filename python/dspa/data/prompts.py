"""Prompts of the command line: given as an option, read from a file, or typed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from dspa.data.lines import check_encodable, check_file, read_lines, split_lines
from dspa.data.messages import Text, check_text, content_of
from dspa.data.records import ACCEPTED as RECORDS
from dspa.data.records import is_plain_text, read_records
from dspa.data.templates import apply_template, check_template_kwargs
from dspa.data.triples import load_triples
from dspa.errors import refusal

ACCEPTED = f"plain text, one prompt per line; or {RECORDS}, with `prompt`"
RECORD = "an object with `prompt`"


def read_prompts(prompt: str | None, file: Path | None) -> Iterator[str]:
    """Return the prompts to answer, checked before a model is loaded.

    Args:
        prompt: the one of --prompt.
        file: the path of --file: plain text, one prompt per line, or records with `prompt`. Without either, prompts
            are read from standard input, one per line.

    Raises:
        ValueError: both are given, or what is given holds no prompt.
    """
    if prompt is not None and file is not None:
        raise ValueError("--prompt and --file were both given; accepted: one of them.")
    if prompt is not None:
        if not prompt.strip():
            raise refusal(ValueError, "--prompt", "empty", "a text", "Steering selects latents from the prompt.")
        check_encodable(ValueError, "--prompt", prompt)
        return iter([prompt])
    if file is not None:
        return iter(_read_file("--file", file, _text_of))
    return _read_input()


def read_prompt_file(what: str, file: Path) -> list[Text]:
    """Return the prompts of a file as `read_prompts` does, and those of records that are preference triples.

    Args:
        what: what errors call the file.
        file: its path.

    Returns:
        Texts, and lists of messages.

    Raises:
        ValueError: a file that holds no prompt, or something else.
        PreferenceError: a bad triple, or messages of another form.
    """
    return _read_file(what, file, _prompt_of)


T = TypeVar("T", bound=Text)


def _read_file(what: str, file: Path, prompt_of: Callable[[str, Mapping[str, Any]], T]) -> list[T | str]:
    if not file.exists():
        raise refusal(ValueError, what, f"{file}, which is not a file", ACCEPTED)
    check_file(file, ValueError)
    prompts: list[T | str]
    if is_plain_text(file, ValueError):
        prompts = [line for _, line in read_lines(file, ValueError)]
    else:
        prompts = [prompt_of(name, _mapping(name, record)) for name, record in read_records(file, ValueError)]
    if not prompts:
        raise refusal(ValueError, what, f"{file}, which holds no prompt", ACCEPTED)
    return prompts


def _mapping(name: str, record: object) -> Mapping[str, Any]:
    if not isinstance(record, Mapping):
        raise refusal(ValueError, name, f"a JSON {type(record).__name__}", RECORD)
    return record


def _text_of(name: str, record: Mapping[str, Any]) -> str:
    if "prompt" not in record:
        got, advice = f"without `prompt`, with only the keys {sorted(record)}", "Rename or add the key."
        raise refusal(ValueError, name, got, RECORD, advice)
    prompt = record["prompt"]
    if not isinstance(prompt, str) or not prompt.strip():
        raise refusal(ValueError, f"{name}: `prompt`", repr(prompt), "a text that is not empty")
    return prompt


def _prompt_of(name: str, record: Mapping[str, Any]) -> Text:
    if "chosen" in record and "rejected" in record:
        return next(load_triples([record])).prompt
    prompt = record.get("prompt")
    if not isinstance(prompt, list):
        return _text_of(name, record)
    check_prompt(name, prompt)
    return prompt


def check_prompt(name: str, prompt: object) -> None:
    """Raise unless a prompt is text or messages, and has text.

    Args:
        name: what messages call it.
        prompt: the prompt.

    Raises:
        PreferenceError: neither text nor messages.
        ValueError: no text.
    """
    check_text(name, "prompt", prompt)
    texts = [prompt] if isinstance(prompt, str) else map(content_of, cast(list[Any], prompt))
    if not any(text.strip() for text in texts):
        raise refusal(ValueError, f"{name}: `prompt`", "without text", "a text, or messages with text")


def _read_input() -> Iterator[str]:
    """Yield the lines that are typed or piped in, one prompt per line."""
    if not sys.stdin.isatty():
        return (line for _, line in split_lines("standard input", sys.stdin.buffer, ValueError))
    return _read_terminal()


def _read_terminal() -> Iterator[str]:
    while True:
        try:
            text = input("> ")
        except EOFError:
            return
        if text.strip():
            yield text


def tokenize_prompt(
    tokenizer: Any, prompt: Text, chat: bool, chat_template_kwargs: Mapping[str, Any] | None = None
) -> list[int]:
    """Return the token ids of one prompt.

    Args:
        tokenizer: the model's tokenizer.
        prompt: a text, or messages for the tokenizer's chat template.
        chat: put a text into the chat template too, as a user's turn.
        chat_template_kwargs: values of the chat template's variables by name.

    Raises:
        ValueError: text that is not Unicode, a tokenizer without a chat template that the prompt needs, or
            `chat_template_kwargs` without `chat`, or that `check_template_kwargs` refuses.
        ChatTemplateError: as for `apply_template`.
    """
    for text in [prompt] if isinstance(prompt, str) else map(content_of, prompt):
        check_encodable(ValueError, "A prompt", text)
    if chat and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, list):
        if not tokenizer.chat_template:
            got, accepted = "for a chat template, and the tokenizer has none", "text, without chat"
            advice = "Set tokenizer.chat_template, or use the instruction-tuned model."
            raise refusal(ValueError, "A prompt", got, accepted, advice)
        check_template_kwargs(tokenizer, chat_template_kwargs)
        options = dict(chat_template_kwargs or {})
        encoded = apply_template(tokenizer, prompt, add_generation_prompt=True, return_dict=True, **options)
    elif chat_template_kwargs:
        got, accepted = f"{dict(chat_template_kwargs)} for a prompt without the chat template", "none without chat"
        raise refusal(ValueError, "`chat_template_kwargs`", got, accepted, "Put prompts into the template: --chat.")
    else:
        encoded = tokenizer(prompt)
    return list(encoded["input_ids"])
