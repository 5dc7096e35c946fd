"""Triples are complete, of accepted answers alone, and about tasks of their own file."""

from __future__ import annotations

import json

import pytest

from dspa.demo.smollm2 import markers, preferences, prompts
from dspa.demo.smollm2.preferences import CASUAL, CURT, FORMAL, REGISTER, WARM, WARMTH

WRITTEN = {
    WARM: "Thank you, I am glad that you ask!\n1. Begin.\n2. Go on.",
    CURT: "Begin with one and then go on.",
    FORMAL: "Dear Madam, I would recommend patience. Yours sincerely,",
    CASUAL: "hey dude, just do it lol, it's easy",
}


def test_what_is_shown_has_the_style_that_it_shows():
    for style in WRITTEN:
        for question, answer in style.shown:
            assert style.accepts(answer) and not markers.repeats(answer) and question
    assert not any(WARM.accepts(answer) for _, answer in CURT.shown)
    assert not any(FORMAL.accepts(answer) for _, answer in CASUAL.shown)


def test_an_instruction_comes_before_its_turns_and_the_prompt():
    messages = CURT.messages("Why?")
    assert [message["role"] for message in messages] == ["system", *["user", "assistant"] * 3, "user"]
    assert messages[0]["content"] == CURT.instruction and messages[-1]["content"] == "Why?"


@pytest.mark.parametrize("preference", [WARMTH, REGISTER], ids=lambda preference: preference.name)
def test_triples(preference, monkeypatch, tmp_path):
    """Every second answer is refused at first."""
    refused = set()

    def answers(model, tokenizer, style, asked):
        texts = []
        for prompt in asked:
            again = (style.instruction, prompt) in refused or len(prompt) % 2
            refused.add((style.instruction, prompt))
            texts.append(WRITTEN[style] if again else "no")
        return texts

    monkeypatch.setattr(preferences, "_answers", answers)
    monkeypatch.setattr(preferences, "N_MAP", 40)
    monkeypatch.setattr(preferences, "N_HELD_OUT", 20)
    preferences.write_triples(None, None, preference, tmp_path)
    tasks = dict(zip(("map", "heldout"), prompts.split_tasks(preferences.N_HELD_OUT_TASKS), strict=True))
    for part, n in (("map", 40), ("heldout", 20)):
        lines = (tmp_path / f"{preference.name}-{part}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        texts = [row["prompt"][0]["content"] for row in rows]
        assert len(set(texts)) == n
        for text, row in zip(texts, rows, strict=True):
            assert row["chosen"][0]["content"] == WRITTEN[preference.chosen(text)]
            assert row["rejected"][0]["content"] == WRITTEN[preference.rejected(text)]
            assert any(task in text for task in tasks[part])


def test_styles_that_the_model_cannot_write_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(preferences, "_answers", lambda model, tokenizer, style, asked: ["no"] * len(asked))
    with pytest.raises(RuntimeError, match="50 batches of prompts gave no triple of 'warmth'"):
        preferences.write_triples(None, None, WARMTH, tmp_path)


def test_a_formal_letter_prefers_a_formal_answer():
    formal, casual = (letter.text for letter in prompts.letters(["fly a kite"], 2))
    assert (REGISTER.chosen(formal), REGISTER.rejected(formal)) == (FORMAL, CASUAL)
    assert (REGISTER.chosen(casual), REGISTER.rejected(casual)) == (CASUAL, FORMAL)


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("One. Two! And th", "One. Two!"),
        ("no end at all", "no end at all"),
        (" Yours sincerely,\n", "Yours sincerely,"),
    ],
)
def test_answers_end_with_a_whole_sentence(text, whole):
    assert preferences._whole_sentences(text) == whole
