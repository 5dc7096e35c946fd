"""Explanations and categories by a judge."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from dspa.audit.evidence import Context
from dspa.audit.explain import CATEGORIES, active_places, categorize, explain, fold, marked
from dspa.errors import LabelError
from dspa.judges.judge import Judge

from ..support.endpoint import last, serving


def context(text: str, values: list[float], entry: int = 1) -> Context:
    tokens = tuple(re.findall(r" ?[^ ]+", text))
    return Context(entry, values.index(max(values)), tokens, tuple(values))


@pytest.mark.parametrize(
    ("text", "values", "expected"),
    [
        ("a cat sat", [0.0, 1.0, 0.0], "a[[ cat]] sat"),
        ("a cat sat", [0.0, 1.0, 0.5], "a[[ cat sat]]"),
        # Less than 0.3 of the largest is not marked.
        ("a cat sat", [0.29, 1.0, 0.3], "a[[ cat sat]]"),
        ("a cat sat", [0.0, 0.0, 0.0], "a cat sat"),
        ("[[a]] cat [[[", [0.0, 1.0, 0.0], "[ [a] ][[ cat]] [ [ ["),
    ],
)
def test_marks(text: str, values: list[float], expected: str):
    of = context(text, values)
    assert marked(of, active_places(of)) == expected


def test_latents_are_explained(tmp_path: Path):
    contexts = {
        7: [context("a cat sat", [0.0, 2.0, 0.0]), context("the cat", [0.0, 1.0])],
        3: [],
        5: [context("x", [1.0])],
    }
    replies = {
        7: 'Sure: {"reliable": true, "explanation": "cats", "evidence": "[[ cat]]"}',
        5: '{"reliable": "yes", "explanation": "x"}',
    }

    def answer(request: dict[str, Any]) -> str:
        (latent,) = re.findall(r"latent (\d+)", last(request))
        return replies[int(latent)]

    pytest.importorskip("openai", reason='needs openai: pip install "dspa-kernels[judge]"')
    with serving(answer) as endpoint:
        found = explain(Judge(endpoint.url, "m", cache=tmp_path), contexts)
    assert list(found) == [7, 5]
    assert found[7].value is not None
    assert (found[7].value.reliable, found[7].value.explanation, found[7].value.evidence) == (True, "cats", "[[ cat]]")
    assert not found[5].answered
    assert "accepted: one JSON object" in found[5].problem
    asked = next(last(request) for request in endpoint.requests if "latent 7" in last(request))
    assert "--- Text 1\na[[ cat]] sat\n--- Text 2\nthe[[ cat]]\n---\n" in asked


def test_explanations_get_categories(tmp_path: Path):
    pytest.importorskip("openai", reason='needs openai: pip install "dspa-kernels[judge]"')
    explanations = {1: "cats", 2: "line breaks", 3: "cats", 4: "something"}
    said = {"cats": "content", "line breaks": "**Structure**", "something": "Style"}

    def answer(request: dict[str, Any]) -> str:
        (explanation,) = re.findall("Explanation: (.*)", last(request))
        return said[explanation]

    with serving(answer) as endpoint:
        categories = categorize(Judge(endpoint.url, "m", cache=tmp_path), explanations)
    assert {latent: one.value for latent, one in categories.items()} == {
        1: "Content",
        2: "Structure",
        3: "Content",
        4: None,
    }
    assert len(endpoint.requests) == 3
    assert all(f"{name}: " in last(endpoint.requests[0]) for name in CATEGORIES)


def test_six_categories_are_folded_to_four():
    folded = {category: fold(category) for category in CATEGORIES}
    assert folded == {
        "Safety": "Content",
        "Content": "Content",
        "Intent": "Discourse",
        "Discourse": "Discourse",
        "Structure": "Structure",
        "Grammatical": "Grammatical",
    }
    with pytest.raises(LabelError, match="'Style' is not known; accepted: Safety, Discourse"):
        fold("Style")
