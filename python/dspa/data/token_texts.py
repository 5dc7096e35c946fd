"""Texts of single tokens, and the pieces of a text that its tokens are."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
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


def token_pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, special: bool = True) -> list[str]:
    """Return the part of a text that each token adds, empty for all but the last of those that share a character.

    Joined, they are the text of all tokens.

    Args:
        tokenizer: the model's tokenizer.
        ids: token ids of the text.
        special: show special tokens, which are empty otherwise.
    """

    def decode(n: int) -> str:
        return str(tokenizer.decode(list(ids[:n]), skip_special_tokens=not special))

    # The first tokens of a character that has several end in a replacement character.
    text = decode(len(ids))
    ends = list(accumulate((shared_length(text, decode(n)) for n in range(1, len(ids) + 1)), max, initial=0))
    return [text[start:end] for start, end in pairwise(ends)]


def shared_length(first: Sequence[object], second: Sequence[object]) -> int:
    """Return the length of the common prefix of two sequences."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
