"""`dspa.data.templates`: variables that templates read, and settings that would have no effect."""

from __future__ import annotations

import math
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from dspa.data import templates
from dspa.data.prompts import tokenize_prompt
from dspa.data.templates import apply_template, at_date, check_template_kwargs, date_of_today, template_variables
from dspa.errors import ChatTemplateError
from dspa.testing import word_tokenizer

from ..support.clock import set_clock

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
    assert tokenizer.decode(tokenize_prompt(tokenizer, "the cat", True, kwargs)) == text


# The date

FORMATS = ["%d %b %Y", "%Y-%m-%d", "%A, %B %-d", "%j %U %y %%d %F", "%_d %^b %Ey", "%H:%M", "no directive"]


@pytest.mark.parametrize("name", ["llama3_2.jinja", "gptoss.jinja", "muse_glimmer.jinja"])
def test_published_templates_at_a_date(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, template = tokenizer_of((PUBLISHED / name).read_text()), (PUBLISHED / name).read_text()

    def written(by: Any) -> Any:
        return by.apply_chat_template([{"role": "user", "content": "the cat"}], tokenize=False)

    set_clock(monkeypatch, "2026-02-28T23:59")
    first, date = written(tokenizer), date_of_today(tokenizer)
    set_clock(monkeypatch, "2026-03-01T00:01")
    assert date == "2026-02-28" and date_of_today(tokenizer) == "2026-03-01"
    assert written(tokenizer) != first
    assert written(at_date(tokenizer, date)) == first
    assert tokenizer.chat_template == template and template_variables(at_date(tokenizer, date)) is not None


@pytest.mark.parametrize("before", ["", "\n", "  ", "\n\n  ", "{# a remark #}\n"])
@pytest.mark.parametrize("written", FORMATS)
def test_a_fixed_date_changes_nothing_else(before: str, written: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch, "2026-03-01T00:00")
    template = (
        f"{before}{{% macro stamp() %}}{{{{ strftime_now('{written}') }}}}{{% endmacro %}}\n"
        "  {% if strftime_now is defined %}{{ stamp() }}{% endif %}\n{{ messages[0].content }}"
    )
    tokenizer = tokenizer_of({"default": template, "tool_use": f"{template} with tools"})
    for tools in (None, [{"name": "f"}]):
        texts = {
            by.apply_chat_template([{"role": "user", "content": "the cat"}], tools=tools, tokenize=False)
            for by in (tokenizer, at_date(tokenizer, "2026-03-01"))
        }
        assert len(texts) == 1 and datetime(2026, 3, 1).strftime(written) in texts.pop()


def test_templates_that_write_no_date() -> None:
    for tokenizer in (tokenizer_of(SETTINGS), word_tokenizer()):
        assert date_of_today(tokenizer) is None and at_date(tokenizer, None) is tokenizer


# Templates without an end

RANGE = "range(99999)"
ENDLESS = {
    "nested loops": f"{{% for i in {RANGE} %}}{{% for j in {RANGE} %}}{{% endfor %}}{{% endfor %}}",
    "that write": f"{{% for i in {RANGE} %}}{{% for j in {RANGE} %}}x{{% endfor %}}{{% endfor %}}",
    "that write much": f"{{% for i in {RANGE} %}}{{{{ messages[0].content * 9999 ~ i }}}}{{% endfor %}}",
    "a macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "filters": f"{{% for i in {RANGE} %}}{{{{ {RANGE} | map('string') | join | length }}}}{{% endfor %}}",
    "a global": "{{ lipsum(n=10 ** 9) }}",
    "doubling": "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
}


@pytest.mark.parametrize("template", ENDLESS.values(), ids=ENDLESS)
def test_a_template_without_an_end(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "STEPS", 100_000)
    with pytest.raises(ChatTemplateError, match=r"does not come to an end after 1\d\d,\d{3} steps or characters"):
        tokenize_prompt(tokenizer_of(template), "the cat", chat=True)
    assert sys.gettrace() is None


def test_a_template_without_an_end_in_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "STEPS", 100_000)
    with ThreadPoolExecutor(1) as pool, pytest.raises(ChatTemplateError, match="does not come to an end"):
        pool.submit(tokenize_prompt, tokenizer_of(ENDLESS["nested loops"]), "the cat", chat=True).result()


@pytest.mark.parametrize("name", ["qwen3", "llama3_2", "gptoss", "smolvlm"])
def test_long_conversations_under_published_templates(name: str) -> None:
    """The one of SmolVLM looks at each character."""
    tokenizer = tokenizer_of((PUBLISHED / f"{name}.jinja").read_text())
    turns = [{"role": role, "content": "the cat is a dog " * 5} for _ in range(100) for role in ("user", "assistant")]
    assert apply_template(tokenizer, turns, tokenize=False) == tokenizer.apply_chat_template(turns, tokenize=False)


@pytest.mark.parametrize("error", ["1 / 0", "messages[9].content", "'a' + 1", "raise_exception('no')", "'%d' % 'a'"])
def test_a_template_that_fails(error: str) -> None:
    with pytest.raises(ChatTemplateError, match=r"The chat template refuses the messages \(.+\)\."):
        tokenize_prompt(tokenizer_of(f"{{{{ {error} }}}}"), "the cat", chat=True)


def test_a_debugger_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    events = list[str]()
    sys.settrace(lambda _frame, event, _result: events.append(event))
    try:
        apply_template(tokenizer_of("a"), [{"role": "user", "content": ""}])
        tracing = sys.gettrace()
    finally:
        sys.settrace(None)
    assert tracing is not None and events
