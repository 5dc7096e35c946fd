"""Entropies of answers against logits of generate(), and the gate of a share."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import dspa
from dspa.evaluate.entropies import answer_entropies, gate_of_share
from dspa.testing import D_IN, L_OUT, make_model, word_tokenizer

from ..steering.test_decisions import entropy

PROMPTS = [[1, 5, 9, 33, 20, 7], [1, 44, 12], [1, 60, 8, 8, 21, 50, 17, 3, 29, 11]]
SETTINGS: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False}


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("gemma2")


@pytest.fixture(scope="module")
def entropies(model: Any) -> list[torch.Tensor]:
    return answer_entropies(model, word_tokenizer(), PROMPTS, k=5, max_new_tokens=9, batch_size=2, progress=False)


def test_entropies_are_those_of_the_logits(model: Any, entropies: list[torch.Tensor]) -> None:
    for prompt, measured in zip(PROMPTS, entropies, strict=True):
        out = model.generate(torch.tensor([prompt]), output_logits=True, return_dict_in_generate=True, **SETTINGS)
        wanted = [entropy(row[0], 5) for row in out.logits]
        assert measured.tolist() == pytest.approx(wanted[: len(measured)], abs=1e-4)


@pytest.mark.parametrize("share", [0.3, 0.62, 1.0])
def test_a_gate_lets_its_share_through(model: Any, entropies: list[torch.Tensor], share: float) -> None:
    """A vector that changes nothing leaves the answers as they were measured."""
    gate = gate_of_share(entropies, share, 5)
    with dspa.SteeringVector(torch.zeros(D_IN), L_OUT, positions="response", gate=gate).attach(model) as vector:
        touched = 0
        for prompt in PROMPTS:
            model.generate(torch.tensor([prompt]), **SETTINGS)
            touched += int(vector.decisions.touched.sum())
    assert touched == round(share * sum(map(len, entropies)))


def test_by_hand() -> None:
    measured = [torch.tensor([0.1, 0.9, 0.5]), torch.tensor([0.75, 0.2, 0.3, 0.6])]
    # The last of an answer decides of no token, and the first token of each is let through.
    for n_open, threshold in ((2, (0.9 + math.log(10)) / 2), (3, 0.825), (4, 0.525), (5, 0.25), (6, 0.15), (7, 0.05)):
        assert gate_of_share(measured, n_open / 7).threshold == pytest.approx(threshold)
    assert gate_of_share([torch.tensor([0.4])], 1.0).threshold <= math.log(10)
    assert gate_of_share([torch.tensor([math.log(10) + 1e-6, 0.1])], 0.5).threshold <= math.log(10)
    for share, message in ((0.1, r"0\.286 to 1: the first token"), (1.5, "0 to 1"), (math.nan, "0 to 1")):
        with pytest.raises(ValueError, match=message):
            gate_of_share(measured, share)
    with pytest.raises(ValueError, match="empty"):
        gate_of_share([], 0.5)
