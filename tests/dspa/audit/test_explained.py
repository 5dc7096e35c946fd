"""Explained latents and groups of them, by a judge that knows one word per latent."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dspa.audit.evidence import Context, LatentEvidence
from dspa.audit.explained import METHOD, ExplainedLatent, compare_groups, explain_latents, from_file
from dspa.audit.scoring import Score
from dspa.confusion import Confusion
from dspa.judges.judge import Judge
from dspa.saes.labels import Explanation

from ..support.endpoint import last, serving

WORDS = {1: "cats", 2: "dogs", 3: "lists", 4: "odd", 5: "never"}
# The judge calls 4 unreliable and has no category for it.
CATEGORIES = {"cats": "Content", "dogs": "Safety", "lists": "Structure", "odd": "I cannot say"}


def context(word: str, entry: int, value: float) -> Context:
    return Context(entry, 1, ("some", f" {word}", f" {entry}"), (0.0, value, 0.0))


def evidence_of(latent: int) -> LatentEvidence:
    if latent == 5:
        return LatentEvidence((), (), ())
    active = tuple(context(WORDS[latent], entry, entry + 1.0) for entry in range(12))
    return LatentEvidence(active[-2:], active, tuple(context("birds", 100 + entry, 0.0) for entry in range(10)))


EVIDENCE = {latent: evidence_of(latent) for latent in WORDS}


def answer(request: dict[str, Any]) -> str:
    asked = last(request)
    if match := re.search(r"latent (\d+) active", asked):
        word = WORDS[int(match[1])]
        assert f"[[ {word}]]" in asked
        return json.dumps({"reliable": word != "odd", "explanation": word, "evidence": f"the word {word}"})
    (word,) = re.findall("Explanation: (.*)", asked)
    if asked.startswith("Categories"):
        return CATEGORIES[word]
    texts = re.split(r"\n?--- Text \d+\n", asked.split("\n---\n")[0])[1:]
    return json.dumps([int(word in text) for text in texts])


def test_a_judge_explains_sorts_and_scores(tmp_path: Path):
    pytest.importorskip("openai", reason='needs openai: pip install "dspa-kernels[judge]"')
    with serving(answer) as endpoint:
        judge = Judge(endpoint.url, "m", cache=tmp_path)
        latents = explain_latents(judge, EVIDENCE, n=20)
    # Of the 12 texts with it, two were shown to explain it.
    full = Score(20, Confusion(tp=10, fn=0, fp=0, tn=10))
    assert latents[2] == ExplainedLatent("dogs", "m", METHOD, True, "the word dogs", "Content", full, full)
    assert [latents[latent].category for latent in (1, 3)] == ["Content", "Structure"]
    assert (latents[4].text, latents[4].reliable, latents[4].category, latents[4].detection) == (
        "odd",
        False,
        None,
        full,
    )
    assert "Without a category: the answer is 'I cannot say'" in latents[4].problem
    assert latents[5] == ExplainedLatent(problem="It is active in none of the texts.")


def test_explanations_of_a_file_are_sorted_and_scored(tmp_path: Path):
    pytest.importorskip("openai", reason='needs openai: pip install "dspa-kernels[judge]"')
    given = {1: [Explanation("dogs", "gpt", "np_max-act")], 3: [Explanation("lists")]}
    with serving(answer) as endpoint:
        latents = explain_latents(Judge(endpoint.url, "m", cache=tmp_path), EVIDENCE, given, n=20)
        assert not any("active?" in last(request) for request in endpoint.requests)
    wrong, right = Score(22, Confusion(tp=0, fn=12, fp=0, tn=10)), Score(22, Confusion(tp=12, fn=0, fp=0, tn=10))
    assert latents[1] == ExplainedLatent("dogs", "gpt", "np_max-act", None, "", "Content", wrong, wrong)
    assert (latents[3].detection, latents[3].fuzzing) == (right, right)
    assert latents[2] == ExplainedLatent(problem="The file does not explain it.")


def test_several_explanations_are_joined():
    several = [Explanation("a", "gpt", "x"), Explanation("b", "claude", "x"), Explanation("a", "", "")]
    assert from_file(several) == ExplainedLatent("a; b", "gpt; claude", "x")


def test_groups_against_a_control():
    score = Score(5, Confusion(2, 1, 1, 1))
    latents = {
        **{n: ExplainedLatent("x", category="Discourse", detection=score, fuzzing=score) for n in range(6)},
        **{n: ExplainedLatent("x", category="Content", detection=score, fuzzing=score) for n in range(6, 12)},
        12: ExplainedLatent(),
        13: ExplainedLatent("x", detection=score, fuzzing=score),
    }
    groups = {"ablate": [0, 1, 2, 3, 12, 13], "control": [6, 7, 8, 9, 10, 11], "augment": [12]}
    compared = compare_groups(latents, groups, "control")
    ablate = compared["ablate"]
    assert (ablate.n_latents, ablate.n_explained, ablate.n_sorted) == (6, 5, 4)
    assert ablate.detection == ablate.fuzzing == Score(25, Confusion(10, 5, 5, 5))
    # All 4 against none of 6: one of the 210 ways.
    assert {test.category: (test.n_sample, test.n_control) for test in ablate.tests} == {
        "Content": (0, 6),
        "Discourse": (4, 0),
    }
    assert [test.p for test in ablate.tests] == pytest.approx([1 / 210] * 2)
    assert compared["control"].tests == compared["augment"].tests == ()
    with pytest.raises(ValueError, match="`control` is 'random'; accepted: ablate, control, augment"):
        compare_groups(latents, groups, "random")
