"""Detection and fuzzing, with judges of known quality."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from dspa.audit.evidence import Context, LatentEvidence
from dspa.audit.scoring import Kind, Score, pooled, score, weighted_f1
from dspa.confusion import Confusion
from dspa.judges.judge import Judge

from ..support.endpoint import Reply, completion, last, serving

pytest.importorskip("openai", reason='needs openai: pip install "dspa-kernels[judge]"')

WORDS = ("a", "dog", "sat", "on", "the", "mat")
KINDS: tuple[Kind, ...] = ("detection", "fuzzing", "fuzzing-active")


def evidence(n: int = 60, entry: int = 1) -> LatentEvidence:
    """A latent of the word "cat": n texts with it, by rising value, and as many without it."""
    g = Random(0)

    def context(k: int, word: str, value: float) -> Context:
        tokens = [f" {g.choice(WORDS)}" for _ in range(9)]
        # Twice: the mean number of marks of right texts is two.
        for place in (4, 7):
            tokens[place] = f" {word}"
        values = [value * (token == " cat") for token in tokens]
        return Context(entry + k, 4, tuple(tokens), tuple(values))

    active = tuple(context(k, "cat", 1.0 + k) for k in range(n))
    return LatentEvidence(active[-3:], active, tuple(context(1000 + k, "cow", 0.0) for k in range(n)))


def texts_in(request: dict[str, Any]) -> list[str]:
    body = last(request).split("\n---\n")[0]
    return re.split(r"\n?--- Text \d+\n", body)[1:]


def knows_cats(text: str) -> bool:
    """The right answer: the marks, or any word of an unmarked text, are cats alone."""
    words = " ".join(re.findall(r"\[\[(.*?)\]\]", text)) or text
    return "cat" in words and ("[[" not in text or set(words.split()) == {"cat"})


def judged(tmp_path: Path, kind: Kind, answer: Callable[[dict[str, Any]], Reply], **options: Any) -> tuple[Score, Any]:
    with serving(answer) as endpoint:
        judge = Judge(endpoint.url, "m", cache=tmp_path)
        scores = score(judge, kind, {7: "cats"}, {7: options.pop("evidence", evidence())}, **options)
    return scores[7], endpoint


def all_by(rule: Callable[[str], bool]) -> Callable[[dict[str, Any]], str]:
    return lambda request: json.dumps([int(rule(text)) for text in texts_in(request)])


@pytest.mark.parametrize("kind", KINDS)
def test_a_judge_who_knows(tmp_path: Path, kind: Kind):
    found, endpoint = judged(tmp_path, kind, all_by(knows_cats), n=50)
    assert (found.n_asked, found.n_answered, found.problem) == (100, 100, "")
    assert found.confusion == Confusion(tp=50, fn=0, fp=0, tn=50)
    assert found.confusion.balanced_accuracy == found.confusion.f1 == 1
    assert len(endpoint.requests) == 20
    assert all(len(texts_in(request)) == 5 for request in endpoint.requests)


@pytest.mark.parametrize("kind", KINDS)
def test_a_judge_who_guesses(tmp_path: Path, kind: Kind):
    found, _ = judged(tmp_path, kind, all_by(lambda text: True), n=50)
    assert (found.confusion.recall, found.confusion.specificity, found.confusion.balanced_accuracy) == (1, 0, 0.5)
    assert found.confusion.f1 == pytest.approx(2 / 3)


def test_a_judge_with_errors(tmp_path: Path):
    """A judge who misses the weakest half of the texts, which it knows by heart."""
    weak = {"".join(context.tokens) for context in evidence().active[:30]}
    found, _ = judged(tmp_path, "detection", all_by(lambda text: knows_cats(text) and text not in weak), n=50)
    # One of each fiftieth by value: a half of them is from the weaker half.
    assert found.confusion == Confusion(tp=25, fn=25, fp=0, tn=50)
    assert found.confusion.balanced_accuracy == 0.75


def test_a_short_last_question_counts(tmp_path: Path):
    found, endpoint = judged(tmp_path, "detection", all_by(knows_cats), n=4)
    assert sorted(len(texts_in(request)) for request in endpoint.requests) == [3, 5]
    assert (found.n_asked, found.n_answered) == (8, 8)
    assert found.confusion == Confusion(tp=4, fn=0, fp=0, tn=4)


def test_unanswered_texts_are_counted(tmp_path: Path):
    """Of four questions one is answered by too few numbers, one by a word, one by a number that is neither 0 nor 1."""
    bad = iter(["[1, 0]", "yes", "[1, 0, 2, 0, 1]"])

    def answer(request: dict[str, Any]) -> str:
        right = all_by(knows_cats)(request)
        return next(bad, right)

    found, _ = judged(tmp_path, "detection", answer, n=10)
    assert (found.n_asked, found.n_answered, found.n_unanswered) == (20, 5, 15)
    assert found.confusion.accuracy == 1
    assert "accepted: a JSON list of 5 numbers" in found.problem


@pytest.mark.parametrize("kind", ["fuzzing", "fuzzing-active"])
def test_wrong_marks(tmp_path: Path, kind: Kind):
    """As many as right ones, on tokens that are not active, and on the middle one where it is not."""
    _, endpoint = judged(tmp_path, kind, all_by(knows_cats), n=20)
    texts = [text for request in endpoint.requests for text in texts_in(request)]
    wrong = [text for text in texts if not knows_cats(text)]
    assert len(wrong) == 20
    for text in wrong:
        marks = " ".join(re.findall(r"\[\[(.*?)\]\]", text)).split()
        assert len(marks) == 2
        assert "cat" not in marks
        assert ("cow" in marks) == (kind == "fuzzing")
        assert ("cat" in text) == (kind == "fuzzing-active")


def test_texts_of_the_explanation_are_not_shown(tmp_path: Path):
    all_of = evidence(30)
    found, endpoint = judged(tmp_path, "detection", all_by(knows_cats), evidence=all_of, n=30, seen={7: all_of.top})
    assert found.confusion == Confusion(tp=27, fn=0, fp=0, tn=30)
    shown = [text for request in endpoint.requests for text in texts_in(request)]
    assert not {"".join(context.tokens) for context in all_of.top} & set(shown)


def test_questions_are_the_same_whichever_others_are_scored(tmp_path: Path):
    explanations, of = {7: "cats", 8: "felines"}, {7: evidence(), 8: evidence(entry=500)}
    with serving(all_by(knows_cats)) as endpoint:
        judge = Judge(endpoint.url, "m", cache=tmp_path)
        both = score(judge, "detection", explanations, of, n=10)
        n_asked = len(endpoint.requests)
        assert score(judge, "detection", {8: "felines"}, of, n=10) == {8: both[8]}
        assert len(endpoint.requests) == n_asked == 8
        score(judge, "detection", {8: "felines"}, of, n=10, seed=1)
        assert len(endpoint.requests) == n_asked + 4


def test_a_latent_without_contexts(tmp_path: Path):
    found, endpoint = judged(tmp_path, "fuzzing", all_by(knows_cats), evidence=LatentEvidence((), (), ()))
    assert found == Score(0, Confusion(0, 0, 0, 0))
    assert not endpoint.requests


def test_scores_together():
    one, other = Score(9, Confusion(1, 2, 3, 1), "none"), Score(10, Confusion(4, 0, 0, 6))
    assert pooled([one, other]) == Score(19, Confusion(5, 2, 3, 7), "none")
    assert pooled([]) == Score(0, Confusion(0, 0, 0, 0))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "simulation"}, "`kind` is 'simulation'; accepted: detection"),
        ({"n": 0}, "`n`"),
        ({"seed": -1}, "`seed`"),
    ],
)
def test_bad_arguments(tmp_path: Path, given: dict[str, Any], message: str):
    judge = Judge("http://host/v1", "m", cache=tmp_path)
    with pytest.raises(ValueError, match=message):
        score(judge, **{"kind": "detection", "explanations": {}, "evidence": {}, **given})


def test_f1_weighted_by_density():
    """By hand: F1 of 6/8, of 0 without a true positive, none without an answer, and of 1 for a latent that is rare."""
    scores = {
        0: Score(10, Confusion(tp=3, fn=1, fp=1, tn=5)),
        1: Score(10, Confusion(tp=0, fn=0, fp=0, tn=9)),
        2: Score(10, Confusion(0, 0, 0, 0)),
        3: Score(2, Confusion(tp=1, fn=0, fp=0, tn=1)),
    }
    density = torch.tensor([0.06, 0.03, 0.9, 0.01])
    assert weighted_f1(scores, density) == pytest.approx((0.06 * 0.75 + 0.01 * 1) / 0.1)
    assert weighted_f1(scores, torch.tensor([0.0, 0, 0.9, 0])) is None
    assert weighted_f1({}, density) is None


def digits(request: dict[str, Any]) -> list[float]:
    """How sure a judge is of each text: the surer, the more of its words are cats or dogs."""
    return [0.05 + min(0.9, len(re.findall("cat|dog", text)) / 6) for text in texts_in(request)]


def with_tokens(request: dict[str, Any], apart: bool = True) -> Reply:
    """An answer in tokens: a remark with other numbers, and the list, each number with a comma before it."""
    sure = digits(request)
    bits = [int(p > 0.5) for p in sure]
    tokens = [("Text 1 has [1, 0]", {"Text 1 has [1, 0]": 1.0}), (".\n[", {".\n[": 1.0})]
    for n, (bit, p) in enumerate(zip(bits, sure, strict=True)):
        comma = ", " if n else ""
        shown = {f"{comma}1": 0.8 * p, f"{comma}0": 0.8 * (1 - p), "10": 0.1, "maybe": 0.1}
        tokens.append((f"{comma}{bit}", shown))
    tokens.append(("]", {"]": 1.0}))
    text = "".join(token for token, _ in tokens)
    return 200, completion(text, tokens=tokens if apart else [(text, {text: 1.0})])


def test_auc_is_the_share_of_pairs_in_order(tmp_path: Path):
    found, endpoint = judged(tmp_path, "detection", with_tokens, n=12)
    pairs = [
        (knows_cats(text), p)
        for request in endpoint.requests
        for text, p in zip(texts_in(request), digits(request), strict=True)
    ]
    assert sorted((fits, round(p, 9)) for fits, p in found.probabilities) == sorted((f, round(p, 9)) for f, p in pairs)
    assert len(pairs) == 24
    right, wrong = ([p for fits, p in pairs if fits is wanted] for wanted in (True, False))
    expected = sum((a > b) + 0.5 * (a == b) for a in right for b in wrong) / (len(right) * len(wrong))
    assert 0.5 < expected < 1 and found.auc == pytest.approx(expected)
    assert pooled([found, found]).auc == pytest.approx(expected)


def test_no_auc_without_probabilities(tmp_path: Path):
    """The endpoint gives none, or a token holds several of the numbers."""
    plain, _ = judged(tmp_path / "a", "detection", all_by(knows_cats), n=4)
    merged, _ = judged(tmp_path / "b", "detection", lambda request: with_tokens(request, apart=False), n=4)
    assert plain.auc is merged.auc is None and plain.n_answered == merged.n_answered == 8
    assert Score(2, Confusion(1, 0, 0, 1), "", ((True, 0.5),)).auc is None
