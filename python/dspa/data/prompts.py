"""Prompts of the command line: given as an option, read from a file, or typed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dspa.data.templates import check_template_kwargs
from dspa.errors import refusal


def read_prompts(prompt: str | None, file: Path | None) -> Iterator[str]:
    """Return the prompts to answer, checked before a model is loaded.

    Args:
        prompt: the one of --prompt.
        file: the path of --file, with one prompt per line, or JSON Lines with `prompt`. Without either, prompts are
            read from standard input.

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
    accepted = "one prompt per line, or JSON Lines with `prompt`"
    if not file.is_file():
        raise refusal(ValueError, "--file", f"{file}, which is not a file", accepted)
    lines = list(enumerate(file.read_text(encoding="utf-8").splitlines(), start=1))
    prompts = [_parse_prompt(f"{file} line {n}", line, file.suffix) for n, line in lines if line.strip()]
    if not prompts:
        raise refusal(ValueError, "--file", f"{file}, which holds no prompt", accepted)
    return prompts


def _parse_prompt(name: str, line: str, suffix: str) -> str:
    if suffix != ".jsonl":
        return line
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise refusal(ValueError, name, f"not JSON ({error})", "one JSON object per line") from error
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise refusal(ValueError, f"{name}: `prompt`", repr(prompt), "a text that is not empty")
    return prompt


def _read_input() -> Iterator[str]:
    """Yield the lines that are typed or piped in, one prompt per line."""
    while True:
        try:
            text = input("> ") if sys.stdin.isatty() else input()
        except EOFError:
            return
        if text.strip():
            yield text


def tokenize_prompt(
    tokenizer: Any, text: str, chat: bool, chat_template_kwargs: Mapping[str, Any] | None = None
) -> Any:
    """Tokenize one prompt to a batch [1, T] of tensors.

    Args:
        tokenizer: the model's tokenizer.
        text: the prompt.
        chat: put the prompt into the tokenizer's chat template, as a user's turn.
        chat_template_kwargs: values of the chat template's variables by name.

    Raises:
        ValueError: `chat_template_kwargs` without `chat`, or that `check_template_kwargs` refuses.
    """
    if not chat:
        if chat_template_kwargs:
            got, accepted = f"{dict(chat_template_kwargs)} for a prompt without the chat template", "none without chat"
            raise refusal(ValueError, "`chat_template_kwargs`", got, accepted, "Put prompts into the template: --chat.")
        return tokenizer(text, return_tensors="pt")
    check_template_kwargs(tokenizer, chat_template_kwargs)
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": text}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
        **chat_template_kwargs or {},
    )
