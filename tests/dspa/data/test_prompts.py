"""`dspa.data.prompts`: prompts from files and from a pipe."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from dspa.data.messages import Text
from dspa.data.prompts import read_prompt_file, read_prompts, tokenize_prompt
from dspa.errors import PreferenceError
from dspa.testing import word_tokenizer

PROMPTS = ["the cat\u2028is", "a dog\x85 of my own ", "{not} first"]


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.ndjson", "a.JSONL", "a.json"])
def test_prompts_of_a_file(tmp_path: Path, name: str) -> None:
    rows = [{"prompt": prompt, "id": 1} for prompt in PROMPTS]
    content = {
        "a.txt": "\ufeff" + "\n\n".join(PROMPTS),
        "a.md": "\r\n".join(PROMPTS) + "\r\n",
        "a.json": json.dumps(rows),
    }.get(name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    (tmp_path / name).write_bytes(content.encode())
    assert list(read_prompts(None, tmp_path / name)) == PROMPTS


def test_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    piped = io.TextIOWrapper(io.BytesIO(("\ufeff" + "\n\n".join(PROMPTS)).encode()), encoding="ascii")
    monkeypatch.setattr("sys.stdin", piped)
    assert list(read_prompts(None, None)) == PROMPTS
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"one\n\xff\n")))
    with pytest.raises(ValueError, match="standard input line 2 is not UTF-8"):
        list(read_prompts(None, None))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"id": 81, "turns": ["a", "b"]}',
            r"line 1 is without `prompt`, with .* \['id', 'turns'\]; .* Rename",
        ),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": ["a"]}', r"line 2: `prompt` is \['a'\]; accepted: a text"),
        ("a.jsonl", b'{"prompt": "a"}\n\n["a"]', "line 3 is a JSON list"),
        ("a.csv", b"text\nthe cat\n", r"row 1 is without `prompt`, with only the keys \['text'\]"),
        ("a.txt", b"the cat\n\xe9\n", r"a\.txt line 2 is not UTF-8"),
        ("a.txt", b"\n \n", "holds no prompt"),
        ("a.csv", b"prompt\n", "holds no prompt"),
        ("a.docx", b"PK\3\4\0", r"a\.docx line 1 is not text"),
    ],
)
def test_files_without_prompts(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_prompts(None, tmp_path / name))


@pytest.mark.parametrize(("prompt", "chat"), [("a cat", True), ([{"role": "user", "content": "a cat"}], False)])
def test_a_prompt_for_a_template_that_is_absent(prompt: Text, chat: bool) -> None:
    with pytest.raises(ValueError, match=r"for a chat template, and the tokenizer has none.*instruction-tuned"):
        tokenize_prompt(word_tokenizer(), prompt, chat)


def test_prompts_that_are_messages_or_of_triples(tmp_path: Path) -> None:
    user = {"role": "user", "content": "the cat"}
    answers = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    rows = [
        {"prompt": "a dog"},
        {"prompt": [user]},
        {"prompt": [user], **answers},
        # An implicit prompt.
        {name: [user, *answer] for name, answer in answers.items()},
        {"chosen": "my own tree", "rejected": "my own house"},
    ]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_prompt_file("PROMPTS", file) == ["a dog", [user], [user], [user], "my own"]
    (tmp_path / "b.txt").write_text("a dog\nthe cat\n")
    assert read_prompt_file("PROMPTS", tmp_path / "b.txt") == ["a dog", "the cat"]


@pytest.mark.parametrize(
    ("row", "kind", "message"),
    [
        ({"text": "a"}, ValueError, r"a\.jsonl line 1 is without `prompt`"),
        ({"prompt": [{"role": "user"}]}, PreferenceError, r"line 1: `prompt\[0\]` is without 'content'"),
        ({"prompt": [{"role": "user", "content": ""}]}, ValueError, r"line 1: `prompt` is without text"),
        ({"prompt": " "}, ValueError, r"line 1: `prompt` is ' '; accepted: a text"),
    ],
)
def test_records_without_a_prompt(tmp_path: Path, row: dict[str, object], kind: type[Exception], message: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(kind, match=message):
        read_prompt_file("PROMPTS", tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"PROMPTS is .*, which is not a file"):
        read_prompt_file("PROMPTS", tmp_path / "b.jsonl")
