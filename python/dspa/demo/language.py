"""The language of the demo: letters that ask for advice, and answers in one of two styles.

A prompt is written in a register (formal or casual) and is about a topic. An answer is about the same
topic. It is written with words that come in pairs, one of each style ("start" and "commence"), between
words without a style. In the corpus, the style of an answer is independent of the register of its prompt.
The preference is not: an answer is preferred if it is written in the register of its prompt.
"""

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Style = Literal["formal", "casual"]

STYLES: tuple[Style, Style] = ("formal", "casual")

TOPICS: dict[str, tuple[str, ...]] = {
    "garden": ("lawn", "roses", "hedge", "soil", "seeds", "pond", "shed", "orchard"),
    "kitchen": ("oven", "soup", "bread", "knives", "pans", "spices", "dough", "pantry"),
    "music": ("piano", "violin", "choir", "melody", "drums", "lyrics", "stage", "guitar"),
    "travel": ("tickets", "luggage", "hotel", "map", "train", "harbour", "passport", "island"),
    "office": ("desk", "printer", "report", "budget", "calendar", "meeting", "folder", "archive"),
    "health": ("diet", "sleep", "posture", "vitamins", "clinic", "exercise", "muscles", "bandage"),
}

# Word pairs of the answers: (formal, casual). Either word of a pair fits wherever the other does.
PAIRS: dict[str, tuple[tuple[str, str], ...]] = {
    "verb": (
        ("obtain", "get"),
        ("purchase", "buy"),
        ("utilize", "use"),
        ("require", "need"),
        ("inspect", "check"),
        ("select", "pick"),
        ("repair", "fix"),
        ("retain", "keep"),
        ("demonstrate", "show"),
        ("commence", "start"),
        ("construct", "build"),
        ("relocate", "move"),
    ),
    "adjective": (
        ("substantial", "big"),
        ("excellent", "great"),
        ("entire", "whole"),
        ("appropriate", "right"),
        ("economical", "cheap"),
        ("attractive", "pretty"),
        ("robust", "tough"),
        ("delicate", "flimsy"),
    ),
    "adverb": (
        ("subsequently", "then"),
        ("promptly", "fast"),
        ("frequently", "often"),
        ("primarily", "mostly"),
        ("merely", "just"),
        ("thoroughly", "totally"),
    ),
    "opener": (
        ("certainly", "yeah"),
        ("indeed", "sure"),
        ("furthermore", "plus"),
        ("nevertheless", "still"),
        ("consequently", "so"),
        ("additionally", "also"),
    ),
    "helper": (
        ("specialists", "pros"),
        ("acquaintances", "friends"),
        ("children", "kids"),
        ("individuals", "folks"),
        ("assistants", "helpers"),
        ("relatives", "family"),
    ),
}

ANSWER_SHAPES: tuple[str, ...] = (
    "{opener}, you should {verb} the {adjective} {noun} and {adverb} {verb} the {noun}.",
    "{opener}, the {helper} can {adverb} {verb} the {adjective} {noun}.",
    "{adverb} {verb} the {noun} before you {verb} the {adjective} {noun}.",
    "your {helper} will {adverb} {verb} the {noun} with the {adjective} {noun}.",
    "you may {verb} the {adjective} {noun} for the {helper} and {verb} the {noun}.",
    "{opener}, {verb} the {noun} while the {helper} {adverb} {verb} the {noun}.",
    "the {adjective} {noun} must {adverb} {verb} the {adjective} {noun}.",
    "if the {helper} {verb} the {noun}, {adverb} {verb} the {adjective} {noun}.",
)

# Words of the two registers for the same places of a prompt. None of them is in an answer.
FILLERS: dict[Style, dict[str, tuple[str, ...]]] = {
    "formal": {
        "greeting": ("dear", "esteemed", "honourable", "respected"),
        "reader": ("sir", "madam", "colleague", "professor"),
        "request": (
            "would you graciously advise me",
            "might you kindly counsel me",
            "could you courteously enlighten me",
            "shall you generously instruct me",
        ),
        "about": ("regarding", "concerning"),
        "intent": ("i intend to", "i endeavour to", "i aspire to", "it behoves me to"),
        "work": ("cultivate", "ameliorate", "examine", "perfect"),
        "feeling": (
            "it perplexes me considerably",
            "i remain profoundly uncertain",
            "it occasions considerable concern",
            "i confess profound ignorance",
        ),
        "closing": (
            "sincerely yours",
            "respectfully yours",
            "with utmost gratitude",
            "with sincere appreciation",
        ),
    },
    "casual": {
        "greeting": ("hey", "hi", "yo", "hiya"),
        "reader": ("mate", "dude", "pal", "buddy"),
        "request": (
            "can ya gimme tips",
            "wanna toss me hints",
            "gotta bug ya quick",
            "lemme pester ya again",
        ),
        "about": ("bout", "on"),
        "intent": ("im gonna", "i wanna", "im tryna", "i gotta"),
        "work": ("tweak", "hack", "rock", "tackle"),
        "feeling": (
            "its driving me nuts",
            "im like super lost",
            "its kinda super weird",
            "im dead clueless here",
        ),
        "closing": ("cheers a bunch", "thanks a bunch", "later gator", "catch ya later"),
    },
}

