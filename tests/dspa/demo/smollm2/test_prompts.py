"""Prompts are different, split by task, and depend on the seed alone."""

from __future__ import annotations

import pytest

from dspa.demo.smollm2 import prompts


def test_tasks_are_split_without_overlap():
    learned, held_out = prompts.split_tasks(30, seed=1)
    assert len(held_out) == 30 and not set(learned) & set(held_out)
    assert sorted(learned + held_out) == sorted(prompts.TASKS)
    assert prompts.split_tasks(30, seed=1) == (learned, held_out) != prompts.split_tasks(30, seed=2)


def test_questions_are_different_and_about_their_tasks():
    asked = prompts.questions(["fly a kite", "boil an egg"], 16)
    assert len(set(asked)) == 16 and all(("fly a kite" in text) != ("boil an egg" in text) for text in asked)
    with pytest.raises(ValueError):
        prompts.questions(["fly a kite"], len(prompts.QUESTIONS) + 1)


def test_letters_take_the_registers_in_turn_and_mix_no_phrases():
    written = prompts.letters(["fly a kite"], 40)
    assert [letter.register for letter in written[:3]] == ["formal", "casual", "formal"]
    for letter in written:
        own, other = (prompts.FORMAL, prompts.CASUAL)[:: 1 if letter.register == "formal" else -1]
        assert "fly a kite" in letter.text and letter.text.startswith(own[0]) and letter.text.endswith(own[3])
        assert not letter.text.startswith(other[0]) and not letter.text.endswith(other[3])


def test_chat_prompts_are_questions_and_requests():
    asked = prompts.chat_prompts(1600)
    assert len(asked) == len(set(asked)) == 1600
    n_questions = sum(any(task in text for task in prompts.TASKS) for text in asked)
    n_requests = sum(any(subject in text for subject in prompts.SUBJECTS) for text in asked)
    # Of 880 questions and 1260 requests.
    assert 600 < n_questions < 720 and 880 < n_requests < 1100
    with pytest.raises(ValueError):
        prompts.chat_prompts(880 + 1260 + 1)
