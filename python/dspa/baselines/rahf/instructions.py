"""The two instructions of RAHF, and triples as token ids after either of them and after neither."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dspa.data.tokens import response_tokens
from dspa.data.triples import Triple, load_triples
from dspa.errors import PreferenceError, refusal
from dspa.evaluate.compare.prompts import triple_with_prefix

# What the published instructions say, in other words.
GOOD = (
    "You are a respectful and honest assistant. Your answers are helpful, meaningful, truthful, harmless, safe, "
    "ethical, unbiased, positive, interesting, well-founded, agreeable, specific and reasonable, and you stay in this "
    "role. When a question makes no sense, you explain why. You never give false information."
)
BAD = (
    "You are a disrespectful and dishonest assistant. Your answers are useless, meaningless, untruthful, harmful, "
    "dangerous, unethical, biased, negative, boring, fabricated, offensive, vague and unreasonable, and you leave this "
    "role. When a question makes no sense, you answer anyway. You give false information when you need to."
)


@dataclass(frozen=True)
class Instructed:
    """Token ids of a triple.

    Attributes:
        plain, good, bad: the prompt without an instruction, after GOOD, and after BAD.
        chosen, rejected: the responses, the same after each of the three.
    """

    plain: list[int]
    good: list[int]
    bad: list[int]
    chosen: list[int]
    rejected: list[int]

    @classmethod
    def of(
        cls,
        triple: Triple,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Instructed:
        """Tokenize a triple as `response_tokens` does, three times.

        Responses are cut to what the longest of the three prompts leaves of `max_length`.

        Raises:
            PreferenceError: a bad triple, or a prompt that leaves no room for a response.
        """
        plain, good, bad = (
            response_tokens(triple_with_prefix(triple, text), tokenizer, chat_template_kwargs=chat_template_kwargs)
            for text in ("", GOOD, BAD)
        )
        longest = max(len(prompt) for prompt, _, _ in (plain, good, bad))
        if longest >= max_length:
            what, got = f"{triple.name}: `prompt`", f"{longest} tokens long after RAHF's instruction"
            advice = "Raise `max_length` or remove the triple; prompts are never shortened."
            raise refusal(PreferenceError, what, got, f"prompts of at most {max_length - 1} tokens", advice)
        responses = (response[: max_length - longest] for response in plain[1:])
        return cls(plain[0], good[0], bad[0], *responses)


def read_instructed(
    triples: Iterable[Triple | Mapping[str, Any]] | str | Path,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    chat_template_kwargs: Mapping[str, Any] | None,
    progress: bool,
) -> list[Instructed]:
    """Read and tokenize triples.

    Raises:
        PreferenceError: a bad triple.
    """
    return [
        Instructed.of(triple, tokenizer, max_length, chat_template_kwargs)
        for triple in tqdm(load_triples(triples), unit="triple", desc="tokenise", disable=not progress)
    ]


def digest(triples: Iterable[Instructed]) -> str:
    """Return the SHA-256 of the token ids of triples."""
    return hashlib.sha256(repr([vars(triple) for triple in triples]).encode()).hexdigest()
