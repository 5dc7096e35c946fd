"""Texts of single tokens, for people."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Return the text of a token with its leading space, or the tokenizer's name for a part of a character."""
    text, name = str(tokenizer.decode([token])), str(tokenizer.convert_ids_to_tokens(token))
    if "\ufffd" in text:
        return name
    # Tokenizers of SentencePiece drop the space before the first word.
    return f" {text}" if name.startswith("▁") and not text.startswith(" ") else text


def quoted(texts: Iterable[str]) -> str:
    """Return texts in quotes, so that spaces and line breaks show."""
    return " ".join(json.dumps(text, ensure_ascii=False) for text in texts)
