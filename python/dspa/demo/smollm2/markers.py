"""Countable markers of style in an answer. Each rule is a regular expression, or stated in its function."""

from __future__ import annotations

import re

from dspa.demo.smollm2.prompts import Register, is_formal

# Words of warmth: thanks, joy, praise, encouragement and good wishes.
WARM = re.compile(
    r"\b(?:thank(?:s| you)|glad|happy to|delighted|wonderful|lovely|great (?:idea|question)|excellent question|"
    r"you(?:'ve got this| can do (?:it|this)|'ll do great)|good luck|i hope|enjoy|congratulations|proud|"
    r"don't worry|be kind|smile|best wishes)\b",
    re.IGNORECASE,
)
# A line that begins with a number or a bullet.
LIST_LINE = re.compile(r"^\s*(?:\d+[.)]|[-*•])\s", re.MULTILINE)
# Words of official letters.
FORMAL = re.compile(
    r"\b(?:dear|sincerely|faithfully|regards|respectfully|furthermore|moreover|in addition|therefore|subsequently|"
    r"would (?:recommend|advise|suggest|be pleased)|pleased|kindly|do not hesitate|grateful|gratitude|obliged|"
    r"appreciate|assistance|assist|require|enquir\w+|inquir\w+|correspondence|advisable|prudent|trust that|"
    r"remain at your|ought to|delighted|honou?r|apologi[sz]e)\b",
    re.IGNORECASE,
)
# Words and signs of messages between friends; contractions are among them.
CASUAL = re.compile(
    r"\b(?:hey+|hiya|yo|dude|buddy|pal|mate|lol|haha+|omg|gonna|wanna|gotta|kinda|sorta|lemme|gimme|yeah|yep|nope|"
    r"ok(?:ay)?|cool|awesome|totally|super|btw|idk|plz|thx|u|ur|stuff|guys|no worries|don't sweat|xx|"
    r"\w+'(?:s|re|ll|ve|m|d)|\w+n't)\b|!!+|[\U0001F300-\U0001FAFF]",
    re.IGNORECASE,
)


def count_warm(answer: str) -> int:
    """Return the number of words of warmth."""
    return len(WARM.findall(answer))


def count_list_lines(answer: str) -> int:
    """Return the number of lines that begin with a number or a bullet."""
    return len(LIST_LINE.findall(answer))


def warm_and_structured(prompt: str, answer: str) -> float:
    """Return the number of words of warmth and of list lines together."""
    del prompt
    return float(count_warm(answer) + count_list_lines(answer))


def register_balance(answer: str, register: Register) -> int:
    """Return the number of markers of a register, less those of the other one."""
    balance = len(FORMAL.findall(answer)) - len(CASUAL.findall(answer))
    return balance if register == "formal" else -balance


def own_register(prompt: str, answer: str) -> float:
    """Return the number of markers of the register of a letter in its answer, less those of the other one."""
    return float(register_balance(answer, "formal" if is_formal(prompt) else "casual"))


def repeats(answer: str) -> bool:
    """Return True if an answer goes in circles: fewer than two thirds of its runs of three words are different."""
    words = answer.lower().split()
    runs = list(zip(words, words[1:], words[2:], strict=False))
    return len(set(runs)) * 3 < len(runs) * 2
