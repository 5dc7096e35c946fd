"""`dspa.data.triples`: every format, every refusal, and agreement with TRL on implicit prompts."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from dspa.data.triples import Triple, load_triples
from dspa.errors import PreferenceError

from ..support.triples import PLAIN, TURNS, assistant, user


def load_one(entry: dict[str, Any]) -> Triple:
    (triple,) = load_triples([entry])
    return triple


def refusal(entry: Any) -> str:
    """Return the message that refuses `entry` as the second of two, after the first has been yielded."""
    triples = load_triples([PLAIN, entry])
    assert next(triples) == Triple(**PLAIN)
    with pytest.raises(PreferenceError) as raised:
        next(triples)
    message = str(raised.value)
    assert message.startswith(("triple 2: ", "triple 2 is "))
    assert "; accepted: " in message
    return message


# Formats


def test_standard_explicit() -> None:
    triple = load_one({**PLAIN, "score": 3})
    assert (triple.prompt, triple.chosen, triple.rejected) == ("the sky is", " blue", " green")


def test_standard_implicit() -> None:
    triple = load_one({"chosen": "the sky is blue", "rejected": "the sky is rainy"})
    assert triple == Triple("the sky is", " blue", " rainy")


def test_conversational_explicit() -> None:
    entry = {"prompt": [user("what")], "chosen": [assistant("blue")], "rejected": [assistant("green")]}
    assert load_one(entry) == Triple([user("what")], [assistant("blue")], [assistant("green")])


def test_conversational_implicit_keeps_the_shared_turns() -> None:
    shared = [{"role": "system", "content": ""}, user("what"), assistant("hello"), user("the sky")]
    entry = {"chosen": [*shared, assistant("blue")], "rejected": [*shared, assistant("green")]}
    assert load_one(entry) == Triple(shared, [assistant("blue")], [assistant("green")])


def test_responses_may_have_several_turns() -> None:
    chosen = [assistant("blue"), user("is"), assistant("hello")]
    entry = {"prompt": [user("what")], "chosen": chosen, "rejected": [assistant("green")]}
    assert load_one(entry).chosen == chosen


def test_ultrafeedback_text_prompt_with_whole_conversations() -> None:
    entry = {
        "prompt": "what is",
        "chosen": [user("what is"), assistant("blue")],
        "rejected": [user("what is"), assistant("green")],
    }
    expected = Triple([user("what is")], [assistant("blue")], [assistant("green")])
    assert load_one(entry) == expected
    assert load_one({**entry, "prompt": "what is\n"}) == expected


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ([user("what"), assistant("blue")], [user("what"), assistant("green")]),
        ([assistant("what is"), assistant("blue")], [assistant("what is"), assistant("green")]),
        ([assistant("blue")], [assistant("green")]),
    ],
)
def test_text_prompt_that_the_conversations_do_not_ask(chosen: list[Any], rejected: list[Any]) -> None:
    message = refusal({"prompt": "what is", "chosen": chosen, "rejected": rejected})
    assert "`prompt` is text, and no user message that `chosen` and `rejected` share says it" in message


# Sources


def test_json_lines_skips_blank_lines_and_counts_them(tmp_path: Path) -> None:
    path = tmp_path / "prefs.jsonl"
    other = {"prompt": "wörter", "chosen": "ja\u2028", "rejected": "nein"}
    lines = ["", json.dumps(PLAIN), "  ", json.dumps(other, ensure_ascii=False)]
    path.write_bytes("\r\n".join(lines).encode())
    for source in (path, str(path)):
        triples = list(load_triples(source))
        assert triples == [Triple(**PLAIN), Triple(**other)]
        assert [triple.name for triple in triples] == [f"{path} line 2", f"{path} line 4"]


def test_dataset() -> None:
    conversation: dict[str, Any] = {
        "prompt": [user("what")],
        "chosen": [assistant("blue")],
        "rejected": [assistant("green")],
    }
    rows = Dataset.from_list([conversation, conversation])
    for source in (rows, rows.to_iterable_dataset()):
        triples = list(load_triples(source))
        assert triples == [Triple(**conversation)] * 2
        assert [triple.name for triple in triples] == ["triple 1", "triple 2"]


@pytest.mark.parametrize("kind", ["data set", "stream", "list", "parquet", "json"])
def test_what_arrow_fills_counts_as_absent(tmp_path: Path, kind: str) -> None:
    """Each row lacks something that another has: the prompt, a key of a message, one deep in it, or another column."""
    shared = [user("what"), {**assistant("is"), "reasoning": "so"}]
    entries: list[dict[str, Any]] = [
        {"chosen": [*shared, assistant("blue")], "rejected": [*shared, assistant("green")], "note": "x"},
        {"prompt": [user("what")], "chosen": [assistant("blue")], "rejected": [assistant("green")]},
    ]
    # `from_list` takes its columns from the first row.
    data = Dataset.from_list([{"prompt": None, "note": None, **entry} for entry in entries])
    assert data[1]["note"] is None and data[0]["prompt"] is None and "reasoning" in data[0]["chosen"][0]
    if kind == "parquet":
        data.to_parquet(tmp_path / "a.parquet")
    elif kind == "json":
        data.to_json(tmp_path / "a.jsonl")
    sources = {
        "data set": data,
        "stream": data.to_iterable_dataset(),
        "list": data.to_list(),
        "parquet": tmp_path / "a.parquet",
        "json": tmp_path / "a.jsonl",
    }
    assert list(load_triples(sources[kind])) == list(load_triples(entries))


def test_none_is_removed_as_trl_does() -> None:
    remove_none_values = pytest.importorskip("trl.trainer.utils").remove_none_values
    calls = [{"function": {"name": "f", "arguments": {"x": None, "y": [1, None, {"z": None}]}}, "id": None}]
    filled: dict[str, Any] = {
        "prompt": [{**user("what"), "tool_calls": None, "name": None}],
        "chosen": [{**assistant("blue"), "tool_calls": calls}],
        "rejected": [{**assistant("green"), "tool_calls": None}],
    }
    assert load_one(filled) == Triple(**remove_none_values(filled))


def test_triples_keep_their_name_or_get_one() -> None:
    named, unnamed = Triple(**PLAIN, name="mine"), Triple(**PLAIN)
    assert [triple.name for triple in load_triples([named, unnamed])] == ["mine", "triple 2"]
    assert unnamed == named


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (b'{"prompt": "x", ', "is not JSON (EOF while parsing"),
        (b'{"prompt": "\xff"}', "is not UTF-8 ('utf-8' codec can't decode byte 0xff"),
        (b'["x", "y"]', "is of type list; accepted: an object with 'chosen', 'rejected'"),
    ],
)
def test_bad_line_is_named_after_the_good_ones(tmp_path: Path, bad: bytes, problem: str) -> None:
    path = tmp_path / "prefs.jsonl"
    path.write_bytes(json.dumps(PLAIN).encode() + b"\n\n" + bad + b"\n")
    triples = load_triples(path)
    assert next(triples) == Triple(**PLAIN)
    with pytest.raises(PreferenceError) as raised:
        next(triples)
    assert str(raised.value).startswith(f"{path} line 3 {problem}")


def test_missing_path_points_to_the_hub() -> None:
    with pytest.raises(PreferenceError) as raised:
        next(load_triples("some/dataset"))
    message = str(raised.value)
    assert message.startswith(
        "'some/dataset' is a path that does not exist; accepted: the path of a file: JSON Lines ("
    )
    assert "datasets.load_dataset('some/dataset', split='train')" in message


def test_directory(tmp_path: Path) -> None:
    with pytest.raises(PreferenceError, match="is a directory; accepted: the path of a file"):
        next(load_triples(tmp_path))


def test_sources_without_a_triple(tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text("\n \n")
    with pytest.raises(PreferenceError, match=r"empty\.jsonl is a file without a triple"):
        list(load_triples(path))
    with pytest.raises(PreferenceError, match="`source` is a list without a triple"):
        list(load_triples([]))


def test_several_splits() -> None:
    splits = DatasetDict({"train": Dataset.from_list([PLAIN]), "test": Dataset.from_list([PLAIN])})
    with pytest.raises(
        PreferenceError, match=r"`source` is a DatasetDict with keys \['test', 'train'\].* Choose one split"
    ):
        next(load_triples(splits))


def test_source_of_another_type() -> None:
    with pytest.raises(PreferenceError, match="`source` is of type int; accepted: the path of a file"):
        next(load_triples(3))  # type: ignore[arg-type]


# Refused triples


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        (3, "is of type int"),
        (
            {"prompt": "x", "choosen": "y"},
            "is without 'chosen' and 'rejected', with only the keys ['choosen', 'prompt']",
        ),
        ({"prompt": "x", "chosen": "y"}, "is without 'rejected', with only the keys ['chosen', 'prompt']"),
        (TURNS | {"tools": {"name": "f"}}, "`tools` is {'name': 'f'}; accepted: a list of JSON schemas"),
        (TURNS | {"tools": ["f"]}, "`tools` is ['f']; accepted: a list of JSON schemas"),
        (TURNS | {"tools": "[{"}, "`tools` is not JSON"),
        (
            TURNS | {"chat_template_kwargs": '{"polite": true}'},
            "`chat_template_kwargs` is '{\"polite\": true}'; accepted",
        ),
        (TURNS | {"chat_template_kwargs": {"messages": []}}, "`chat_template_kwargs` is with messages, reserved"),
        ({**PLAIN, "chosen": 3}, "`chosen` is of type int"),
        ({**PLAIN, "prompt": None}, "is without 'prompt', and 'chosen' and 'rejected' have no beginning in common"),
        ({"prompt": None, "chosen": "x", "rejected": None}, "is without 'rejected', with only the keys ['chosen']"),
        ({**TURNS, "prompt": ["what"]}, "`prompt[0]` is of type str"),
        ({**TURNS, "prompt": [{"from": "human"}]}, "`prompt[0]` is without 'role', with only the keys ['from']"),
        (
            {**TURNS, "chosen": [{"role": "assistant"}]},
            "`chosen[0]` is without 'content', with only the keys ['role']",
        ),
        (
            {**TURNS, "chosen": [{**assistant("x"), "content": []}]},
            "the content of `chosen[0]` is of type list",
        ),
        ({**TURNS, "chosen": "blue"}, "`prompt` is messages; `chosen` is text; `rejected` is messages"),
        ({**PLAIN, "chosen": TURNS["chosen"]}, "`prompt` is text; `chosen` is messages; `rejected` is text"),
        ({"chosen": "x y", "rejected": TURNS["rejected"]}, "`chosen` is text; `rejected` is messages"),
        ({**PLAIN, "prompt": ""}, "`prompt` is empty"),
        ({**TURNS, "prompt": []}, "`prompt` is empty"),
        ({**PLAIN, "chosen": ""}, "`chosen` is empty"),
        ({**TURNS, "rejected": []}, "`rejected` is empty"),
        ({**TURNS, "rejected": [assistant("")]}, "`rejected` is empty"),
        ({**PLAIN, "chosen": " green"}, "`chosen` is equal to `rejected`"),
        ({**TURNS, "chosen": [assistant("green")]}, "`chosen` is equal to `rejected`"),
        ({"chosen": "the sky", "rejected": "the sky"}, "`chosen` is equal to `rejected`"),
        (
            {"chosen": "yes ", "rejected": "no"},
            "is without 'prompt', and 'chosen' and 'rejected' have no beginning",
        ),
        ({"chosen": TURNS["chosen"], "rejected": TURNS["rejected"]}, "have no beginning in common"),
        ({**PLAIN, "chosen": "a\ud83d"}, "`chosen` is text with a lone surrogate '\\ud83d' at character 1"),
        ({**TURNS, "prompt": [user("\udc00")]}, "the content of `prompt[0]` is text with a lone surrogate"),
        (
            {**TURNS, "chosen": TURNS["prompt"] + TURNS["chosen"]},
            "the first role of `chosen` after the prompt is 'user'; accepted: 'assistant'",
        ),
    ],
)
def test_refused_triples(entry: Any, problem: str) -> None:
    assert problem in refusal(entry)


def test_a_triple_is_checked_however_it_is_made() -> None:
    with pytest.raises(PreferenceError, match="mine: `chosen` is equal to `rejected`"):
        Triple("x", "y", "y", name="mine")


# Agreement with TRL


def random_text(rng: random.Random) -> str:
    return "".join(rng.choice("ab ") for _ in range(rng.randint(1, 6)))


def random_turns(rng: random.Random) -> list[dict[str, str]]:
    return [assistant(rng.choice("ab")) for _ in range(rng.randint(1, 5))]


@pytest.mark.parametrize("draw", [random_text, random_turns])
def test_implicit_prompts_agree_with_trl(draw: Any) -> None:
    extract_prompt = pytest.importorskip("trl.data_utils").extract_prompt
    rng = random.Random(0)
    compared = 0
    for _ in range(2000):
        entry = {"chosen": draw(rng), "rejected": draw(rng)}
        # TRL wraps around to the end of `chosen` where nothing is shared; without a prompt we refuse.
        nothing_shared = entry["chosen"][0] != entry["rejected"][0]
        expected = extract_prompt(entry)
        if nothing_shared or not expected["prompt"] or entry["chosen"] == entry["rejected"]:
            assert "`chosen` is equal to `rejected`" in refusal(entry) or "is without 'prompt'" in refusal(entry)
        else:
            assert load_one(entry) == Triple(**expected)
            compared += 1
    assert compared > 250


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("the sky is blue", "the sky is green"),
        ("the sky is  blue", "the sky is  green"),
        ("the sky is", "the sky is green"),
        ("the sky is grey", "the sky is green"),
        ([user("what"), assistant("blue")], [user("what"), assistant("blue"), user("is"), assistant("sky")]),
        ([user("what"), assistant("blue"), user("is")], [user("what"), assistant("green"), user("is")]),
    ],
)
def test_chosen_cases_agree_with_trl(chosen: Any, rejected: Any) -> None:
    extract_prompt = pytest.importorskip("trl.data_utils").extract_prompt
    entry = {"chosen": chosen, "rejected": rejected}
    assert load_one(entry) == Triple(**extract_prompt(entry))
