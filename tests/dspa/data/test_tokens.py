"""`dspa.data.tokens`: templates, special tokens, cuts, and every refusal."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dspa.data.tokens import TokenizedTriple, response_tokens, tokenize_triple
from dspa.data.triples import Triple
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
    problem = (
        f"prefs.jsonl line 12: `prompt` is 3 tokens long, which leaves no room for a response in {max_length} tokens"
    )
    with pytest.raises(PreferenceError, match=rf"{problem}.* Raise max_length"):
        tokenize_triple(triple, make_tokenizer(), max_length=max_length)


def test_tokenizer_that_ends_texts() -> None:
    triple = Triple("the sky", "blue", "green", name="triple 4")
    with pytest.raises(
        PreferenceError, match=r"triple 4: the tokenizer is one that ends the prompt with '</s>'.*add_eos"
    ):
        tokenize_triple(triple, make_tokenizer(add_eos=True))


def test_prompt_whose_own_text_ends_with_the_end_token() -> None:
    tokens = tokenize_triple(Triple("the sky </s>", "blue", "green"), make_tokenizer())
    assert tokens.prompt[-1] == 2


def test_no_tokens() -> None:
    with pytest.raises(PreferenceError, match="triple 5: `rejected` is empty after tokenization"):
        tokenize_triple(Triple("the", "blue", " ", name="triple 5"), make_tokenizer())


def test_messages_without_a_chat_template() -> None:
    triple = Triple(**TURNS, name="triple 6")
    with pytest.raises(
        PreferenceError,
        match=r"triple 6 is a conversation, and the tokenizer has no chat template.*tokenizer\.chat_template",
    ):
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
    with pytest.raises(PreferenceError, match="`chosen` is empty after tokenization"):
        tokenize_triple(Triple(**TURNS), make_tokenizer(template=template))


def test_template_that_refuses_the_conversation() -> None:
    triple = Triple(
        [{"role": "critic", "content": "hello"}], [assistant("blue")], [assistant("green")], name="triple 8"
    )
    with pytest.raises(
        PreferenceError, match=r"triple 8 is a conversation of roles \['critic'\].*refuses \(no critics\)"
    ):
        tokenize_triple(triple, make_tokenizer())


TURNS_WITH_BOS = (
    "{% for m in messages %}{{ '<bos> ' if loop.first else '' }}{{ m['role'][:1] }} {{ m['content'] }} {% endfor %}"
    "{{ 'a ' if add_generation_prompt else '' }}"
)


def test_where_an_end_token_goes() -> None:
    tokenizer = ending_tokenizer()
    end = tokenizer.eos_token_id
    triple = Triple("the cat is", "a dog of my own", "we see")
    prompt, chosen, rejected = response_tokens(triple, tokenizer)
    assert (len(prompt), len(chosen), len(rejected)) == (4, 6, 3)
    assert chosen[-1] == rejected[-1] == end
    # Cut to 4 tokens, the text goes on. Exactly full, it has no room for the end token.
    for room, ended in ((4, False), (5, False), (6, True)):
        _, chosen, rejected = response_tokens(triple, tokenizer, max_length=len(prompt) + room)
        assert (chosen[-1] == end, rejected[-1] == end) == (ended, True)
        assert len(chosen) == room
    assert response_tokens(Triple("the cat", "a dog bird", "we"), tokenizer)[1].count(end) == 1
    assert response_tokens(triple, word_tokenizer())[1:] == (
        tokenizer("a dog of my own", add_special_tokens=False)["input_ids"],
        tokenizer("we see", add_special_tokens=False)["input_ids"],
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
