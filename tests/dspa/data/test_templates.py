"""`dspa.data.templates`: variables that templates read, and settings that would have no effect."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from dspa.data.prompts import tokenize_prompt
from dspa.data.templates import check_template_kwargs, template_variables
from dspa.testing import word_tokenizer

trl = pytest.importorskip("trl")
PUBLISHED = Path(trl.__file__).parent / "chat_templates"
SETTINGS = "{% if polite %}like {% endif %}{{ messages[0].content }}{% if polite is defined %}{% endif %}"


def tokenizer_of(template: Any) -> Any:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("qwen3.jinja", {"enable_thinking"}),
        ("llama3_2.jinja", {"date_string", "strftime_now", "tools_in_user_message"}),
        ("gptoss.jinja", {"strftime_now", "reasoning_effort", "model_identity"}),
        ("qwen3_training.jinja", {"enable_thinking"}),
    ],
)
def test_variables_of_published_templates(name: str, read: set[str]) -> None:
    tokenizer = tokenizer_of((PUBLISHED / name).read_text())
    assert read | {"messages", "add_generation_prompt"} <= template_variables(tokenizer)
    check_template_kwargs(tokenizer, dict.fromkeys(read - {"strftime_now"}, "low"))


def test_several_templates_of_a_tokenizer_count_together() -> None:
    tokenizer = tokenizer_of({"default": "{{ polite }}", "tool_use": "{{ terse }}{# unused #}"})
    assert template_variables(tokenizer) == {"polite", "terse"}


@pytest.mark.parametrize(
    ("kwargs", "problem"),
    [
        ({"polit": True}, r"with polit, which the chat template does not read.*variables of the template \(polite\)"),
        ({"content": "x", "role": "y", "polite": True}, "with content, role, which the chat template does not read"),
        ({"tokenize": False}, "with tokenize, reserved"),
        ({"messages": [], "add_generation_prompt": True}, "with add_generation_prompt, messages, reserved"),
        ({"strftime_now": "today"}, "with strftime_now, reserved"),
        ({"polite": {1, 2}}, "not JSON"),
        ({1: True}, "accepted: an object of names"),
        (["polite"], "accepted: an object of names"),
    ],
)
def test_settings_without_effect_are_refused(kwargs: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=rf"`chat_template_kwargs` is .*{problem}"):
        check_template_kwargs(tokenizer_of(SETTINGS), kwargs)
    with pytest.raises(ValueError, match=problem):
        tokenize_prompt(tokenizer_of(SETTINGS), "the cat", True, kwargs)


def test_settings_without_a_template() -> None:
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        check_template_kwargs(word_tokenizer(), {"polite": True})
    with pytest.raises(ValueError, match=r"for a prompt without the chat template.*--chat"):
        tokenize_prompt(tokenizer_of(SETTINGS), "the cat", False, {"polite": True})
    check_template_kwargs(word_tokenizer(), {})
    check_template_kwargs(word_tokenizer(), None)


@pytest.mark.parametrize(
    ("kwargs", "text"), [(None, "the cat"), ({}, "the cat"), ({"polite": math.pi}, "like the cat")]
)
def test_prompts_get_the_settings(kwargs: dict[str, Any] | None, text: str) -> None:
    tokenizer = tokenizer_of(SETTINGS)
    ids = tokenize_prompt(tokenizer, "the cat", True, kwargs)["input_ids"]
    assert tokenizer.decode(ids[0]) == text
