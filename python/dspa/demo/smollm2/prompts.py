"""Prompts for SmolLM2: questions, and letters in a formal or a casual register.

They are combinations of short phrases. Prompts of different tasks share no task, so that a split by task holds out what
is asked for, and not only how.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

Register = Literal["formal", "casual"]
REGISTERS: tuple[Register, ...] = ("formal", "casual")

ASSETS = Path(__file__).parent / "assets"
# What somebody wants to do.
TASKS = (ASSETS / "tasks.txt").read_text(encoding="utf-8").splitlines()

# How it is asked as a question.
QUESTIONS = (
    "How do I {task}?",
    "What is the best way to {task}?",
    "I want to {task}. Where should I begin?",
    "Can you give me some advice? I would like to {task}.",
    "Tell me how to {task}.",
    "What do I need to know before I {task}?",
    "I have never done this before: how do I {task}?",
    "What mistakes do people make when they want to {task}?",
)

# How it is asked in a letter: greeting, reason, request, end.
FORMAL = (
    (
        "Dear Sir or Madam,",
        "To whom it may concern,",
        "Dear Dr Hargreaves,",
        "Esteemed colleagues,",
        "Dear Mrs Pemberton,",
    ),
    (
        "I am writing to enquire how one might best {task}.",
        "I should be most obliged if you would advise me on how to {task}.",
        "Having recently found it necessary to {task}, I would appreciate your professional opinion.",
        "Following our previous correspondence, I wish to ask how I ought to {task}.",
    ),
    (
        "I would be most grateful for any guidance that you are able to provide.",
        "Your considered recommendation would be greatly appreciated.",
        "Please accept my sincere thanks in advance for your kind assistance.",
        "I remain at your disposal should you require further particulars.",
    ),
    (
        "Yours faithfully, Margaret Ellison",
        "Yours sincerely, Professor A. Whitfield",
        "With kind regards, Edmund Clarke",
        "Respectfully yours, Dr H. Lindqvist",
        "I have the honour to remain, yours truly, Beatrice Thornton",
    ),
)
CASUAL = (
    ("hey!!", "yo,", "hiya,", "heyyy", "sup dude,"),
    (
        "so i kinda wanna {task} and idk where to start lol.",
        "ok so i gotta {task} and i'm totally clueless haha.",
        "any idea how to {task}? i'm so bad at this stuff.",
        "lol guess what, i'm gonna {task}, no clue how tho.",
    ),
    (
        "got any tips for me?",
        "plz help me out!!",
        "what would u do?",
        "just gimme the quick version ok?",
    ),
    ("thx!! jess", "cheers mate, tom", "ur the best xx", "later! benny", "luv ya, mia"),
)

# What somebody wants to know about, and how it is asked.
SUBJECTS = (ASSETS / "subjects.txt").read_text(encoding="utf-8").splitlines()
REQUESTS = (
    "What is special about {subject}?",
    "Explain {subject} to a child of six.",
    "Write a short story about {subject}.",
    "Write a poem of eight lines about {subject}.",
    "Give me three facts about {subject}.",
    "Why do people care about {subject}?",
    "Write a polite e-mail to a museum to ask about {subject}.",
    "Write a funny text message to a friend about {subject}.",
    "Describe {subject} in one sentence.",
    "What questions about {subject} are still open?",
    "Compare {subject} with something that is like it.",
    "Write a news report about {subject}.",
    "Make a list of words that have to do with {subject}.",
    "Write a dialogue between two people who argue about {subject}.",
    "What did people think of {subject} two hundred years ago?",
    "Summarise what is known about {subject} for a busy reader.",
    "Write a formal complaint about {subject}.",
    "Give arguments for and against {subject}.",
)


@dataclass(frozen=True)
class Letter:
    """A letter that asks for advice, in one of two registers."""

    text: str
    register: Register


def split_tasks(n_held_out: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Return the tasks to learn from and `n_held_out` other ones, in an order that depends on the seed."""
    tasks = random.Random(seed).sample(TASKS, len(TASKS))
    return tasks[n_held_out:], tasks[:n_held_out]


def questions(tasks: list[str], n: int, seed: int = 0) -> list[str]:
    """Return `n` different questions for advice about these tasks."""
    every = [form.format(task=task) for task, form in product(tasks, QUESTIONS)]
    return random.Random(seed).sample(every, n)


def letters(tasks: list[str], n: int, seed: int = 0) -> list[Letter]:
    """Return `n` letters about these tasks, the two registers in turn."""
    draw = random.Random(seed)
    return [_letter(REGISTERS[i % 2], draw.choice(tasks), draw) for i in range(n)]


def is_formal(letter: str) -> bool:
    """Return True if a letter is one of the formal ones, by its greeting."""
    return letter.startswith(FORMAL[0])


def chat_prompts(n: int, seed: int = 0) -> list[str]:
    """Return `n` different prompts: questions about all tasks, and requests about many subjects.

    Letters are not among them.
    """
    tasks, _ = split_tasks(0, seed)
    requests = [form.format(subject=subject) for subject, form in product(SUBJECTS, REQUESTS)]
    asked = [form.format(task=task) for task, form in product(tasks, QUESTIONS)]
    return random.Random(seed).sample([*requests, *asked], n)


def _letter(register: Register, task: str, draw: random.Random) -> Letter:
    parts = FORMAL if register == "formal" else CASUAL
    return Letter(" ".join(draw.choice(part).format(task=task) for part in parts), register)
