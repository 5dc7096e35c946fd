"""Personas: gains worked out by hand, their file, and what they ablate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dspa.errors import ModelError, PersonaError
from dspa.evaluate.style import StyleAxis
from dspa.models.sources import model_digest
from dspa.personal.effects import Effects, Measurement
from dspa.personal.persona import Persona, ablation_of, read_weights
from dspa.saes.frozen import FrozenSAE
from dspa.testing import D_SAE_OUT, L_OUT, make_model, make_sae

# Axes that are read off the answer, "x y" for the values x and y, and have no counters.
VALUES = ("up", "down")


class Spoken(StyleAxis):
    """The n-th number of an answer."""

    def __call__(self, prompt: str, answer: str) -> float:
        return float(answer.split()[int(self.offset)])


AXES: dict[str, StyleAxis] = {name: Spoken("x", (), n) for n, name in enumerate(VALUES)}
# Changes of the two axes by prompt: 3 (0.3, 0), (0.1, 0); 4 (0, 0), (0, -0.4); 5 (-0.2, 0), none; 6 nothing.
ANSWERS = {3: {0: "0.3 0", 1: "0.6 0.5"}, 4: {1: "0.5 0.1"}, 5: {0: "-0.2 0"}, 6: {}}


def effects_of(sae: FrozenSAE, **settings: Any) -> Effects:
    measurement = Measurement(
        **{"sae": sae.fingerprint, "layer": L_OUT, "d_sae": D_SAE_OUT, "alpha": 1.0, "max_new_tokens": 4}
        | {"prompts": [[1], [2]], "asked": ["a", "b"], "base": [[3], [4]], "answers": ["0 0", "0.5 0.5"]}
        | settings
    )
    return Effects(measurement, ANSWERS)


@pytest.fixture
def persona(sae_out: Any) -> Persona:
    return Persona.of(effects_of(sae_out), AXES, {"up": 1.0, "down": -0.5})


def test_gains(persona: Persona) -> None:
    # Per prompt: 3: 0.3, 0.1; 4: 0, 0.2; 5: -0.2, 0; the standard error of two numbers is half their distance.
    wanted = {3: (0.2, 0.1), 4: (0.1, 0.1), 6: (0.0, 0.0), 5: (-0.1, 0.1)}
    assert list(persona.gains) == list(wanted)
    for latent, pair in wanted.items():
        assert persona.gains[latent] == pytest.approx(pair)
    assert persona.latents == [3, 4]
    assert persona.utility(AXES)("", "0.3 0.2") == pytest.approx(0.2)


def test_the_summary(sae_out: Any) -> None:
    # 4 changes down on the second prompt only: means of 0 and -0.4, whose standard error is half their distance.
    rows = {row["latent"]: row for row in effects_of(sae_out).summary(AXES)}
    wanted = {"latent": 4, "answers_changed": 1, "up": 0, "up_error": 0, "down": -0.2, "down_error": 0.2}
    assert rows[4] == pytest.approx(wanted)
    assert {latent: row["answers_changed"] for latent, row in rows.items()} == {3: 2, 4: 1, 5: 1, 6: 0}


@pytest.mark.parametrize(("top", "latents"), [(1, [3]), (2, [3, 4]), (5, [3, 4]), (None, [3, 4])])
def test_the_set(sae_out: Any, top: int | None, latents: list[int]) -> None:
    assert Persona.of(effects_of(sae_out), AXES, {"up": 1.0, "down": -0.5}, top=top).latents == latents


def test_the_other_pole(sae_out: Any) -> None:
    assert Persona.of(effects_of(sae_out), AXES, {"up": -2.0}).gains[5] == pytest.approx((0.2, 0.2))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "is none; accepted: a weight other than 0 of up, down"),
        ({"up": 0.0}, "is none but 0"),
        ({"left": 1.0}, "The axis of a weight is 'left'; accepted: up, down"),
        ({"up": float("inf")}, "a finite number"),
        ({"down": 1.0}, "is not raised by the ablation of any of 4 latents"),
    ],
)
def test_bad_weights(sae_out: Any, weights: dict[str, float], message: str) -> None:
    with pytest.raises(PersonaError) as error:
        Persona.of(effects_of(sae_out), AXES, weights)
    assert message in str(error.value)


def test_the_file(persona: Persona, tmp_path: Path) -> None:
    path = tmp_path / "a.persona"
    persona.save(path)
    loaded = Persona.load(path)
    assert loaded.gains == persona.gains and loaded.latents == persona.latents
    assert loaded.record.weights == {"up": 1.0, "down": -0.5} and loaded.record.n_prompts == 2
    assert repr(loaded) == "Persona(up: 1, down: -0.5; ablates 3, 4)"
    assert loaded.digest == persona.digest != persona.random(0).digest
    with pytest.raises(PersonaError, match="The rules of style is of other axes than the persona's"):
        loaded.utility({name: Spoken("x", (), 1) for name in VALUES})


def test_files_of_something_else(persona: Persona, sae_out: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.persona"
    with pytest.raises(PersonaError, match="There is no file at"):
        Persona.load(path)
    path.write_bytes(b"no persona")
    with pytest.raises(PersonaError, match="is damaged"):
        Persona.load(path)
    persona.save(path)
    tensors, header = load_file(path), {}
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    save_file({**tensors, "latents": tensors["latents"] + 1}, path, metadata=header)
    with pytest.raises(PersonaError, match="its tensors are not those that were written"):
        Persona.load(path)
    save_file(tensors, path, metadata={"dspa": header["dspa"].replace('"top": 5', '"top": 3')})
    with pytest.raises(PersonaError, match="seal"):
        Persona.load(path)


def test_a_random_persona(persona: Persona) -> None:
    first, again, other = (persona.random(seed) for seed in (1, 1, 2))
    assert first.record.weights == again.record.weights != other.record.weights
    assert set(first.record.weights) == set(VALUES) and sorted(first.gains) == sorted(persona.gains)


def test_personas_of_a_batch(sae_out: Any, persona: Persona) -> None:
    other = Persona.of(effects_of(sae_out), AXES, {"up": -1.0})
    ablation = ablation_of({"a": persona, "b": other}, sae_out)
    with ablation.rows(["b", None, "a"]):
        assert ablation.latents(3) == [(5,), (), (3, 4)]
    assert (ablation.layer, ablation.alpha) == (L_OUT, 1.0)


def test_other_saes_and_models_are_refused(sae_out: Any, persona: Persona) -> None:
    with pytest.raises(PersonaError, match="The persona 'a' is of an SAE with fingerprint"):
        ablation_of({"a": persona}, make_sae(L_OUT, D_SAE_OUT, seed=9))
    stronger = Persona.of(effects_of(sae_out, alpha=0.5), AXES, {"up": 1.0})
    with pytest.raises(PersonaError, match=r"The persona 'b' is of `alpha` 0\.5"):
        ablation_of({"a": persona, "b": stronger}, sae_out)
    with pytest.raises(PersonaError, match="`personas` is empty"):
        ablation_of({}, sae_out)
    model = make_model("qwen3")
    named = Persona.of(effects_of(sae_out, model_digest=model_digest(model)), AXES, {"up": 1.0})
    with ablation_of({"a": named}, sae_out).attach(model):
        pass
    with pytest.raises(ModelError, match="made with other weights"):
        ablation_of({"a": named}, sae_out).attach(make_model("qwen3", seed=4))


def test_weights_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.json"
    path.write_text('{"up": 1, "down": -0.5}')
    assert read_weights(path) == {"up": 1.0, "down": -0.5}
    for text in ("[]", '{"up": "1"}', "{", '{"up": true}'):
        path.write_text(text)
        with pytest.raises(PersonaError, match=r"weights\.json"):
            read_weights(path)
