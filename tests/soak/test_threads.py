"""Threads that share a model and what steers it each get the answers that they get alone."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from dspa.config import SteeringConfig
from dspa.evaluate.responses import responses_of
from dspa.steering.dspa import Steering
from dspa.testing import ENGLISH, L_IN, L_OUT, make_map, make_model, make_sae

from ..dspa.support.adapters import TRIPLES, acting_adapter, ending_tokenizer
from .conftest import SEED, TIMES

N_THREADS = 8
N_CALLS = 40 * max(1, TIMES)
STRONG = SteeringConfig(alpha=2.0, mode="both")


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("gemma2")


def dspa(model: Any) -> Any:
    sae_in, sae_out = make_sae(L_IN, 96, seed=1), make_sae(L_OUT, 128, seed=2)
    return Steering(sae_in, sae_out, make_map(sae_in, sae_out), STRONG)


def fsrl(model: Any) -> Any:
    adapter = acting_adapter(model, responses_of(model, ending_tokenizer(), TRIPLES))
    # Far enough that other tokens are the likeliest.
    adapter.W_a.mul_(20)
    return adapter


def prompts(n: int) -> list[list[int]]:
    draw = random.Random(SEED)
    return [[1, *(draw.randrange(3, 3 + len(ENGLISH)) for _ in range(draw.randrange(2, 12)))] for _ in range(n)]


def answer(model: Any, prompt: list[int]) -> list[int]:
    output = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, pad_token_id=0)
    return list(output[0, len(prompt) :].tolist())


@pytest.mark.parametrize("make", [dspa, fsrl], ids=lambda make: make.__name__)
def test_calls_at_the_same_time_are_those_alone(model, make, done):
    asked, together = prompts(N_CALLS), threading.Barrier(N_THREADS)
    with make(model).attach(model):
        alone = [answer(model, prompt) for prompt in asked]
        with ThreadPoolExecutor(N_THREADS) as threads:
            list(threads.map(lambda _: together.wait(), range(N_THREADS)))
            answers = list(threads.map(lambda prompt: answer(model, prompt), asked))
    assert answers == alone
    plain = [answer(model, prompt) for prompt in asked]
    assert sum(one != other for one, other in zip(alone, plain, strict=True)) > N_CALLS / 2, "it steers"
    done[f"calls in {N_THREADS} threads: {make.__name__}"] += N_CALLS
