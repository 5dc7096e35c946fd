"""`dspa.data.tokens`: templates, special tokens, cuts, and every refusal."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dspa.data.tokens import TokenizedTriple, response_tokens, tokenize_triple
from dspa.data.triples import Triple, load_triples
from dspa.errors import PreferenceError
from dspa.testing import word_tokenizer

from ..support.adapters import ending_tokenizer
from ..support.triples import PLAIN, TURNS, assistant, user

WORDS = ["the", "sky", "is", "blue", "green", "grey", "what", "user", "assistant", "system", ":", "hello"]
# Turns end with </s>; the generation prompt opens the assistant's turn.
TEMPLATE = (
    "{{ bos_token }} {% for message in messages %}"
    "{% if message['role'] == 'critic' %}{{ raise_exception('no critics') }}{% endif %}"
    "{{ message['role'] }} : {{ message['content'] }} {{ eos_token }} {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def make_tokenizer(*, template: str | None = TEMPLATE, add_eos: bool = False) -> PreTrainedTokenizerFast:
    """Make a tokenizer of words, with `<s>` before a text, and with `add_eos` also `</s>` after it."""
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


def test_text_has_special_tokens_before_the_prompt_only() -> None:
    tokenizer = make_tokenizer(template=None)
    tokens = tokenize_triple(Triple("the sky is", " blue", " green grey"), tokenizer)
    assert decoded(tokenizer, tokens.prompt) == "<s> the sky is"
    assert decoded(tokenizer, tokens.chosen) == "blue"
    assert decoded(tokenizer, tokens.rejected) == "green grey"
    assert tokens.cut == 0
    assert tokens.prompt_text == [False, True, True, True]
    assert (tokens.chosen_text, tokens.rejected_text) == ([True], [True, True])


def test_masks_follow_the_tokenizers_special_tokens() -> None:
    tokenizer = make_tokenizer()
    triple = Triple("the", " blue </s> nowhere", "</s>")
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
    triple = Triple("the sky", " blue sky", " green grey is hello")
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
    triple = Triple("the sky", " blue", " green", name="prefs.jsonl line 12")
    problem = (
        f"prefs.jsonl line 12: `prompt` is 3 tokens long, which leaves no room for a response in {max_length} tokens"
    )
    with pytest.raises(PreferenceError, match=rf"{problem}.* Raise `max_length`"):
        tokenize_triple(triple, make_tokenizer(), max_length=max_length)


def test_tokenizer_that_ends_texts() -> None:
    tokenizer = make_tokenizer(add_eos=True)
    tokens = tokenize_triple(Triple("the sky", " blue", " green grey"), tokenizer)
    assert decoded(tokenizer, tokens.prompt) == "<s> the sky"
    assert decoded(tokenizer, tokens.chosen) == "blue </s>"
    assert decoded(tokenizer, tokens.rejected) == "green grey </s>"


def test_prompt_whose_own_text_ends_with_the_end_token() -> None:
    tokens = tokenize_triple(Triple("the sky </s>", " blue", " green"), make_tokenizer())
    assert tokens.prompt[-1] == 2


def test_no_tokens() -> None:
    with pytest.raises(PreferenceError, match="triple 5: `rejected` is empty after tokenization"):
        tokenize_triple(Triple("the", " blue", " ", name="triple 5"), make_tokenizer())


def test_messages_without_a_chat_template() -> None:
    triple = Triple(**TURNS, name="triple 6")
    with pytest.raises(
        PreferenceError,
        match=r"triple 6 is a conversation, and the tokenizer has no chat template.*tokenizer\.chat_template",
    ):
        tokenize_triple(triple, make_tokenizer(template=None))


def test_text_does_not_need_a_chat_template() -> None:
    assert tokenize_triple(Triple(**PLAIN), make_tokenizer(template=None)).chosen


def test_settings_of_the_chat_template_are_not_for_text() -> None:
    with pytest.raises(PreferenceError, match=r"is text, and \{'polite': True\} is for the chat template"):
        tokenize_triple(Triple("the cat", " is", " was"), word_tokenizer(), chat_template_kwargs={"polite": True})


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
    with pytest.raises(PreferenceError, match="`chosen` is empty after tokenization"):
        tokenize_triple(Triple(**TURNS), make_tokenizer(template=template))


def test_template_that_refuses_the_conversation() -> None:
    triple = Triple(
        [{"role": "critic", "content": "hello"}], [assistant("blue")], [assistant("green")], name="triple 8"
    )
    with pytest.raises(
        PreferenceError, match=r"triple 8 is a conversation of roles \['critic'\].*refuses the messages \(no critics\)"
    ):
        tokenize_triple(triple, make_tokenizer())


TURNS_WITH_BOS = (
    "{% for m in messages %}{{ '<bos> ' if loop.first else '' }}{{ m['role'][:1] }} {{ m['content'] }} {% endfor %}"
    "{{ 'a ' if add_generation_prompt else '' }}"
)


def test_where_an_end_token_goes() -> None:
    tokenizer = ending_tokenizer()
    end = tokenizer.eos_token_id
    triple = Triple("the cat is", " a dog of my own", " we see")
    prompt, chosen, rejected = response_tokens(triple, tokenizer)
    assert (len(prompt), len(chosen), len(rejected)) == (4, 6, 3)
    assert chosen[-1] == rejected[-1] == end
    # Cut to 4 tokens, the text goes on. Exactly full, it has no room for the end token.
    for room, ended in ((4, False), (5, False), (6, True)):
        _, chosen, rejected = response_tokens(triple, tokenizer, max_length=len(prompt) + room)
        assert (chosen[-1] == end, rejected[-1] == end) == (ended, True)
        assert len(chosen) == room
    assert response_tokens(Triple("the cat", " a dog bird", " we"), tokenizer)[1].count(end) == 1
    assert response_tokens(triple, word_tokenizer())[1:] == (
        tokenizer(" a dog of my own", add_special_tokens=False)["input_ids"],
        tokenizer(" we see", add_special_tokens=False)["input_ids"],
    )


def test_a_chat_template_ends_its_turns_itself() -> None:
    tokenizer = ending_tokenizer()
    tokenizer.chat_template = TURNS_WITH_BOS
    triple = Triple(
        [{"role": "user", "content": "the cat"}],
        [{"role": "assistant", "content": "is a"}],
        [{"role": "assistant", "content": "dog"}],
    )
    assert response_tokens(triple, tokenizer)[2] == tokenizer("dog", add_special_tokens=False)["input_ids"]


# Agreement with TRL

CHATML = (
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{% if polite %}please {% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content or m.tool_calls | tojson }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CORPUS = "answer: mostly check the soup, and merely the soups; a masked mask. Über naïve cafés!\n\n\tx = [12, 345]" * 9


def train_backend(kind: str) -> Tokenizer:
    """Train a tokenizer of one kind on CORPUS."""
    special = ["<unk>", "<s>", "</s>"]
    sizes: dict[str, Any] = {"vocab_size": 330, "special_tokens": special, "show_progress": False}
    if kind == "WordPiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer: Any = trainers.WordPieceTrainer(**sizes)
    elif kind == "Unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(**sizes, unk_token="<unk>")
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        if kind == "Metaspace":
            # As in Llama-2: a space before every text, and words are not kept apart before they are merged.
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            sizes["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(**sizes)
    tokenizer.train_from_iterator([CORPUS, *CORPUS.split()], trainer)
    return tokenizer


# Kind of the tokenizer and its special tokens around a text.
TOKENIZERS = {
    "byte-level BPE": ("ByteLevel", "$A"),
    "byte-level BPE with <s>": ("ByteLevel", "<s> $A"),
    "Llama-2's": ("Metaspace", "<s> $A"),
    "one that ends texts": ("Metaspace", "<s> $A </s>"),
    "SentencePiece Unigram": ("Unigram", "$A </s>"),
    "BERT's": ("WordPiece", "<s> $A </s>"),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    kind, around = TOKENIZERS[request.param]
    backend = train_backend(kind)
    special = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(single=around, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=CHATML
    )


def text_rows() -> list[dict[str, str]]:
    """Prompts and responses with and without space between them, and with common beginnings."""
    draw = random.Random(0)
    words = CORPUS.split(" ")

    def text(least: int, most: int) -> str:
        return draw.choice(["", " ", "\n\n"]) + draw.choice([" ", ""]).join(draw.choices(words, k=most))[least:]

    rows = []
    for n in range(60):
        prompt, chosen, rejected = text(0, 1 + n % 9), text(n % 3, 1 + n % 7), text(n % 5, 1 + n % 4)
        explicit = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        rows += [explicit, {"chosen": prompt + chosen, "rejected": prompt + rejected}]
    return [row for row in rows if is_valid(row)]


def is_valid(row: dict[str, Any]) -> bool:
    try:
        return len(list(load_triples([row]))) == 1
    except PreferenceError:
        return False


def conversations() -> list[dict[str, Any]]:
    prompts = [[user("check")], [{"role": "system", "content": "merely"}, user("the soup"), assistant("a"), user("x")]]
    answers = [[assistant("mostly the soup")], [assistant("mask"), user("and?"), assistant("12")]]
    call = [{"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    rows: list[dict[str, Any]] = []
    for prompt, settings in product(
        prompts,
        (
            {},
            {"tools": None, "chat_template_kwargs": {"polite": False}},
            {"tools": [], "chat_template_kwargs": {"polite": True}},
            {"tools": tools},
            {"tools": json.dumps(tools), "chat_template_kwargs": {"polite": True}},
        ),
    ):
        rows += [
            {"prompt": prompt, "chosen": answers[0], "rejected": answers[1], **settings},
            {"prompt": prompt, "chosen": call, "rejected": answers[0], **settings},
            {"chosen": prompt + answers[1], "rejected": prompt + answers[0], **settings},
        ]
    return rows


class Rows(list[dict[str, Any]]):
    """A data set as it is, where Arrow would add a None for every key that another message has."""

    def map(self, function: Callable[..., dict[str, Any]], fn_kwargs: dict[str, Any] | None = None) -> Rows:
        return Rows({**row, **function(dict(row), **fn_kwargs or {})} for row in self)


def ids_of_trl(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], end: str) -> tuple[list[int], ...]:
    """Ids that TRL's trainer computes of one row, with `end` as the end token of text."""
    dpo = pytest.importorskip("trl.trainer.dpo_trainer")
    trainer = SimpleNamespace(_tokenizer=SimpleNamespace(eos_token=end))
    args = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    (prepared,) = dpo.DPOTrainer._prepare_dataset(trainer, Rows([row]), tokenizer, args, "train")
    return prepared["prompt_ids"], prepared["chosen_ids"], prepared["rejected_ids"]


