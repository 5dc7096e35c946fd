"""Calls that cannot be steered with certainty are refused, with a message that says what to do."""

from __future__ import annotations

import contextlib
import copy
import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, DynamicCache

import dspa
from dspa.models.layers import decoder_layers
from dspa.testing import D_IN, L_OUT, cache_names, make_model, make_sae
from dspa_kernels import BackendError, available_backends

from ...rounding import assert_same_logits, rounding
from ..support.plain import Plain

PROMPT = torch.tensor([[1, 5, 9, 33, 20, 7]])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("alpha", -0.1),
        ("alpha", float("nan")),
        ("alpha", float("inf")),
        ("k_prompt", 0),
        ("k_diff", 2.5),
        ("mode", "boost"),
        ("positions", "prompt"),
        ("scoring", "best"),
        ("ridge", 0.0),
        ("delta", 1.0),
    ],
)
def test_config(name, value):
    with pytest.raises(ValueError, match=f"`{name}` is .*; accepted: "):
        dspa.SteeringConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "end"), [("k_prompt", "input SAE's width, 96"), ("k_diff", "output SAE's width, 128")]
)
def test_k_larger_than_the_width(sae_in, sae_out, cdmap, name, end):
    with pytest.raises(ValueError, match=f"`{name}` is 500; accepted: 1 to the {end}"):
        dspa.Steering(sae_in, sae_out, cdmap, dspa.SteeringConfig(**{name: 500}))


def test_map_of_other_saes(sae_in, sae_out, cdmap):
    other = make_sae(L_OUT, 128, seed=77)
    with pytest.raises(dspa.MapError, match=f"{other.fingerprint}.*{cdmap.meta.sae_out}"):
        dspa.Steering(sae_in, other, cdmap)


def test_calls_outside_of_generate(gemma, steering):
    with steering.attach(gemma):
        with pytest.raises(dspa.ModelError, match="responses\\(starts\\)"):
            gemma(PROMPT)
        with pytest.raises(dspa.ModelError, match="without a plan"):
            gemma.model(PROMPT)
    gemma(PROMPT)


@pytest.mark.parametrize("disabled", [False, True])
def test_continuous_batching(gemma, steering, disabled):
    """Its requests run in a thread of their own, which sees neither a plan nor `disabled()`."""
    calls = (
        lambda: gemma.generate_batch(PROMPT.tolist(), max_new_tokens=2),
        lambda: gemma.generate(PROMPT, max_new_tokens=2, cache_implementation="paged"),
        lambda: gemma.init_continuous_batching(),
    )
    with steering.attach(gemma), steering.disabled() if disabled else contextlib.nullcontext():
        for call in calls:
            with pytest.raises(dspa.ModelError, match=r"Continuous batching .* Steering .*Call generate\(\)"):
                call()
    assert "init_continuous_batching" not in vars(gemma)


def test_hidden_states_that_are_not_finite(sae_in, sae_out, cdmap):
    for layer, message in ((0, "prompt at layer 1 are NaN"), (L_OUT, "at layer 2 are NaN or infinite")):
        model = make_model("gemma2")
        model.model.layers[layer].mlp.down_proj.weight.data[0] = float("nan")
        with dspa.Steering(sae_in, sae_out, cdmap).attach(model), pytest.raises(dspa.ModelError, match=message):
            model.generate(PROMPT, max_new_tokens=2)


@pytest.mark.parametrize("earlier_calls", [0, 1])
def test_hooks_that_never_ran(steering, earlier_calls):
    """A graph without the hooks, as one compiled before attach(), is an error and gives no unsteered text."""
    model = make_model("llama")
    stack = decoder_layers(model)
    with steering.attach(model):
        for _ in range(earlier_calls):
            model.generate(PROMPT, max_new_tokens=2)
        stack[L_OUT]._forward_hooks.clear()
        with pytest.raises(dspa.ModelError, match="did not run"):
            model.generate(PROMPT, max_new_tokens=2)
        with pytest.raises(dspa.ModelError, match="did not run"), steering.responses([4]):
            pass


