"""Prompts of the command line: given as an option, read from a file, or typed."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dspa.data.lines import read_lines, split_lines
from dspa.data.records import ACCEPTED as RECORDS
from dspa.data.records import is_plain_text, read_records
from dspa.data.templates import check_template_kwargs
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
        return iter([prompt])
    if file is not None:
        return iter(_read_file(file))
    return _read_input()


def _read_file(file: Path) -> list[str]:
    if not file.is_file():
        raise refusal(ValueError, "--file", f"{file}, which is not a file", ACCEPTED)
    if is_plain_text(file, ValueError):
        prompts = [line for _, line in read_lines(file, ValueError)]
    else:
        prompts = [_prompt_of(name, record) for name, record in read_records(file, ValueError)]
    if not prompts:
        raise refusal(ValueError, "--file", f"{file}, which holds no prompt", ACCEPTED)
    return prompts


def _prompt_of(name: str, record: object) -> str:
    if not isinstance(record, Mapping):
        raise refusal(ValueError, name, f"a JSON {type(record).__name__}", RECORD)
    if "prompt" not in record:
        got, advice = f"without `prompt`, with only the keys {sorted(record)}", "Rename or add the key."
        raise refusal(ValueError, name, got, RECORD, advice)
    prompt = record["prompt"]
    if not isinstance(prompt, str) or not prompt.strip():
        raise refusal(ValueError, f"{name}: `prompt`", repr(prompt), "a text that is not empty")
    return prompt


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
    tokenizer: Any, text: str, chat: bool, chat_template_kwargs: Mapping[str, Any] | None = None
) -> list[int]:
    """Return the token ids of one prompt.

    Args:
        tokenizer: the model's tokenizer.
        text: the prompt.
        chat: put the prompt into the tokenizer's chat template, as a user's turn.
        chat_template_kwargs: values of the chat template's variables by name.

    Raises:
        ValueError: `chat_template_kwargs` without `chat`, or that `check_template_kwargs` refuses.
    """
    if chat:
        check_template_kwargs(tokenizer, chat_template_kwargs)
        messages, options = [{"role": "user", "content": text}], dict(chat_template_kwargs or {})
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, **options)
    elif chat_template_kwargs:
        got, accepted = f"{dict(chat_template_kwargs)} for a prompt without the chat template", "none without chat"
        raise refusal(ValueError, "`chat_template_kwargs`", got, accepted, "Put prompts into the template: --chat.")
    else:
        encoded = tokenizer(text)
    return list(encoded["input_ids"])
