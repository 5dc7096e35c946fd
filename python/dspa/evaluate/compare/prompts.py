"""Prompts of a comparison: text or messages, with or without an instruction before them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from dspa.data.messages import Text, content_of
from dspa.data.prompts import tokenize_prompt
from dspa.data.triples import Triple
from dspa.errors import ChatTemplateError, refusal


def with_prefix(prompt: Text, prefix: str, *, chat: bool = False) -> Text:
    """Return a prompt with an instruction before it.

    Messages get it as a system message, before one that they begin with. So does text that is meant for the chat
    template (`chat`). Other text begins with it and an empty line.
    """
    if not prefix:
        return prompt
    if isinstance(prompt, str):
        if not chat:
            return f"{prefix}\n\n{prompt}"
        return [{"role": "system", "content": prefix}, {"role": "user", "content": prompt}]
    if prompt[0]["role"] == "system":
        return [{**prompt[0], "content": f"{prefix}\n\n{content_of(prompt[0])}"}, *prompt[1:]]
    return [{"role": "system", "content": prefix}, *prompt]


def triple_with_prefix(triple: Triple, prefix: str) -> Triple:
    """Return a triple whose prompt has an instruction before it."""
    return replace(triple, prompt=with_prefix(triple.prompt, prefix)) if prefix else triple


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Text,
    prefix: str,
    *,
    chat: bool,
    chat_template_kwargs: Mapping[str, Any] | None,
) -> list[int]:
    """Return the token ids of a prompt, messages under the chat template.

    Raises:
        ValueError: the template refuses the messages, and everything that `tokenize_prompt` refuses.
    """
    given = with_prefix(prompt, prefix, chat=chat)
    try:
        return tokenize_prompt(tokenizer, given, chat, chat_template_kwargs)
    except ChatTemplateError as error:
        got = repr(spoken(prompt)[:60])
        accepted = "messages that the template accepts" + (", a system message before them" if prefix else "")
        raise refusal(ValueError, "A prompt", got, accepted, str(error)) from error


def spoken(prompt: Text) -> str:
    """Return the text of a prompt: of messages, that of the last one."""
    return prompt if isinstance(prompt, str) else content_of(prompt[-1])