def test_map_of_another_model(sae_in, sae_out, cdmap):
    model = make_model("gemma2")
    model.config.name_or_path = "google/gemma-2-9b"
    other = copy.copy(cdmap)
    other.meta = dataclasses.replace(cdmap.meta, model_name="google/gemma-2-2b")
    steering = dspa.Steering(sae_in, sae_out, other)
    with pytest.raises(dspa.ModelError, match="map was made with 'google/gemma-2-2b' and the model is"):
        steering.attach(model)


def test_training_mode(sae_in, sae_out, cdmap):
    model = make_model("gemma2").train()
    steering = dspa.Steering(sae_in, sae_out, cdmap)
    with steering.attach(model), pytest.raises(dspa.ModelError, match=r"call model.eval\(\)"):
        model.generate(PROMPT, max_new_tokens=1)


def test_a_failure_does_not_outlive_its_call(gemma, steering):
    with steering.attach(gemma):
        weight = gemma.model.layers[L_OUT].mlp.down_proj.weight
        kept = weight.data[0].clone()
        weight.data[0] = float("nan")
        with pytest.raises(RuntimeError):
            gemma.generate(PROMPT, max_new_tokens=2, do_sample=True)
        weight.data[0] = kept
        gemma.generate(PROMPT, max_new_tokens=2)


def test_made_and_attached_in_inference_mode(gemma, sae_in, sae_out, cdmap):
    with torch.inference_mode():
        steering = dspa.Steering(sae_in, sae_out, cdmap).attach(gemma)
    with steering:
        gemma.generate(PROMPT, max_new_tokens=1)


def test_architecture_that_keeps_keywords_from_its_layers(sae_in, sae_out, cdmap):
    config = BloomConfig(vocab_size=61, hidden_size=D_IN, n_layer=4, n_head=4)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(dspa.ModelError, match="BloomForCausalLM is a model whose layers get no"):
        dspa.Steering(sae_in, sae_out, cdmap).attach(model)


def test_config_that_is_text():
    with pytest.raises(ValueError, match=r"`alpha` is '0\.2'; accepted: a finite number >= 0"):
        dspa.SteeringConfig(alpha="0.2")


def test_inference_mode(gemma, steering):
    wanted = gemma.generate(PROMPT, max_new_tokens=3, do_sample=False)
    with torch.inference_mode():
        with steering.attach(gemma), steering.responses([3]):
            gemma(PROMPT)
        assert torch.equal(gemma.generate(PROMPT, max_new_tokens=3, do_sample=False), wanted)


def test_no_gradient_through_an_edit(gemma, steering):
    """A wrong gradient is never given: backward raises."""
    with steering.attach(gemma), steering.responses([3]):
        loss = gemma(PROMPT).logits.sum()
    with pytest.raises(RuntimeError, match=r"through dspa\.steer"):
        loss.backward()


def test_steering_cannot_change_dtype(steering):
    with pytest.raises(TypeError, match=r"FrozenSAE.to\(dtype=...\)"):
        steering.half()


def test_model_that_moved(gemma, steering, monkeypatch):
    with steering.attach(gemma):
        gemma.generate(PROMPT, max_new_tokens=1)
        monkeypatch.setattr(type(steering.sae_in), "device", property(lambda _: torch.device("cuda:1")))
        with pytest.raises(dspa.ModelError, match="Layer 1 computes on cpu and `sae_in` is on cuda:1"):
            gemma.generate(PROMPT, max_new_tokens=1)