@pytest.mark.parametrize("rows", [text_rows, conversations])
def test_ids_are_those_of_trl(tokenizer: PreTrainedTokenizerFast, rows: Callable[[], list[dict[str, Any]]]) -> None:
    compared = 0
    for row, triple in zip(rows(), load_triples(rows()), strict=True):
        for end, tokenized in (("", tokenize_triple), ("</s>", response_tokens)):
            expected = ids_of_trl(tokenizer, row, end)
            if min(map(len, expected)) == 0 or set(expected[0]) <= set(tokenizer.all_special_ids):
                with pytest.raises(PreferenceError, match=r"empty after tokenization|nothing but special tokens"):
                    tokenized(triple, tokenizer)
                continue
            tokens = tokenized(triple, tokenizer)
            ids = (tokens.prompt, tokens.chosen, tokens.rejected) if tokenized is tokenize_triple else tokens
            assert ids == expected
            compared += 1
    assert compared > len(rows())


def test_prompt_and_response_are_the_tokens_of_their_text(tokenizer: PreTrainedTokenizerFast) -> None:
    n_apart = 0
    for row in text_rows():
        (triple,) = load_triples([row])
        try:
            tokens = tokenize_triple(triple, tokenizer)
        except PreferenceError:
            continue
        for text, ids in ((triple.chosen, tokens.chosen), (triple.rejected, tokens.rejected)):
            assert tokens.prompt + ids == tokenizer(triple.prompt + text)["input_ids"]
            apart = tokenizer(triple.prompt)["input_ids"] + tokenizer(text, add_special_tokens=False)["input_ids"]
            n_apart += apart != tokens.prompt + ids
    assert n_apart > 10


def test_a_token_that_reaches_from_a_template_into_the_response(tokenizer: PreTrainedTokenizerFast) -> None:
    """As where a template opens a block of thoughts with one line break, and leaves it empty with two."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = CHATML.replace("<|assistant|>", "<|assistant|>\n").replace("|>{{", "|>\n{{")
    row = {"prompt": [user("check")], "chosen": [assistant("\n\tx")], "rejected": [assistant("soup")]}
    tokens = tokenize_triple(Triple(**row), tokenizer)
    assert (tokens.prompt, tokens.chosen, tokens.rejected) == ids_of_trl(tokenizer, row, "")
