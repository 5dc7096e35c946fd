"""`dspa.data.triples`: every format, every refusal, and agreement with TRL on implicit prompts."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dspa.data.tokens import TokenizedTriple, tokenize_triple
from dspa.data.triples import Triple, load_triples
from dspa.errors import PreferenceError

PLAIN = {"prompt": "the sky is", "chosen": " blue", "rejected": " green"}
WORDS = ["the", "sky", "is", "blue", "green", "grey", "what", "user", "assistant", "system", ":", "hello"]
# Turns end with </s>; the generation prompt opens the assistant's turn.
TEMPLATE = (
    "{{ bos_token }} {% for message in messages %}"
    "{% if message['role'] == 'critic' %}{{ raise_exception('no critics') }}{% endif %}"
    "{{ message['role'] }} : {{ message['content'] }} {{ eos_token }} {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def write_lines(path: Path, *entries: Any) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in entries), encoding="utf-8")
    return path


def load_one(entry: dict[str, Any]) -> Triple:
    (triple,) = load_triples([entry])
    return triple


def refusal(entry: Any) -> str:
    """What is said of `entry` as the second of two, after the first has been yielded."""
    triples = load_triples([PLAIN, entry])
    assert next(triples) == Triple(**PLAIN)
    with pytest.raises(PreferenceError) as raised:
        next(triples)
    message = str(raised.value)
    assert message.startswith("triple 2: ")
    assert "; accepted: " in message
    return message


def make_tokenizer(*, template: str | None = TEMPLATE, add_eos: bool = False) -> PreTrainedTokenizerFast:
    """Words split at whitespace; `<s>` before a text, and `</s>` after it with `add_eos`."""
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if add_eos else "<s> $A", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=template,
    )


def decoded(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(ids))


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
        assert [each.name for each in triples] == [f"{path} line 2", f"{path} line 4"]


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
        assert [each.name for each in triples] == ["triple 1", "triple 2"]


def test_triples_keep_their_name_or_get_one() -> None:
    named, unnamed = Triple(**PLAIN, name="mine"), Triple(**PLAIN)
    assert [each.name for each in load_triples([named, unnamed])] == ["mine", "triple 2"]
    assert unnamed == named


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (b'{"prompt": "x", ', "is not JSON in UTF-8 (Expecting property name"),
        (b'{"prompt": "\xff"}', "is not JSON in UTF-8 ('utf-8' codec can't decode byte 0xff"),
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
    assert str(raised.value).startswith(f"{path} line 3: {problem}")


def test_missing_path_points_to_the_hub() -> None:
    with pytest.raises(PreferenceError) as raised:
        next(load_triples("some/dataset"))
    message = str(raised.value)
    assert message.startswith("'some/dataset': does not exist; accepted: a JSON Lines file. ")
    assert "datasets.load_dataset('some/dataset', split='train')" in message


def test_directory(tmp_path: Path) -> None:
    with pytest.raises(PreferenceError, match="is a directory; accepted: a JSON Lines file"):
        next(load_triples(tmp_path))


def test_sources_without_a_triple(tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text("\n \n")
    with pytest.raises(PreferenceError, match=r"empty\.jsonl: holds no triple"):
        list(load_triples(path))
    with pytest.raises(PreferenceError, match="list: holds no triple"):
        list(load_triples([]))


def test_several_splits() -> None:
    splits = DatasetDict({"train": Dataset.from_list([PLAIN]), "test": Dataset.from_list([PLAIN])})
    with pytest.raises(PreferenceError, match=r"DatasetDict with keys \['test', 'train'\].* Choose one split"):
        next(load_triples(splits))


def test_source_of_another_type() -> None:
    with pytest.raises(PreferenceError, match="`source`: is of type int; accepted: a path to a JSON Lines file"):
        next(load_triples(3))  # type: ignore[arg-type]


# Refused triples

TURNS: dict[str, Any] = {
    "prompt": [user("what")],
    "chosen": [assistant("blue")],
    "rejected": [assistant("green")],
}


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        (3, "is of type int"),
        (
            {"prompt": "x", "choosen": "y"},
            "has no 'chosen' and no 'rejected', only the keys ['choosen', 'prompt']",
        ),
        ({"prompt": "x", "chosen": "y"}, "has no 'rejected', only the keys ['chosen', 'prompt']"),
        ({**PLAIN, "chosen": 3}, "`chosen` is of type int"),
        ({**PLAIN, "prompt": None}, "`prompt` is of type NoneType"),
        ({"chosen": "x", "rejected": None}, "`rejected` is of type NoneType"),
        ({**TURNS, "prompt": ["what"]}, "`prompt[0]` is of type str"),
        ({**TURNS, "prompt": [{"from": "human"}]}, "`prompt[0]` has no 'role', only the keys ['from']"),
        (
            {**TURNS, "chosen": [{"role": "assistant"}]},
            "`chosen[0]` has no 'content', only the keys ['role']",
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
        ({**PLAIN, "chosen": " green"}, "`chosen` and `rejected` are equal"),
        ({**TURNS, "chosen": [assistant("green")]}, "`chosen` and `rejected` are equal"),
        ({"chosen": "the sky", "rejected": "the sky"}, "`chosen` and `rejected` are equal"),
        (
            {"chosen": "yes ", "rejected": "no"},
            "has no 'prompt', and 'chosen' and 'rejected' have no beginning",
        ),
        ({"chosen": TURNS["chosen"], "rejected": TURNS["rejected"]}, "have no beginning in common"),
        ({**PLAIN, "chosen": "a\ud83d"}, "`chosen` has a lone surrogate '\\ud83d' at character 1"),
        ({**TURNS, "prompt": [user("\udc00")]}, "the content of `prompt[0]` has a lone surrogate"),
        (
            {**TURNS, "chosen": TURNS["prompt"] + TURNS["chosen"]},
            "`chosen`, after the prompt, begins with the role 'user'",
        ),
    ],
)
def test_refused_triples(entry: Any, problem: str) -> None:
    assert problem in refusal(entry)


def test_a_triple_is_checked_however_it_is_made() -> None:
    with pytest.raises(PreferenceError, match="mine: `chosen` and `rejected` are equal"):
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
            assert "`chosen` and `rejected` are equal" in refusal(entry) or "no 'prompt'" in refusal(entry)
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


# Tokens


def test_text_has_special_tokens_before_the_prompt_only() -> None:
    tokenizer = make_tokenizer(template=None)
    tokens = tokenize_triple(Triple("the sky is", "blue", "green grey"), tokenizer)
    assert decoded(tokenizer, tokens.prompt) == "<s> the sky is"
    assert decoded(tokenizer, tokens.chosen) == "blue"
    assert decoded(tokenizer, tokens.rejected) == "green grey"
    assert tokens.cut == 0
    assert tokens.prompt_text == [False, True, True, True]
    assert (tokens.chosen_text, tokens.rejected_text) == ([True], [True, True])


def test_masks_follow_the_tokenizers_special_tokens() -> None:
    tokenizer = make_tokenizer()
    triple = Triple("the", "blue </s> nowhere", "</s>")
    assert tokenize_triple(triple, tokenizer).chosen_text == [True, False, False]
    tokenizer.add_special_tokens({"extra_special_tokens": ["blue"]})
    assert tokenize_triple(triple, tokenizer).chosen_text == [False, False, False]


def test_messages_go_through_the_chat_template() -> None:
    tokenizer = make_tokenizer()
    triple = Triple([user("what is")], [assistant("blue")], [assistant("green"), user("is"), assistant("grey")])
    tokens = tokenize_triple(triple, tokenizer)
    assert decoded(tokenizer, tokens.prompt) == "<s> user : what is </s> assistant :"
    assert decoded(tokenizer, tokens.chosen) == "blue </s>"
    assert decoded(tokenizer, tokens.rejected) == "green </s> user : is </s> assistant : grey </s>"
    assert tokens.prompt_text == [False, True, True, True, True, False, True, True]
    assert tokens.chosen_text == [True, False]


@pytest.mark.parametrize(
    ("max_length", "chosen", "rejected", "cut"),
    [
        (None, 2, 4, 0),
        (7, 2, 4, 0),
        (6, 2, 3, 1),
        (5, 2, 2, 1),
        (4, 1, 1, 2),
    ],
)
def test_responses_are_cut_at_their_end(max_length: int | None, chosen: int, rejected: int, cut: int) -> None:
    triple = Triple("the sky", "blue sky", "green grey is hello")
    tokenizer = make_tokenizer()
    whole = tokenize_triple(triple, tokenizer)
    tokens = tokenize_triple(triple, tokenizer, max_length=max_length)
    assert tokens == TokenizedTriple(
        prompt=whole.prompt,
        chosen=whole.chosen[:chosen],
        rejected=whole.rejected[:rejected],
        cut=cut,
        prompt_text=whole.prompt_text,
        chosen_text=whole.chosen_text[:chosen],
        rejected_text=whole.rejected_text[:rejected],
    )


@pytest.mark.parametrize("max_length", [3, 2, 0])
def test_prompts_are_never_cut(max_length: int) -> None:
    triple = Triple("the sky", "blue", "green", name="prefs.jsonl line 12")
    problem = f"prefs.jsonl line 12: its prompt of 3 tokens leaves no room for a response in {max_length} tokens"
    with pytest.raises(PreferenceError, match=rf"{problem}.* Raise max_length"):
        tokenize_triple(triple, make_tokenizer(), max_length=max_length)


def test_tokenizer_that_ends_texts() -> None:
    triple = Triple("the sky", "blue", "green", name="triple 4")
    with pytest.raises(PreferenceError, match=r"triple 4: the tokenizer ends the prompt with '</s>'.*add_eos"):
        tokenize_triple(triple, make_tokenizer(add_eos=True))


def test_prompt_whose_own_text_ends_with_the_end_token() -> None:
    tokens = tokenize_triple(Triple("the sky </s>", "blue", "green"), make_tokenizer())
    assert tokens.prompt[-1] == 2


def test_no_tokens() -> None:
    with pytest.raises(PreferenceError, match="triple 5: `rejected` gives no tokens"):
        tokenize_triple(Triple("the", "blue", " ", name="triple 5"), make_tokenizer())


def test_messages_without_a_chat_template() -> None:
    triple = Triple(**TURNS, name="triple 6")
    with pytest.raises(PreferenceError, match=r"triple 6: .*no chat template.*tokenizer\.chat_template"):
        tokenize_triple(triple, make_tokenizer(template=None))


def test_text_does_not_need_a_chat_template() -> None:
    assert tokenize_triple(Triple(**PLAIN), make_tokenizer(template=None)).chosen


def test_prompt_that_the_response_changes() -> None:
    tokenizer = make_tokenizer(template="{{ messages[-1]['role'] }} " + TEMPLATE)
    with pytest.raises(PreferenceError) as raised:
        tokenize_triple(Triple(**TURNS, name="triple 7"), tokenizer)
    assert str(raised.value).startswith(
        "triple 7: under the chat template, its prompt is not a prefix of prompt and `chosen`: "
        "they part at token 1 of the prompt's 8, 'user'; "
    )


def test_only_one_of_the_two_responses_changes_the_prompt() -> None:
    rejected = [assistant("green"), user("is")]
    tokenizer = make_tokenizer(template="{{ messages[2].role if messages[2] else 'hello' }} " + TEMPLATE)
    with pytest.raises(PreferenceError, match="not a prefix of prompt and `rejected`"):
        tokenize_triple(Triple(TURNS["prompt"], TURNS["chosen"], rejected), tokenizer)


def test_whole_that_is_shorter_than_the_prompt() -> None:
    template = "{{ messages[0]['content'] }}{% if add_generation_prompt %} assistant :{% endif %}"
    with pytest.raises(PreferenceError, match="they part at token 2 of the prompt's 3, 'assistant'"):
        tokenize_triple(Triple(**TURNS), make_tokenizer(template=template))


def test_response_to_which_the_template_adds_nothing() -> None:
    template = "{{ messages[0]['content'] }}"
    with pytest.raises(PreferenceError, match="`chosen` gives no tokens"):
        tokenize_triple(Triple(**TURNS), make_tokenizer(template=template))


def test_template_that_refuses_the_conversation() -> None:
    triple = Triple(
        [{"role": "critic", "content": "hello"}], [assistant("blue")], [assistant("green")], name="triple 8"
    )
    with pytest.raises(PreferenceError, match=r"triple 8: .*roles \['critic'\] \(no critics\)"):
        tokenize_triple(triple, make_tokenizer())