class TestResponses:
    """Plain forward passes over given responses."""

    SEQUENCE = torch.tensor([[1, 5, 9, 33, 20, 7, 44, 12, 31]])

    def test_logits(self, model, sae_in, sae_out, cdmap, steering):
        loop = Plain(model, decoder_layers(model), sae_in, sae_out, cdmap, steering.config)
        with loop.steered(self.SEQUENCE[0, :5].tolist()), torch.no_grad():
            wanted = model(self.SEQUENCE).logits
        with steering.attach(model), steering.responses([5]), torch.no_grad():
            got = model(self.SEQUENCE).logits
        assert_same_logits(got, wanted)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding(self, model, steering, side):
        """A padded row has the logits that it has alone."""
        pad = torch.zeros(1, 3, dtype=torch.long)
        parts = (pad, self.SEQUENCE) if side == "left" else (self.SEQUENCE, pad)
        tokens = torch.cat(parts, dim=1)
        mask = torch.cat([torch.ones_like(p) if p is self.SEQUENCE else p for p in parts], dim=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        start = 5 + (3 if side == "left" else 0)
        with steering.attach(model), torch.no_grad():
            with steering.responses([5]):
                alone = model(self.SEQUENCE).logits
            with steering.responses([start]):
                padded = model(tokens, attention_mask=mask, position_ids=positions).logits
        assert_same_logits(padded[mask.bool()][None], alone)

    @pytest.mark.parametrize("starts", [[0], [10], [5, 5], [[5]]])
    def test_starts(self, gemma, steering, starts):
        accepted = "accepted: 1 columns, one per row, from 1 to 9"
        with steering.attach(gemma), pytest.raises(dspa.ModelError, match=accepted), steering.responses(starts):
            gemma(self.SEQUENCE)

    @pytest.mark.parametrize("name", cache_names())
    def test_cache(self, gemma, steering, name):
        cache = {name: DynamicCache(config=gemma.config)}
        gemma(self.SEQUENCE, **cache)
        with steering.attach(gemma), steering.responses([5]):
            with pytest.raises(dspa.ModelError, match="no cache"):
                gemma(self.SEQUENCE, **cache)
            gemma(self.SEQUENCE)

    def test_no_pass_at_all(self, gemma, steering):
        with (
            steering.attach(gemma),
            pytest.raises(dspa.ModelError, match="did not run"),
            steering.responses([5]),
        ):
            pass


def test_trace(gemma, sae_in, sae_out, cdmap, tmp_path):
    """The record holds each edited token, and its latents before and after."""
    config = dspa.SteeringConfig(alpha=0.5)
    with dspa.Steering(sae_in, sae_out, cdmap, config, record=True).attach(gemma) as steering:
        gemma.generate(PROMPT, max_new_tokens=4, do_sample=False)
    edits = list(steering.trace)
    assert edits and {edit.row for edit in edits} == {0} and {edit.call for edit in edits} == {0}
    assert {edit.position for edit in edits} <= set(range(5, 9))
    planned = set(steering.plan.latents(cdmap.columns)[0].tolist())
    for edit in edits:
        assert set(edit.latents) <= planned
        for before, after in zip(edit.before, edit.after, strict=True):
            apart = rounding(2, before + 0.5 * edit.maximum)
            assert after == pytest.approx(max(before - 0.5 * edit.maximum, 0), rel=0, abs=apart)
    steering.trace.save(tmp_path / "trace.jsonl")
    assert len((tmp_path / "trace.jsonl").read_text().splitlines()) == len(edits)


def test_wrong_kinds_of_arguments(sae_in, sae_out, cdmap):
    with pytest.raises(TypeError, match=r"`cdmap` is a str; accepted: a dspa\.ConditionalDifferenceMap"):
        dspa.Steering(sae_in, sae_out, "map.safetensors")
    with pytest.raises(TypeError, match=r"`config` is a dict; accepted: a dspa\.SteeringConfig"):
        dspa.Steering(sae_in, sae_out, cdmap, {"alpha": 0.2})
    with pytest.raises(ValueError, match="`backend` is 'tritn'; accepted: auto, cuda, triton, reference"):
        dspa.Steering(sae_in, sae_out, cdmap, backend="tritn")
    for name, status in available_backends().items():
        if not status.available:
            with pytest.raises(BackendError, match=f"backend='{name}' cannot run here: {status.reason}"):
                dspa.Steering(sae_in, sae_out, cdmap, backend=name)
    with pytest.raises(ValueError, match="`screen` is 'int4'; accepted: none, int5"):
        dspa.Steering(sae_in, sae_out, cdmap, screen="int4")


def test_responses_before_attach(steering):
    with pytest.raises(dspa.ModelError, match=r"not attached: call attach\(model\)"), steering.responses([3]):
        pass


def test_swapped_saes(sae_in, sae_out, cdmap):
    with pytest.raises(dspa.MapError, match="Are the two SAEs swapped"):
        dspa.Steering(sae_out, sae_in, cdmap)


def test_guidance(gemma, steering):
    """The second pass of guidance is over another text, which has no plan."""
    with steering.attach(gemma), pytest.raises(dspa.ModelError, match="guidance_scale"):
        gemma.generate(PROMPT, guidance_scale=2.0, max_new_tokens=2)
