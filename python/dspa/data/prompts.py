"""Prompts of the command line: given, in a file, or typed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_prompts(prompt: str | None, file: Path | None) -> Iterator[str]:
    """What to answer, checked before a model is loaded."""
    if prompt is not None and file is not None:
        raise ValueError("--prompt and --file were both given; accepted: one of them.")
    if prompt is not None:
        if not prompt.strip():
            raise ValueError("--prompt is empty. Steering selects from a prompt: give one.")
        return iter([prompt])
    if file is not None:
        return iter(_prompts_of(file))
    return _asked()


def _prompts_of(file: Path) -> list[str]:
    if not file.is_file():
        raise ValueError(f"--file is {file}, which is not a file; accepted: one prompt a line, or JSON Lines.")
    lines = list(enumerate(file.read_text(encoding="utf-8").splitlines(), start=1))
    found = [_prompt_of(f"{file} line {n}", line, file.suffix) for n, line in lines if line.strip()]
    if not found:
        raise ValueError(f"{file} holds no prompt; accepted: one a line, or JSON Lines with `prompt`.")
    return found


def _prompt_of(name: str, line: str, suffix: str) -> str:
    if suffix != ".jsonl":
        return line
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}: not JSON ({error}).") from error
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{name}: `prompt` is {prompt!r}; accepted: a text that is not empty.")
    return prompt


def _asked() -> Iterator[str]:
    """What is typed, or piped, a line a prompt; each is answered by itself."""
    while True:
        try:
            text = input("> ") if sys.stdin.isatty() else input()
        except EOFError:
            return
        if text.strip():
            yield text


def tokenize_prompt(tokenizer: Any, text: str, chat: bool) -> Any:
    """One prompt as a batch [1, T], put into the chat template for `chat`."""
    if not chat:
        return tokenizer(text, return_tensors="pt")
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
