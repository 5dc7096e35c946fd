"""A method of several maps at several layers, against single calls of a `JointSteering`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import dspa
from dspa import Method, SteeringConfig, compare
from dspa.baselines.random_set import random_set_map, response_densities
from dspa.baselines.shuffled_map import shuffled_map
from dspa.evaluate.compare.methods import controls_of
from dspa.evaluate.responses import Response
from dspa.testing import D_SAE_OUT, ENGLISH, L_OUT, make_map, make_model, make_sae

from ...support.adapters import TRIPLES, ending_tokenizer

PROMPTS = [" ".join(ENGLISH[n : n + 1 + n * 5 % 9]) for n in range(5)]
SETTINGS: dict[str, Any] = {"max_new_tokens": 5, "batch_size": 1, "temperature": 0.0, "progress": False}
HIGHER = make_sae(L_OUT + 1, D_SAE_OUT, seed=3)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    model = make_model("gemma2")
    model.generation_config.eos_token_id = [9]
    return model


@pytest.fixture(scope="module")
def other(dspa_method: Method) -> Method:
    sae_in = dspa_method.parts[0].sae_in
    config = SteeringConfig(alpha=2.0, mode="both", k_diff=8)
    return Method.dspa(sae_in, HIGHER, make_map(sae_in, HIGHER, seed=1), config, name="other")


def answers_of(model: PreTrainedModel, joint: Method, maps: list[Any] | None = None) -> list[list[int]]:
    """Greedy answers of a single call each, steered by the maps of a method or others in their place."""
    tokenizer, answers = ending_tokenizer(), []
    maps = maps or [part.cdmap for part in joint.parts]
    steerings = [
        dspa.Steering(part.sae_in, part.sae_out, cdmap, part.config)
        for part, cdmap in zip(joint.parts, maps, strict=True)
    ]
    with dspa.JointSteering(steerings).attach(model):
        for prompt in PROMPTS:
            inputs = tokenizer(prompt, return_tensors="pt")
            output = model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=[9])
            ids = output[0, inputs["input_ids"].shape[1] :].tolist()
            answers.append(ids[: ids.index(9) + 1] if 9 in ids else ids)
    return answers


def test_a_joint_method_and_its_controls(model: PreTrainedModel, dspa_method: Method, other: Method) -> None:
    joint = Method.joint([dspa_method, other])
    name = "DSPA both 1 + other"
    static = Method.static(joint)
    got = compare(model, ending_tokenizer(), PROMPTS, [joint, static], held_out=TRIPLES[:4], **SETTINGS)
    assert [method.name for method in got.methods] == [
        "base",
        name,
        *(f"{name}: {control}" for control in ("random set", "shuffled map", "wrong layer")),
        "Static-SAE both 1 + both 2",
    ]
    assert [part["layers"] for part in joint.settings["joint"]] == [[1, L_OUT], [1, L_OUT + 1]]
    base, steered = got.answers["base"][0], got.answers[name][0]
    assert steered.ids == answers_of(model, joint) != base.ids
    for single in (dspa_method, other):
        assert answers_of(model, Method.joint([single])) != steered.ids
    # All maps are changed.
    prompts = [ending_tokenizer()(prompt)["input_ids"] for prompt in PROMPTS]
    responses = [Response(*pair) for pair in zip(prompts, base.ids, strict=True)]
    random = [random_set_map(part.cdmap, response_densities(model, part.sae_out, responses), 0) for part in joint.parts]
    assert got.answers[f"{name}: random set"][0].ids == answers_of(model, joint, random)
    shuffled = [shuffled_map(part.cdmap, 0) for part in joint.parts]
    assert got.answers[f"{name}: shuffled map"][0].ids == answers_of(model, joint, shuffled)
    # A token counts once, however many layers edit it.
    assert steered.edited is not None and any(steered.edited)
    for n, tokens in enumerate(steered.edited):
        assert tokens == sorted(set(tokens)) and all(0 <= token < len(steered.ids[n]) for token in tokens)


def test_edited_tokens_are_those_of_any_part(model: PreTrainedModel, dspa_method: Method, other: Method) -> None:
    joint = Method.joint([dspa_method, other])
    (run,) = compare(model, ending_tokenizer(), PROMPTS, [joint], controls=(), **SETTINGS).answers[joint.name]
    steerings = [part.steering() for part in joint.parts]
    for n, prompt in enumerate(PROMPTS):
        ids = torch.tensor([ending_tokenizer()(prompt)["input_ids"] + run.ids[n]])
        start = ids.shape[1] - len(run.ids[n])
        joined = dspa.JointSteering(steerings).attach(model)
        with joined, joined.recording() as traces, joined.responses([start]), torch.no_grad():
            model(ids)
        positions = {edit.position - start + 1 for trace in traces.values() for edit in trace}
        assert run.edited is not None
        assert run.edited[n] == sorted(token for token in positions if token < len(run.ids[n]))


def test_a_method_of_one_map_is_that_method(dspa_method: Method) -> None:
    joint = Method.joint([dspa_method])
    assert (joint.name, joint.settings, joint.digest) == (
        dspa_method.name,
        dspa_method.settings,
        dspa_method.digest,
    )


def test_wrong_layers_are_of_each_map(model: PreTrainedModel, dspa_method: Method, other: Method) -> None:
    def layers(method: Method) -> Any:
        (control,) = controls_of(method, ["wrong layer"], model, None, lambda _: torch.ones(1), "")
        return control.settings["layer"]

    assert [layers(dspa_method), layers(other)] == [3, 2]
    assert layers(Method.joint([dspa_method, other])) == [3, 2]


def test_methods_that_are_refused(dspa_method: Method) -> None:
    with pytest.raises(ValueError, match="`methods` is empty"):
        Method.joint([])
    with pytest.raises(ValueError, match=r"the method 'base'; accepted: one that Method.dspa made"):
        Method.joint([dspa_method, Method.base()])
    with pytest.raises(ValueError, match=f"`methods` is with 2 of layer {L_OUT}; accepted: one for each output layer"):
        Method.joint([dspa_method, dspa_method])
