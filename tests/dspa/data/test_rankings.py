"""Rankings: every format, every refusal, and what they are as triples."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from dspa.data.rankings import Ranking
from dspa.data.tokens import response_tokens
from dspa.data.triples import Triple, key_of, load_rankings, load_triples
from dspa.errors import PreferenceError

from ..support.adapters import ending_tokenizer
from ..support.triples import PLAIN, assistant, user

ENTRY = {"prompt": "the sky is", "responses": [" blue", " green", " red"], "rewards": [0.5, 2, -1]}
TWO = {"prompt": "the sky is", "responses": [" blue", " green"], "rewards": [1.0, 0.0]}


def load_one(entry: dict[str, Any], **options: bool) -> Ranking:
    (ranking,) = load_rankings([entry], **options)
    return ranking


def refusal(entry: Any, **options: bool) -> str:
    """Return the message that refuses `entry` as the second of two, after the first has been yielded."""
    rankings = load_rankings([TWO, entry], **options)
    next(rankings)
    with pytest.raises(PreferenceError) as raised:
        next(rankings)
    message = str(raised.value)
    assert message.startswith(("ranking 2: ", "ranking 2 is ")) and "; accepted: " in message
    return message


def test_text():
    assert load_one(ENTRY) == Ranking("the sky is", [" blue", " green", " red"], [0.5, 2, -1])


def test_conversations():
    prompt, messages = [user("what")], [[assistant("blue")], [assistant("green")]]
    entry = {"prompt": prompt, "responses": messages, "rewards": [1, 0], "chat_template_kwargs": {"polite": True}}
    expected = Ranking(prompt, messages, [1, 0], chat_template_kwargs={"polite": True})
    assert load_one(entry) == expected
    # A text is the assistant's turn.
    assert load_one({**entry, "responses": ["blue", [assistant("green")]]}) == expected


def test_scored_responses_of_a_data_set():
    """As in princeton-nlp/llama3-ultrafeedback-armorm: text, next to conversations that begin with the prompt."""
    entry = {
        "prompt": "what",
        "all_generated_responses": ["blue", "green", "red"],
        "all_rm_scores": [0.1, 0.3, 0.2],
        "chosen": [user("what"), assistant("green")],
        "rejected": [user("what"), assistant("blue")],
    }
    answers = [[assistant(text)] for text in ("blue", "green", "red")]
    assert load_one(entry) == Ranking([user("what")], answers, [0.1, 0.3, 0.2])
    (triple,) = load_triples([entry])
    assert triple == Triple([user("what")], [assistant("green")], [assistant("blue")])


@pytest.mark.parametrize("names", [("score_chosen", "score_rejected"), ("chosen_score", "rejected_score")])
def test_scored_pairs(names):
    scores = dict(zip(names, (7.5, 8.0), strict=True))
    # The scores decide, not the names of the responses.
    assert load_one(PLAIN | scores) == Ranking("the sky is", (" blue", " green"), [7.5, 8.0])
    implicit = {"chosen": [user("what"), assistant("a")], "rejected": [user("what"), assistant("b")]} | scores
    assert load_one(implicit) == Ranking([user("what")], ([assistant("a")], [assistant("b")]), [7.5, 8.0])


def test_without_rewards():
    bare = {"prompt": "the sky is", "responses": [" blue", " green", " red"]}
    for entry, key in ((bare, "'rewards'"), (PLAIN, "'score_chosen' and 'score_rejected'")):
        message = refusal(entry)
        assert f"ranking 2 is without {key}" in message and "with `plain`" in message
    assert load_one(bare, plain=True).rewards == [3, 2, 1]
    assert load_one(PLAIN, plain=True) == Ranking("the sky is", (" blue", " green"), [2, 1])
    assert load_one(ENTRY, plain=True).rewards == [0.5, 2, -1]
    (ranking,) = load_rankings([Triple(**PLAIN)], plain=True)
    assert ranking.responses == (" blue", " green")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": [1, 2]}, "`rewards` is 2 numbers for 3 responses; accepted: one finite number per response"),
        ({"rewards": [1, 2, math.nan]}, r"`rewards[2]` is nan"),
        ({"rewards": [1, 2, math.inf]}, r"`rewards[2]` is inf"),
        ({"rewards": [1, "2", 0]}, r"`rewards[1]` is '2'"),
        ({"rewards": [1, True, 0]}, r"`rewards[1]` is True"),
        ({"rewards": [1, None, 0]}, r"`rewards[1]` is None"),
        ({"rewards": [1, 1, 1]}, "`rewards` is all 1, which prefers nothing"),
        ({"rewards": 3}, "`rewards` is of type int"),
        ({"responses": [" blue"], "rewards": [1]}, "`responses` is 1 of them; accepted: two or more"),
        ({"responses": []}, "`responses` is 0 of them"),
        ({"responses": " blue"}, "`responses` is of type str; accepted: a list of texts, or of lists of messages"),
        ({"responses": [" blue", " red", " blue"]}, "`responses[0]` is equal to `responses[2]`"),
        ({"responses": [" blue", "", " red"]}, "`responses[1]` is empty"),
        ({"responses": [" blue", 3, " red"]}, "`responses[1]` is of type int"),
        ({"responses": [" blue", [assistant("green")], " red"]}, "`responses[1]` is messages"),
        ({"prompt": None}, "without 'prompt'"),
        ({"prompt": ""}, "`prompt` is empty"),
        ({"prompt": [user("a")], "responses": [[user("b")], "c", "d"]}, "first role of `responses[0]`"),
        ({"responses": [" \ud800", " red", " blue"]}, "lone surrogate"),
    ],
)
def test_refusals(change, message):
    assert message in refusal(ENTRY | change)


def test_other_refusals():
    assert "only the keys ['prompt', 'text']" in refusal({"prompt": "a", "text": "b"})
    assert "is of type int; accepted: an object with 'prompt', 'responses' and 'rewards'" in refusal(3)
    assert "`rewards` is 1 numbers for 2 responses" in refusal(PLAIN | {"score_chosen": 1})
    with pytest.raises(PreferenceError, match="`source` is a list without a ranking; accepted: one ranking or more"):
        list(load_rankings([]))


def test_files(tmp_path: Path):
    path = tmp_path / "ranked.jsonl"
    path.write_text(json.dumps(ENTRY) + "\n" + json.dumps(TWO | {"rewards": [1]}) + "\n")
    rankings = load_rankings(path)
    assert next(rankings).name.endswith("ranked.jsonl line 1")
    with pytest.raises(PreferenceError, match=r"ranked\.jsonl line 2: `rewards` is 1 numbers for 2 responses"):
        next(rankings)
    table = Dataset.from_list([ENTRY, TWO])
    assert [list(ranking.rewards) for ranking in load_rankings(table)] == [[0.5, 2, -1], [1, 0]]


def test_as_triples():
    """The best and the worst response, from a raw ranking or a read one."""
    assert list(load_triples([ENTRY, load_one(ENTRY)])) == 2 * [Triple("the sky is", " green", " red")]
    with pytest.raises(PreferenceError, match="triple 1 is without 'rewards'"):
        list(load_triples([{"prompt": "a", "responses": ["b", "c"]}]))


def test_the_content_decides_the_key():
    keys = {key_of(load_one(ENTRY)), key_of(load_one(ENTRY | {"rewards": [0.5, 2, -2]})), key_of(Triple(**PLAIN))}
    assert len(keys) == 3 and key_of(load_one(ENTRY)) in keys


def test_tokens_are_those_of_triples():
    tokenizer = ending_tokenizer()
    entry = ENTRY | {"prompt": "we see the", "responses": [" sun", " rain and the sun and the snow", " snow"]}
    prompt, *responses = response_tokens(load_one(entry), tokenizer, max_length=7)
    (best_and_worst,) = load_triples([entry])
    assert (prompt, responses[1], responses[2]) == response_tokens(best_and_worst, tokenizer, max_length=7)
    assert [len(response) for response in responses] == [2, 3, 2]
    with pytest.raises(PreferenceError, match=r"`responses\[0\]` is equal to `responses\[1\]` after tokenization"):
        response_tokens(load_one(entry | {"responses": [" sun", "  sun", " snow"]}), tokenizer)