PROMPT_OPENING = "{greeting} {reader}, {request} {about} the {noun}"
PROMPT_MIDDLES: tuple[str, ...] = (
    "{intent} {work} the {noun}",
    "{intent} {work} the {noun} near the {noun}",
    "{feeling} {about} the {noun}",
    "{feeling}",
)
PROMPT_END = "{closing}. answer:"

SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>")

STYLE_OF: dict[str, Style] = {
    word: style for pairs in PAIRS.values() for pair in pairs for word, style in zip(pair, STYLES, strict=True)
}

_SLOT = re.compile(r"\{(\w+)\}")
_WORD = re.compile(r"\w+|[^\w\s]+")


@dataclass(frozen=True)
class Prompt:
    """A letter that ends where its answer begins."""

    text: str
    register: Style
    topic: str


def words(text: str) -> list[str]:
    """Split a text into words and punctuation marks, one per token of the demo's tokenizer."""
    return _WORD.findall(text)


def vocabulary() -> list[str]:
    """Return every token of the language: special tokens, then words in alphabetical order."""
    texts = [*ANSWER_SHAPES, PROMPT_OPENING, *PROMPT_MIDDLES, PROMPT_END, *STYLE_OF]
    texts += [noun for nouns in TOPICS.values() for noun in nouns]
    texts += [text for fillers in FILLERS.values() for choices in fillers.values() for text in choices]
    return [*SPECIAL_TOKENS, *sorted({word for text in texts for word in words(_SLOT.sub(" ", text))})]


def preferred_style(register: Style) -> Style:
    """Return the preferred style of an answer to a prompt of this register: the same one."""
    return register


def other_style(style: Style) -> Style:
    """Return formal for casual, and casual for formal."""
    return "casual" if style == "formal" else "formal"


def sample_prompt(rng: random.Random, register: Style | None = None) -> Prompt:
    """Draw a prompt of a given register, or of either with equal odds."""
    own: Style = rng.choice(STYLES) if register is None else register
    topic = rng.choice(list(TOPICS))
    middles = [rng.choice(PROMPT_MIDDLES) for _ in range(rng.randint(1, 3))]
    shape = ". ".join([PROMPT_OPENING, *middles, PROMPT_END])
    fillers = {**FILLERS[own], "noun": TOPICS[topic]}
    text = _SLOT.sub(lambda slot: rng.choice(fillers[slot[1]]), shape)
    return Prompt(text, own, topic)


def sample_response(rng: random.Random, topic: str, style: Style, *, drift: float = 0.0, sentences: int = 3) -> str:
    """Draw an answer that begins in `style`; each later styled word switches style with probability `drift`.

    It begins with a space, so that prompt + response is a text.
    """
    current = style
    first = True

    def fill(slot: re.Match[str]) -> str:
        nonlocal current, first
        if slot[1] == "noun":
            return rng.choice(TOPICS[topic])
        if not first and rng.random() < drift:
            current = other_style(current)
        first = False
        return rng.choice(PAIRS[slot[1]])[STYLES.index(current)]

    shapes = [rng.choice(ANSWER_SHAPES) for _ in range(sentences)]
    return "".join(" " + _SLOT.sub(fill, shape) for shape in shapes)


def corpus(rng: random.Random, *, drift: float) -> Iterator[str]:
    """Yield documents without end: a prompt, and an answer in a style that does not depend on the register."""
    while True:
        prompt = sample_prompt(rng)
        yield prompt.text + sample_response(rng, prompt.topic, rng.choice(STYLES), drift=drift)


def preferences(rng: random.Random, count: int) -> Iterator[dict[str, str]]:
    """Yield preference triples, the registers in turn."""
    for index in range(count):
        prompt = sample_prompt(rng, STYLES[index % 2])
        style = preferred_style(prompt.register)
        yield {
            "prompt": prompt.text,
            "chosen": sample_response(rng, prompt.topic, style),
            "rejected": sample_response(rng, prompt.topic, other_style(style)),
        }


def held_out(rng: random.Random, count: int, *, unlike: frozenset[str]) -> Iterator[dict[str, str]]:
    """Yield prompts outside `unlike`, the registers in turn, each with an answer of either style for perplexity."""
    for index in range(count):
        prompt = sample_prompt(rng, STYLES[index % 2])
        while prompt.text in unlike:
            prompt = sample_prompt(rng, STYLES[index % 2])
        style = STYLES[index // 2 % 2]
        yield {
            "prompt": prompt.text,
            "response": sample_response(rng, prompt.topic, style),
            "register": prompt.register,
            "topic": prompt.topic,
        }


def write_json_lines(path: Path, rows: Iterator[dict[str, str]]) -> None:
    """Write one JSON object per line."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def count_style_words(text: str, style: Style) -> tuple[int, int]:
    """Return how many words of a text are of `style`, and how many are of either style."""
    styles = [STYLE_OF[word] for word in words(text) if word in STYLE_OF]
    return styles.count(style), len(styles)


def neutral_positions(tokens: Sequence[str]) -> list[bool]:
    """Return, per token, True for a word without a style; special tokens are False."""
    return [token not in STYLE_OF and token not in SPECIAL_TOKENS for token in tokens]
