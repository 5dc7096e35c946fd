"""Ablation of fixed sets, another one per row: the tokens that a row gets alone from a hook written out here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import dspa
from dspa.errors import ModelError
from dspa.models.layers import decoder_layers
from dspa.models.sources import model_digest
from dspa.steering.ablation import Ablation
from dspa.testing import D_SAE_OUT, L_OUT, make_model, make_sae

from ...rounding import assert_same_logits
from .test_generate import CONFIG, N_NEW, PROMPTS, compiled_decoding, new_tokens, padded

SETS = {"many": tuple(range(D_SAE_OUT)), "few": (1, 5, 9, 33), "none": ()}
ROWS = ["many", None, "few"]


@contextlib.contextmanager
def ablated(model: Any, sae: Any, latents: Sequence[int], alpha: float, start: int) -> Iterator[None]:
    """Ablate latents in passes over a whole sequence, from a column on."""

    def edit(_module: Any, _args: Any, output: Any) -> Any:
        h = (output[0] if isinstance(output, tuple) else output).clone()
        for t in range(start, h.shape[1]):
            pre = h[0, t] @ sae.W_enc + sae.weights.b_enc
            f = torch.where((pre > sae.weights.threshold) & (pre > 0), pre, 0)
            for latent in latents:
                if f[latent] > 0:
                    h[0, t] += (max(0.0, float(f[latent] - alpha * f.max())) - f[latent]) * sae.weights.W_dec[latent]
        return (h, *output[1:]) if isinstance(output, tuple) else h

    handle = decoder_layers(model)[L_OUT].register_forward_hook(edit)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def in_a_plain_loop(model: Any, sae: Any, prompt: list[int], latents: Sequence[int], alpha: float) -> list[int]:
    tokens = list(prompt)
    with ablated(model, sae, latents, alpha, len(prompt) - 1):
        for _ in range(N_NEW):
            tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.fixture(scope="module", params=[1.0, 0.3])
def alpha(request: pytest.FixtureRequest) -> float:
    return request.param


@pytest.fixture(scope="module")
def expected(model: Any, sae_out: Any, alpha: float) -> list[list[int]]:
    sets = [() if name is None else SETS[name] for name in ROWS]
    tokens = [in_a_plain_loop(model, sae_out, *pair, alpha) for pair in zip(PROMPTS, sets, strict=True)]
    base = new_tokens(model.generate(**padded(PROMPTS), max_new_tokens=N_NEW, do_sample=False))
    assert tokens[1] == base[1] and tokens[0] != base[0]
    return tokens


@pytest.mark.parametrize("how", [{}, {"use_cache": False}, {"prefill_chunk_size": 4}], ids=["cache", "none", "chunks"])
def test_a_set_per_row(model: Any, sae_out: Any, alpha: float, expected: list[list[int]], how: Any) -> None:
    with Ablation(sae_out, SETS, alpha).attach(model) as ablation, ablation.rows(ROWS):
        output = model.generate(**padded(PROMPTS), max_new_tokens=N_NEW, do_sample=False, **how)
    assert new_tokens(output) == expected


def test_a_compiled_model(model: Any, sae_out: Any, alpha: float, expected: list[list[int]]) -> None:
    torch.compiler.reset()
    with Ablation(sae_out, SETS, alpha).attach(model) as ablation:
        for rows, wanted in ((ROWS, expected), ([None, *ROWS[1:]], [None, *expected[1:]])):
            with ablation.rows(rows):
                made = new_tokens(model.generate(**padded(PROMPTS), generation_config=compiled_decoding()))
            assert made[1:] == wanted[1:] and (wanted[0] is None) == (made[0] != expected[0])
    torch.compiler.reset()


def test_a_single_set_is_that_of_all_rows(model: Any, sae_out: Any, alpha: float) -> None:
    wanted = [in_a_plain_loop(model, sae_out, prompt, SETS["many"], alpha) for prompt in PROMPTS]
    with Ablation(sae_out, {"many": SETS["many"]}, alpha).attach(model):
        assert new_tokens(model.generate(**padded(PROMPTS), max_new_tokens=N_NEW, do_sample=False)) == wanted


def test_given_responses(model: Any, sae_out: Any, alpha: float) -> None:
    sequence, start = torch.tensor([PROMPTS[0] + [4, 40, 9]]), len(PROMPTS[0])
    with torch.no_grad():
        base = model(sequence).logits
        with ablated(model, sae_out, SETS["many"], alpha, start - 1):
            wanted = model(sequence, use_cache=False).logits
        with Ablation(sae_out, {"many": SETS["many"]}, alpha).attach(model) as ablation:
            with ablation.responses([start]):
                made = model(sequence, use_cache=False).logits
            with ablation.disabled():
                assert torch.equal(model(sequence).logits, base)
    assert_same_logits(made, wanted)
    assert not torch.equal(made[:, start - 1 :], base[:, start - 1 :])


def test_a_map_leaves_latents_to_the_ablation(model: Any, sae_in: Any, sae_out: Any, cdmap: Any) -> None:
    """Without the ablation the map edits latents of the set, and with it none, in the rows that have the set."""
    inputs = padded(PROMPTS[:1] * 2)
    steering = dspa.Steering(sae_in, sae_out, cdmap, CONFIG, record=True)
    with steering.attach(model):
        model.generate(**inputs, max_new_tokens=N_NEW, do_sample=False)
        alone = edited(steering)
        taken = sorted(alone[0])[::2]
        assert alone[0] == alone[1] and taken
        ablation = Ablation(sae_out, {"taken": taken})
        steering.trace.clear()
        with ablation.attach(model), ablation.rows(["taken", None]):
            model.generate(**inputs, max_new_tokens=N_NEW, do_sample=False)
            both = edited(steering)
            assert not both[0] & set(taken) and both[0] and both[1] & set(taken)
        steering.trace.clear()
        with ablation.attach(model), ablation.disabled():
            model.generate(**inputs, max_new_tokens=N_NEW, do_sample=False)
        assert edited(steering) == alone


def edited(steering: dspa.Steering) -> list[set[int]]:
    return [{latent for edit in steering.trace if edit.row == row for latent in edit.latents} for row in (0, 1)]


def test_the_largest_latent_is_of_what_is_left(model: Any, sae_in: Any, sae_out: Any, cdmap: Any) -> None:
    """The ablation is attached last, and edits first: the map gets the residual without the set."""
    prompt = torch.tensor([PROMPTS[0]])
    h = residual(model, prompt)
    f = sae_out.weights.latents(h)
    largest = int(f.argmax())
    left = sae_out.weights.latents(h - f[largest] * sae_out.weights.W_dec[largest])
    steering = dspa.Steering(sae_in, sae_out, cdmap, CONFIG, record=True)
    with steering.attach(model), Ablation(sae_out, {"largest": [largest]}).attach(model):
        model.generate(prompt, max_new_tokens=1, do_sample=False)
    made = next(iter(steering.trace)).maximum
    assert made == pytest.approx(float(left.max()), rel=1e-5) and abs(made - float(f.max())) > 0.01


@torch.no_grad()
def residual(model: Any, prompt: Tensor) -> Tensor:
    hidden: Tensor = model(prompt, output_hidden_states=True).hidden_states[L_OUT + 1][0, -1]
    return hidden


def test_rows_are_those_of_the_batch(model: Any, sae_out: Any) -> None:
    with Ablation(sae_out, SETS).attach(model) as ablation:
        with pytest.raises(ModelError, match="Which of 3 sets each row has is not known"):
            model.generate(**padded(PROMPTS), max_new_tokens=1)
        with ablation.rows(ROWS[:2]), pytest.raises(ModelError, match=r"`rows\(\)` is of 2 names; accepted: 3"):
            model.generate(**padded(PROMPTS), max_new_tokens=1)
        with pytest.raises(ValueError, match="`names` is with 'other'; accepted: names of sets: many, few, none"):
            ablation.rows(["other"]).__enter__()


@pytest.mark.parametrize(
    ("sets", "alpha", "message"),
    [
        ({}, 1.0, "`sets` is empty"),
        ({"a": [1, 1]}, 1.0, "The set 'a' is 1, 1; accepted: different latents of the SAE, 0 to 127"),
        ({"a": [D_SAE_OUT]}, 1.0, "The set 'a' is 128"),
        ({"a": [-1]}, 1.0, "The set 'a' is -1"),
        ({"a": [1]}, -1.0, "`alpha` is -1.0"),
        ({"a": [1]}, float("nan"), "`alpha` is nan"),
    ],
)
def test_bad_sets(sae_out: Any, sets: Any, alpha: float, message: str) -> None:
    with pytest.raises(ValueError, match="accepted") as error:
        Ablation(sae_out, sets, alpha)
    assert message in str(error.value)


def test_other_models_are_refused(sae_out: Any) -> None:
    digest = model_digest(make_model("qwen3", seed=7)) or ""
    with pytest.raises(ModelError, match="The Ablation was made with other weights"):
        Ablation(sae_out, {"a": [1]}, model_digest=digest).attach(make_model("qwen3"))
    with pytest.raises(ModelError, match="accepted: 0 to 3"):
        Ablation(make_sae(4, 16), {"a": [1]}).attach(make_model("qwen3"))
