"""Instructions before prompts, and the tokens of both."""

from __future__ import annotations

import pytest

from dspa.data.triples import Triple
from dspa.evaluate.compare.prompts import encode, spoken, triple_with_prefix, with_prefix
from dspa.testing import word_tokenizer

USER = {"role": "user", "content": "the cat"}
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and refuse %}{{ raise_exception('no system') }}{% endif %}"
    "{{ m.content }} {% endfor %}{% if add_generation_prompt %}run{% endif %}"
)


def test_where_an_instruction_goes():
    assert with_prefix("the cat", "my dog") == "my dog\n\nthe cat" and with_prefix("the cat", "") == "the cat"
    system = {"role": "system", "content": "my dog"}
    assert with_prefix("the cat", "my dog", chat=True) == [system, USER]
    assert with_prefix([USER], "my dog") == [system, USER]
    own = {"role": "system", "content": "sun"}
    assert with_prefix([own, USER], "my dog") == [{"role": "system", "content": "my dog\n\nsun"}, USER]


def test_triples_get_it_too():
    triple = Triple("the cat", " is", " a")
    assert triple_with_prefix(triple, "my").prompt == "my\n\nthe cat" and triple_with_prefix(triple, "") is triple


def test_tokens():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    ids = lambda text: tokenizer(text)["input_ids"]  # noqa: E731
    plain = {"chat": False, "chat_template_kwargs": None}
    assert encode(tokenizer, "the cat", "my", **plain) == ids("my the cat")
    bare = ids("the cat run")[1:]
    assert encode(tokenizer, [USER], "", **plain)[-3:] == bare
    assert encode(tokenizer, "the cat", "my", **plain | {"chat": True})[-4:] == ids("my the cat run")[1:]
    with pytest.raises(
        ValueError, match=r"'the cat'; .* a system message before them\. The .* refuses the messages \(no system\)"
    ):
        encode(tokenizer, "the cat", "my", chat=True, chat_template_kwargs={"refuse": True})


def test_what_counters_read():
    assert spoken("the cat") == "the cat" and spoken([{"role": "system", "content": "x"}, USER]) == "the cat"
