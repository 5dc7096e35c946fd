"""Few-shot prompts: likenesses that scikit-learn's formula gives, and where the examples stand."""

from __future__ import annotations

from math import log, sqrt

import numpy as np
import pytest

from dspa.data.triples import Triple
from dspa.personal.shots import Example, Examples, examples_of

EXAMPLES = [Example("clean a boat", "A1"), Example("clean a bicycle", "A2"), Example("Name a BOAT, a boat!", "A3")]


def test_likeness_is_the_cosine_of_tf_idf():
    examples = Examples(EXAMPLES)
    # By hand: n = 3; "clean" and "boat" are in 2, "a" in 3, "bicycle" and "name" in 1.
    two, three, one = log(4 / 3) + 1, 1.0, log(4 / 2) + 1
    vectors = {"A1": (two, three, two, 0, 0), "A2": (two, three, 0, one, 0), "A3": (0, 2 * three, 2 * two, 0, one)}
    for vector, wanted in zip(examples._vectors, vectors.values(), strict=True):
        assert np.allclose(vector, np.array(wanted) / sqrt(sum(x * x for x in wanted)))


@pytest.mark.parametrize(
    ("prompt", "answers"),
    [
        ("How do I clean my bicycle?", ["A2", "A1", "A3"]),
        ("a boat's name", ["A3", "A1", "A2"]),
        ("nothing of it", ["A1", "A2", "A3"]),
    ],
)
def test_the_nearest(prompt: str, answers: list[str]):
    assert [example.answer for example in Examples(EXAMPLES).nearest(prompt, 3)] == answers
    assert [example.answer for example in Examples(EXAMPLES).nearest(prompt, 1)] == answers[:1]
    assert len(Examples(EXAMPLES).nearest(prompt, 9)) == 3


def test_examples_are_earlier_turns():
    examples = Examples(EXAMPLES)
    shown = examples.shown("clean a bicycle now", 2)
    assert [(message["role"], message["content"]) for message in shown] == [
        ("user", "clean a boat"),
        ("assistant", "A1"),
        ("user", "clean a bicycle"),
        ("assistant", "A2"),
        ("user", "clean a bicycle now"),
    ]
    system, user = {"role": "system", "content": "name a boat"}, {"role": "user", "content": "bicycle"}
    shown = examples.shown([system, user], 1)
    assert (
        shown[0] == system
        and shown[-1] == user
        and [message["content"] for message in shown[1:3]]
        == [
            "clean a bicycle",
            "A2",
        ]
    )


def test_examples_of_triples():
    messages = [{"role": "user", "content": "p"}]
    reply = [{"role": "assistant", "content": "good"}]
    talk = Triple(messages, reply, [{"role": "assistant", "content": "bad"}])
    assert examples_of([Triple("q", "yes", "no"), talk]) == [Example("q", "yes"), Example("p", "good")]
    with pytest.raises(ValueError, match="`examples` is empty"):
        Examples([])
