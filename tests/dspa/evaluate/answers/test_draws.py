"""Draws of answers: their distribution, and that nothing else in the batch changes them."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from dspa.evaluate.answers.draws import decoding, sampling_settings

VOCAB = 7
LOGITS = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(0)) * 2
PLAIN = {"top_k": 0, "top_p": 1.0, "min_p": None}
IDS = torch.zeros(4, 1, dtype=torch.int64)


def drawn(
    names: list[str], logits: torch.Tensor, settings: dict[str, object], temperature: float = 1.0
) -> torch.Tensor:
    """The tokens [rows, steps] that are drawn from the same logits 300 times."""
    (draws,) = decoding(temperature, settings, names, 300)["logits_processor"]
    return torch.stack([draws(IDS[: len(logits)], logits).argmax(1) for _ in range(300)], dim=1)


def test_a_row_draws_by_its_own_numbers():
    """The first token by which the probabilities exceed the next number of the row's generator."""
    names = ["0/81/0", "0/82/0", "1/81/0", "1/82/1"]
    tokens = drawn(names, LOGITS, PLAIN, temperature=0.7)
    probabilities = np.exp(LOGITS.double().numpy() / 0.7)
    probabilities /= probabilities.sum(1, keepdims=True)
    for row, name in enumerate(names):
        generator = Random(name)
        expected = [int((probabilities[row].cumsum() <= generator.random()).sum()) for _ in range(300)]
        assert tokens[row].tolist() == expected
    # Alone, and in another batch, it draws the same.
    assert drawn(names[2:3], LOGITS[2:3], PLAIN, temperature=0.7).equal(tokens[2:3])
    assert drawn(names[::-1], LOGITS.flip(0), PLAIN, temperature=0.7).equal(tokens.flip(0))


def test_the_shares_are_the_probabilities():
    tokens = torch.cat([drawn([f"{seed}/{n}/0" for n in range(4)], LOGITS, PLAIN) for seed in range(20)], dim=1)
    for row in range(4):
        shares = tokens[row].bincount(minlength=VOCAB) / tokens.shape[1]
        # 6000 draws: four standard errors.
        assert (shares - LOGITS[row].softmax(0)).abs().max() < 4 * 0.5 / 6000**0.5


@pytest.mark.parametrize(("setting", "value"), [("top_k", 2), ("top_p", 0.5), ("min_p", 0.3)])
def test_what_is_kept_of_the_distribution(setting, value):
    tokens = drawn(["a", "b", "c", "d"], LOGITS, PLAIN | {setting: value})
    for row in range(4):
        p, order = LOGITS[row].softmax(0), LOGITS[row].argsort(descending=True)
        before = p[order].cumsum(0) - p[order]
        allowed = {"top_k": order[:2], "top_p": order[before < 0.5], "min_p": order[p[order] >= 0.3 * p.max()]}[setting]
        assert set(tokens[row].tolist()) == set(allowed.tolist()) and len(allowed) < VOCAB


def test_settings_are_those_of_generate():
    """transformers takes 50 where a config has no `top_k`."""
    assert sampling_settings(GenerationConfig(), None) == {"top_k": 50, "top_p": 1.0, "min_p": None}
    own = GenerationConfig(top_k=20, top_p=0.8, min_p=0.1)
    assert sampling_settings(own, None) == {"top_k": 20, "top_p": 0.8, "min_p": 0.1}
    assert sampling_settings(own, 0.5)["top_p"] == 0.5


def test_small_temperatures_are_greedy():
    assert "logits_processor" not in decoding(9e-5, PLAIN, ["a"], 3)
    assert "logits_processor" in decoding(1e-4, PLAIN, ["a"], 3)
