"""Few-shot prompts: the examples that are most like a prompt, as earlier turns of its conversation."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import log

import numpy as np

from dspa.data.messages import Message, Text, content_of
from dspa.data.triples import Triple
from dspa.errors import refusal
from dspa.evaluate.compare.prompts import spoken
from dspa.intervals import Values

WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Example:
    """A prompt with an answer that a reader likes, both as text."""

    prompt: str
    answer: str


class Examples:
    """Examples by the likeness of their prompts: the cosine of TF-IDF vectors of their words.

    A word counts as often as it occurs, times `log((1 + n) / (1 + n_with)) + 1`, where n_with of n examples have it.

    Args:
        examples: the examples.

    Raises:
        ValueError: no example.
    """

    def __init__(self, examples: Iterable[Example]) -> None:
        self.examples = list(examples)
        if not self.examples:
            raise refusal(ValueError, "`examples`", "empty", "one example or more")
        counts = [_words(example.prompt) for example in self.examples]
        with_word = Counter(word for words in counts for word in words)
        self._places = {word: n for n, word in enumerate(with_word)}
        self._idf = np.array([log((1 + len(counts)) / (1 + n)) + 1 for n in with_word.values()])
        self._vectors = np.stack([self._vector(words) for words in counts])

    def _vector(self, words: Counter[str]) -> Values:
        vector = np.zeros(len(self._places))
        for word, n in words.items():
            if word in self._places:
                vector[self._places[word]] = n * self._idf[self._places[word]]
        norm = np.linalg.norm(vector)
        return vector / norm if norm else vector

    def nearest(self, prompt: str, k: int) -> list[Example]:
        """Return the k examples whose prompts are most like a prompt, the most like first; of equals, the first."""
        likeness = self._vectors @ self._vector(_words(prompt))
        return [self.examples[n] for n in np.argsort(-likeness, kind="stable")[:k]]

    def shown(self, prompt: Text, k: int) -> list[Message]:
        """Return the messages of a prompt after those of its k nearest examples, the most like last.

        A system message stays in front.
        """
        messages: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        turns = [
            {"role": role, "content": content}
            for example in reversed(self.nearest(spoken(prompt), k))
            for role, content in (("user", example.prompt), ("assistant", example.answer))
        ]
        n_system = int(messages[0]["role"] == "system")
        return [*messages[:n_system], *turns, *messages[n_system:]]


def _words(text: str) -> Counter[str]:
    return Counter(WORD.findall(text.lower()))


def examples_of(triples: Iterable[Triple]) -> Sequence[Example]:
    """Return the prompts of triples, of messages the last one, with the chosen responses."""
    return [Example(spoken(triple.prompt), _answer(triple.chosen)) for triple in triples]


def _answer(chosen: Text) -> str:
    return chosen if isinstance(chosen, str) else content_of(chosen[0])
