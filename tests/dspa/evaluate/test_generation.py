"""Texts that are generated in batches, streamed and compared with the base model's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dspa.config import SteeringConfig
from dspa.errors import ModelError
from dspa.evaluate.generation import Answer, answer_prompts, check_prompts, edited_characters
from dspa.maps.cdmap import ConditionalDifferenceMap
from dspa.steering.dspa import Steering
from dspa.testing import (
    D_SAE_IN,
    D_SAE_OUT,
    ENGLISH,
    L_IN,
    L_OUT,
    make_map,
    make_model,
    make_sae,
    with_tensors,
    word_tokenizer,
)

PROMPTS = [" ".join(ENGLISH[n : n + 1 + n * 5 % 9]) for n in range(7)]
PROMPTS += [PROMPTS[2]]
N_NEW = 9


@pytest.fixture(scope="module")
def model():
    return make_model("gemma2")


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture(scope="module")
def cdmap() -> ConditionalDifferenceMap:
    return make_map(make_sae(L_IN, D_SAE_IN, seed=1), make_sae(L_OUT, D_SAE_OUT, seed=2))


STRONG = SteeringConfig(alpha=1.0, mode="both")
# Edits some tokens only.
WEAK = SteeringConfig(alpha=1.0, k_diff=1)


def steering_of(cdmap: ConditionalDifferenceMap, config: SteeringConfig = STRONG, **settings: Any) -> Steering:
    saes = make_sae(L_IN, D_SAE_IN, seed=1), make_sae(L_OUT, D_SAE_OUT, seed=2)
    return Steering(*saes, cdmap, config, backend="reference", **settings)


@pytest.fixture
def answer(model, tokenizer, cdmap):
    def answer(prompts: list[str] = PROMPTS, config: SteeringConfig = STRONG, **settings: Any) -> list[Answer]:
        with steering_of(cdmap, config, record=True).attach(model) as steering:
            encode = lambda text: tokenizer(text)["input_ids"]  # noqa: E731
            batches = answer_prompts(model, tokenizer, [steering], prompts, encode, max_new_tokens=N_NEW, **settings)
            return [answer for batch in batches for answer in batch]

    return answer


def alone(model: Any, tokenizer: Any, prompt: str) -> list[int]:
    """The text that generate() adds to one prompt."""
    inputs = tokenizer(prompt, return_tensors="pt")
    ids: list[int] = model.generate(**inputs, max_new_tokens=N_NEW, do_sample=False)[0].tolist()
    return ids[inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_a_batch_is_one_prompt_at_a_time(model, tokenizer, cdmap, answer, batch_size):
    with steering_of(cdmap).attach(model):
        steered = [tokenizer.decode(alone(model, tokenizer, prompt)) for prompt in PROMPTS]
    base = [tokenizer.decode(alone(model, tokenizer, prompt)) for prompt in PROMPTS]
    assert steered != base
    answers = answer(batch_size=batch_size, compare=True)
    assert [answer.text for answer in answers] == steered and [answer.base for answer in answers] == base
    assert [answer.prompt for answer in answers] == PROMPTS
    assert [answer.text for answer in answer(batch_size=batch_size)] == steered


def test_marks_are_the_words_after_edited_positions(model, tokenizer, cdmap, answer):
    seen = set()
    for result in answer(config=WEAK, batch_size=3, compare=True):
        with steering_of(cdmap, WEAK, record=True).attach(model) as steering:
            ids = alone(model, tokenizer, result.prompt)
        n_prompt = len(tokenizer(result.prompt)["input_ids"])
        after = {edit.position + 1 - n_prompt for edit in steering.trace}
        # Special tokens and those that the tokenizer does not have are no words.
        words = [n for n, token in enumerate(ids) if 2 < token < len(tokenizer)]
        assert [_within(result, n) for n in range(len(words))] == [n in after for n in words]
        seen |= {n in after for n in words}
    assert seen == {False, True}


@pytest.mark.parametrize(("positions", "start"), [("all", 0), ("response", -1), ("generated", 0)])
def test_a_trace_ends_where_the_text_ends(model, tokenizer, cdmap, monkeypatch, positions, start):
    """In a batch, whose shorter texts are padded to the longest."""
    config = SteeringConfig(alpha=1.0, mode="both", positions=positions)
    with steering_of(cdmap, config, record=True).attach(model) as steering:
        end = alone(model, tokenizer, PROMPTS[0])[2]
        monkeypatch.setattr(model.generation_config, "eos_token_id", end)
        answers = next(
            answer_prompts(
                *(model, tokenizer, [steering], PROMPTS, lambda text: tokenizer(text)["input_ids"]),
                max_new_tokens=N_NEW,
                batch_size=len(PROMPTS),
            )
        )
    lengths = [len(answer.ids) for answer in answers]
    assert min(lengths) < max(lengths) and {answer.ids[-1] for answer in answers if len(answer.ids) < N_NEW} == {end}
    for row, (answer, text) in enumerate(zip(answers, steering.trace.texts, strict=True)):
        n_prompt = len(tokenizer(answer.prompt)["input_ids"])
        first = 0 if positions == "all" else n_prompt + start
        assert (text.row, text.n_tokens) == (row, n_prompt + len(answer.ids) - 1 - first)
        assert {edit.position for edit in steering.trace if edit.row == row} <= set(range(first, first + text.n_tokens))


def _within(answer: Answer, n: int) -> bool:
    """Return True if the last letter of the n-th word is in a range."""
    end = len(" ".join(answer.text.split()[: n + 1]))
    return any(first < end <= last for first, last in answer.edited)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "`temperature` is -1.0; accepted: a finite number >= 0"),
        ({"temperature": float("nan")}, "`temperature` is nan"),
        ({"temperature": 1.0, "top_p": 3.0}, "`top_p` is 3.0; accepted: a number above 0, up to 1"),
    ],
    ids=str,
)
def test_bad_sampling(answer, settings, message):
    with pytest.raises(ValueError, match=message):
        answer(**settings)


def test_sampling(answer):
    greedy = [result.text for result in answer()]
    # Of the likeliest tokens, the first alone has any probability as small as this.
    assert [result.text for result in answer(temperature=5.0, top_p=1e-6)] == greedy
    drawn = [result.text for result in answer(temperature=5.0, seed=3)]
    assert drawn != greedy and drawn == [result.text for result in answer(temperature=5.0, seed=3, compare=True)]
    # Equal prompts are drawn anew.
    assert drawn[2] != drawn[7] and drawn != [result.text for result in answer(temperature=5.0, seed=4)]


def test_a_stream_prints_the_text(answer, capsys):
    texts = [result.text for result in answer(stream=True)]
    assert capsys.readouterr().out.split("\n") == [*texts, ""]


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_selects_nothing_is_refused(model, tokenizer, cdmap, capsys, stream):
    """A map whose values are 0, as those of few triples are under scoring="confident"."""
    empty = with_tensors(cdmap, values=torch.zeros_like(cdmap.values))
    with steering_of(empty).attach(model) as steering:
        batches = answer_prompts(
            *(model, tokenizer, [steering], PROMPTS, lambda text: tokenizer(text)["input_ids"]),
            max_new_tokens=N_NEW,
            stream=stream,
        )
        with pytest.raises(ModelError, match="Prompt 1 selects no latent to edit"):
            next(batches)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (" ".join(["cat"] * 119), r"Prompt 2 with `max_new_tokens`, 120 \+ 9, is 129 tokens; accepted: up to 128"),
        ("<bos>", "Prompt 2 is nothing but special tokens"),
        ("", "Prompt 2 is nothing but special tokens"),
    ],
)
def test_a_prompt_that_cannot_be_answered_is_named(answer, prompt, message):
    with pytest.raises(ValueError, match=message):
        answer(["the cat", prompt])
    assert answer(["the cat", " ".join(["cat"] * 118)])


@pytest.mark.parametrize(("n_tokens", "wanted"), [(6, 122), (127, 1), (None, 200)])
def test_without_a_number_texts_are_as_long_as_there_is_room_for(model, n_tokens, wanted, monkeypatch):
    """The model has 128 positions, or no bound."""
    if n_tokens is None:
        monkeypatch.setattr("dspa.evaluate.generation.context_length", lambda _: None)
    assert check_prompts(model, [[5], [5] * (n_tokens or 300)], None) == wanted
    assert check_prompts(model, [[5]], 7) == 7


def test_a_prompt_without_room_for_a_token_is_refused(model):
    with pytest.raises(
        ValueError, match=r"Prompt 1 with `max_new_tokens`, 128 \+ 1, is 129 tokens; accepted: up to 128"
    ):
        check_prompts(model, [[5] * 128], None)


def test_answers_fill_the_room_that_a_prompt_leaves(model, tokenizer, cdmap):
    with steering_of(cdmap).attach(model) as steering:
        encode = lambda text: tokenizer(text)["input_ids"]  # noqa: E731
        (answer,) = next(answer_prompts(model, tokenizer, [steering], [" ".join(["cat"] * 118)], encode))
    assert 1 <= len(tokenizer(answer.text, add_special_tokens=False)["input_ids"]) <= 9


def test_prompts_are_read_as_they_are_needed(model, tokenizer, cdmap):
    read = []

    def prompts():
        for n in range(10**9):
            read.append(n)
            yield PROMPTS[n % len(PROMPTS)]

    with steering_of(cdmap, record=True).attach(model) as steering:
        encode = lambda text: tokenizer(text)["input_ids"]  # noqa: E731
        batches = answer_prompts(model, tokenizer, [steering], prompts(), encode, max_new_tokens=2, batch_size=4)
        n_edits = []
        for _ in range(3):
            assert len(next(batches)) == 4
            n_edits.append(len(steering.trace))
    assert len(read) == 12 and max(n_edits) <= 4 * 3


def test_what_is_not_attached_is_refused(model, tokenizer, cdmap):
    with pytest.raises(ModelError, match="not attached"):
        next(answer_prompts(model, tokenizer, [steering_of(cdmap)], PROMPTS, lambda text: tokenizer(text)["input_ids"]))


def test_a_character_of_several_tokens_is_marked_as_a_whole():
    """Bytes as tokens: an edit before the first byte of a character marks it, and nothing else."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    ids = tokenizer("aé€b")["input_ids"]
    assert len(ids) == 1 + 2 + 3 + 1
    for token, expected in ((0, (0, 1)), (1, (1, 2)), (2, (1, 2)), (3, (2, 3)), (5, (2, 3)), (6, (3, 4))):
        assert edited_characters(tokenizer, ids, {token}) == (expected,)
