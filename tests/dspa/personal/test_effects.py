"""Effects of latents: each answer is what a plain loop gives with that latent ablated, and a stopped run goes on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedModel

from dspa.errors import PersonaError
from dspa.evaluate.style import StyleAxis, style_axes
from dspa.personal.effects import Effects, measure_effects
from dspa.saes.frozen import FrozenSAE
from dspa.testing import D_SAE_OUT, L_OUT, make_model, make_sae, make_tokenizer

from ..steering.test_generate import N_NEW
from ..steering.test_latents import in_a_plain_loop

PROMPTS = ["w5 w9 w33 w20 w7", "w44 w12", "w60 w8 w8 w21 w50 w17 w3"]
LATENTS = [*range(12), 7]
TOKENIZER = make_tokenizer("left")
RULES = {
    "format": "dspa.style.1",
    "counters": {
        "even": {"about": "Even words.", "pattern": r"w\d*[02468]\b"},
        "all": {"about": "Words.", "pattern": r"w\d+"},
    },
    "axes": {
        "evenness": {"about": "Even.", "weights": {"even": 0.2}},
        "length": {"about": "Long.", "weights": {"all": 0.1, "even": -0.1}, "offset": -0.2},
    },
}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_model("qwen3")


def encode(prompt: Any) -> list[int]:
    return list(TOKENIZER(prompt)["input_ids"])


def measure(
    model: PreTrainedModel, sae: FrozenSAE, path: Path, latents: Sequence[int] = LATENTS, **how: Any
) -> Effects:
    settings = {"max_new_tokens": N_NEW, "batch_size": 4, "progress": False, **how}
    prompts = settings.pop("prompts", PROMPTS)
    return measure_effects(model, TOKENIZER, sae, prompts, encode, latents, path, **settings)


@pytest.fixture(scope="module")
def axes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, StyleAxis]:
    path = tmp_path_factory.mktemp("rules") / "rules.json"
    path.write_text(json.dumps(RULES))
    return style_axes(path)


@pytest.mark.parametrize("alpha", [1.0, 0.4])
def test_answers_are_those_of_a_plain_loop(model: Any, sae_out: Any, axes: Any, tmp_path: Path, alpha: float) -> None:
    def ablated(f: float, _strength: float, largest: float) -> float:
        return max(f - alpha * largest, 0.0)

    effects = measure(model, sae_out, tmp_path / "effects.jsonl", alpha=alpha)
    assert Effects.read(tmp_path / "effects.jsonl") == effects
    own = effects.measurement.answers
    n_active = n_changed = 0
    for latent in set(LATENTS):
        wanted = [
            TOKENIZER.decode(ids, skip_special_tokens=True)
            for ids in (in_a_plain_loop(model, sae_out, encode(prompt), {latent: 0.0}, ablated) for prompt in PROMPTS)
        ]
        answers = effects.ablated[latent]
        assert [answers.get(n, own[n]) for n in range(len(PROMPTS))] == wanted
        n_active += len(answers)
        n_changed += sum(answer != own[n] for n, answer in answers.items())
        changes = [[axis("", a) - axis("", b) for axis in axes.values()] for a, b in zip(wanted, own, strict=True)]
        assert np.allclose(effects.changes(axes)[latent], changes)
    # Some are run, and not all; some of them change the text.
    assert 0 < n_changed <= n_active < len(set(LATENTS)) * len(PROMPTS)


def test_a_stopped_measurement_goes_on(model: Any, sae_out: Any, tmp_path: Path, monkeypatch: Any) -> None:
    whole, path = tmp_path / "whole.jsonl", tmp_path / "effects.jsonl"
    wanted = measure(model, sae_out, whole)
    measure(model, sae_out, path, LATENTS[:5])
    part = path.read_text()
    # As a kill leaves it.
    path.write_text(part + '{"latent": 5, "answ')
    assert measure(model, sae_out, path).ablated == wanted.ablated
    assert path.read_text().startswith(part)
    assert Effects.read(path).ablated == wanted.ablated
    monkeypatch.setattr("dspa.personal.effects.continue_prompts", None)
    assert measure(model, sae_out, path).ablated == wanted.ablated


def test_a_latent_is_kept_when_it_is_done(model: Any, sae_out: Any, tmp_path: Path, monkeypatch: Any) -> None:
    from dspa.personal import effects as module

    path, wanted = tmp_path / "effects.jsonl", measure(model, sae_out, tmp_path / "whole.jsonl")
    calls, original = [], module.continue_prompts

    def stopping(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(module, "continue_prompts", stopping)
    with pytest.raises(KeyboardInterrupt):
        measure(model, sae_out, path)
    kept = Effects.read(path).ablated
    assert 0 < len(kept) < len(wanted.ablated)
    assert all(wanted.ablated[latent] == answers for latent, answers in kept.items())


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ({"alpha": 0.5}, "`alpha`"),
        ({"max_new_tokens": 3}, "`max_new_tokens`"),
        ({"prompts": PROMPTS[:2]}, "`prompts`, `asked`"),
        ({"model_name": "other"}, "`model_name`"),
    ],
)
def test_effects_of_other_settings_are_not_continued(
    model: Any, sae_out: Any, tmp_path: Path, how: Any, named: str
) -> None:
    path = tmp_path / "effects.jsonl"
    measure(model, sae_out, path, LATENTS[:1])
    before = path.read_bytes()
    with pytest.raises(PersonaError, match=f"which holds effects with other {named}; accepted: a new file"):
        measure(model, sae_out, path, **how)
    with pytest.raises(PersonaError, match="with other `sae`"):
        measure(model, make_sae(L_OUT, D_SAE_OUT, seed=8), path)
    with pytest.raises(PersonaError, match="with other `model_digest`"):
        measure(make_model("qwen3", seed=3), sae_out, path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: [], "line 1"),
        (lambda lines: ["{}", *lines[1:]], "line 1"),
        (lambda lines: [lines[0], "{", *lines[1:]], "line 2"),
        (lambda lines: [lines[0], '{"latent": 128, "answers": {}}'], "of latent 128"),
        (lambda lines: [lines[0], '{"latent": 1, "answers": {"9": "a"}}'], "and prompts 9"),
        (lambda lines: [lines[0].replace("dspa.effects.1", "dspa.effects.0")], "dspa.effects.1"),
    ],
)
def test_damaged_files(model: Any, sae_out: Any, tmp_path: Path, damage: Any, message: str) -> None:
    path = tmp_path / "effects.jsonl"
    measure(model, sae_out, path, LATENTS[:2])
    path.write_text("".join(f"{line}\n" for line in damage(path.read_text().splitlines())))
    with pytest.raises(PersonaError, match=r"effects\.jsonl") as error:
        Effects.read(path)
    assert message in str(error.value)


def test_no_prompts(model: Any, sae_out: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`prompts` is empty"):
        measure(model, sae_out, tmp_path / "effects.jsonl", prompts=[])
    assert not list(tmp_path.iterdir())
