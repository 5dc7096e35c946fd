"""What cannot be steered for certain is refused, with a message that says what to do; nothing is left behind."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DynamicCache,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
    T5Config,
    T5ForConditionalGeneration,
)

import dspa
from dspa.models.layers import decoder_layers, same_model
from dspa.testing import D_IN, L_OUT, cache_names, make_map, make_model, make_sae
from dspa_kernels import BackendError, available_backends

from ..support.plain import Plain

PROMPT = torch.tensor([[1, 5, 9, 33, 20, 7]])


@pytest.fixture(scope="module")
def gemma():
    return make_model("gemma2")


@pytest.fixture
def steering(sae_in, sae_out, cdmap):
    steering = dspa.Steering(sae_in, sae_out, cdmap, dspa.SteeringConfig(alpha=0.6, mode="both"))
    yield steering
    steering.detach()


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


def test_width_of_another_model(gemma, sae_in):
    narrow = make_sae(L_OUT, 64, d_in=D_IN // 2)
    steering = dspa.Steering(sae_in, narrow, make_map(sae_in, narrow))
    with pytest.raises(dspa.ModelError, match="`sae_out` reads 24 dimensions and the model's hidden size is 48"):
        steering.attach(gemma)


def test_layer_out_of_range(gemma, sae_in):
    high = make_sae(9, 64)
    steering = dspa.Steering(sae_in, high, make_map(sae_in, high))
    with pytest.raises(dspa.ModelError, match="`sae_out` sits at layer 9; accepted: 0 to 3"):
        steering.attach(gemma)


def test_input_layer_not_below_output_layer(gemma, sae_out):
    late = make_sae(3, 96, seed=4)
    steering = dspa.Steering(late, sae_out, make_map(late, sae_out))
    with pytest.raises(dspa.ModelError, match="layer 3 and the output SAE at layer 2"):
        steering.attach(gemma)


def test_sae_without_a_layer(gemma, sae_in):
    nowhere = make_sae(None, 64)
    with pytest.raises(dspa.ModelError, match="does not say its layer"):
        dspa.Steering(sae_in, nowhere, make_map(sae_in, nowhere)).attach(gemma)


def test_sae_of_another_model(sae_in):
    model = make_model("gemma2")
    model.config.name_or_path = "google/gemma-2-9b"
    named = make_sae(L_OUT, 64, model_name="gemma-2-2b")
    steering = dspa.Steering(sae_in, named, make_map(sae_in, named))
    with pytest.raises(dspa.ModelError, match="made for 'gemma-2-2b' and the model is 'google/gemma-2-9b'"):
        steering.attach(model)
    with steering.attach(model, model_name="gemma-2-2b"):
        model.generate(PROMPT, max_new_tokens=1)


def test_names_of_the_same_model():
    assert same_model("google/gemma-2-2b-it", "gemma-2-2b")
    assert same_model("Qwen3-8B", "/models/qwen3-8b/")
    assert not same_model("gemma-2-2b", "google/gemma-2-27b")
    assert not same_model("gemma-2-2b", "gemma-2-2b2")


def test_attach_twice(gemma, steering, sae_in, sae_out, cdmap):
    steering.attach(gemma)
    with pytest.raises(dspa.ModelError, match=r"attached to a Gemma2ForCausalLM already: detach\(\) it first"):
        steering.attach(gemma)
    with pytest.raises(dspa.ModelError, match="Layer 2 of this model is steered already"):
        dspa.Steering(sae_in, sae_out, cdmap).attach(gemma)
    steering.detach()
    steering.detach()
    with steering.attach(gemma):
        gemma.generate(PROMPT, max_new_tokens=1)


def test_unknown_architecture(steering):
    class Odd(type(make_model("llama"))):
        pass

    model = make_model("llama")
    model.__class__ = Odd
    model.trunk = model.model
    model.model = nn.Identity()
    with pytest.raises(dspa.ModelError, match=r"layers='path.to.layers'.*'trunk.layers' \(4\)"):
        decoder_layers(model)
    assert len(decoder_layers(model, "trunk.layers")) == 4


@pytest.mark.parametrize("model", [nn.Linear(2, 2), "a model"], ids=["module", "text"])
def test_not_a_language_model(steering, model):
    with pytest.raises(dspa.ModelError, match="accepted: a transformers causal language model"):
        steering.attach(model)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "prompt is empty"),
        ({"input_ids": PROMPT, "attention_mask": torch.zeros_like(PROMPT)}, "Prompt 0 of the batch is empty"),
        ({"input_ids": PROMPT, "attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]])}, "padding_side = 'left'"),
        ({"input_ids": torch.tensor([[0, 0, 5, 9]])}, "no attention_mask"),
        ({"input_ids": torch.ones(1, 200, dtype=torch.long)}, "200 tokens and Gemma2ForCausalLM has 128 positions"),
    ],
    ids=["empty", "all padding", "right padding", "padding without a mask", "too long"],
)
def test_prompts(gemma, steering, inputs, message):
    with steering.attach(gemma), pytest.raises(dspa.ModelError, match=message):
        gemma.generate(**inputs, max_new_tokens=2)


def test_calls_outside_of_generate(gemma, steering):
    with steering.attach(gemma):
        with pytest.raises(dspa.ModelError, match="responses\\(starts\\)"):
            gemma(PROMPT)
        with pytest.raises(dspa.ModelError, match="without a plan"):
            gemma.model(PROMPT)
    gemma(PROMPT)


def test_hidden_states_that_are_not_finite(sae_in, sae_out, cdmap):
    for layer, message in ((0, "prompt at layer 1 are NaN"), (L_OUT, "at layer 2 are NaN or infinite")):
        model = make_model("gemma2")
        model.model.layers[layer].mlp.down_proj.weight.data[0] = float("nan")
        with dspa.Steering(sae_in, sae_out, cdmap).attach(model), pytest.raises(dspa.ModelError, match=message):
            model.generate(PROMPT, max_new_tokens=2)


@pytest.mark.parametrize("earlier_calls", [0, 1])
def test_hooks_that_never_ran(steering, earlier_calls):
    """A graph compiled without the hooks, as one is that predates attach(): an error, not unsteered text."""
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


@pytest.mark.parametrize("how", ["keyword", "configuration", "positional", "model"])
def test_padding_that_generate_would_infer(sae_in, sae_out, cdmap, how):
    """Without a mask, transformers takes the padding token for padding, wherever it got its id from."""
    model = make_model("gemma2")
    model.generation_config.pad_token_id = 0 if how == "model" else None
    config = GenerationConfig(pad_token_id=0, max_new_tokens=2)
    args = (config,) if how == "positional" else ()
    kwargs = {"keyword": {"pad_token_id": 0}, "configuration": {"generation_config": config}}.get(how, {})
    with dspa.Steering(sae_in, sae_out, cdmap).attach(model):
        for tokens in ([[0, 0, 5, 9]], [[1, 5, 0, 9]]):
            with pytest.raises(dspa.ModelError, match="no attention_mask"):
                model.generate(torch.tensor(tokens), *args, **kwargs)


def test_images_are_refused(gemma, steering):
    with steering.attach(gemma), pytest.raises(dspa.ModelError, match="pixel_values"):
        gemma.generate(PROMPT, pixel_values=torch.zeros(1, 3, 8, 8))


def test_detach_while_generating(gemma, steering):
    class Detach(StoppingCriteria):
        def __call__(self, *_: object, **__: object) -> torch.Tensor:
            steering.detach()
            return torch.tensor([False])

    steering.attach(gemma)
    with pytest.raises(dspa.ModelError, match="detached while generate"):
        gemma.generate(PROMPT, max_new_tokens=4, stopping_criteria=StoppingCriteriaList([Detach()]))


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


def test_a_model_without_a_head(gemma, steering):
    with pytest.raises(dspa.ModelError, match="does not generate"):
        steering.attach(gemma.model, layers="layers")
    gemma.model(PROMPT)


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
    with dspa.Steering(sae_in, sae_out, cdmap).attach(model), pytest.raises(dspa.ModelError, match="cannot be"):
        model.generate(PROMPT, max_new_tokens=1)


def test_learned_prompts(steering):
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    wrapped = peft.get_peft_model(make_model("gemma2"), config)
    with pytest.raises(dspa.ModelError, match="learned prompts"):
        steering.attach(wrapped)


def test_config_that_is_text():
    with pytest.raises(ValueError, match=r"`alpha` is '0.2'; accepted: a number"):
        dspa.SteeringConfig(alpha="0.2")


def test_failed_generation_leaves_the_model_clean(gemma, steering):
    before = dict(gemma.__dict__)
    with steering.attach(gemma), pytest.raises(ValueError, match="nonsense"):
        gemma.generate(PROMPT, nonsense=1)
    assert gemma.__dict__ == before


def test_a_copy_of_a_steered_model(gemma, steering):
    with steering.attach(gemma), pytest.raises(dspa.ModelError, match="cannot be copied"):
        copy.deepcopy(gemma)
    copy.deepcopy(gemma)


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
        torch.testing.assert_close(got, wanted, atol=2e-4, rtol=1e-4)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding(self, model, steering, side):
        """A padded row gives what it gives alone."""
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
        torch.testing.assert_close(padded[mask.bool()][None], alone, atol=2e-4, rtol=1e-4)

    @pytest.mark.parametrize("starts", [[0], [10], [5, 5], [[5]]])
    def test_starts(self, gemma, steering, starts):
        accepted = "accepted: 1 columns, one a row, from 1 to 9"
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
    """The record tells each edited token and what became of its latents."""
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
            assert after == pytest.approx(max(before - 0.5 * edit.maximum, 0), abs=1e-6)
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
    with pytest.raises(ValueError, match="`screen` is 'int4'; accepted: none, int8"):
        dspa.Steering(sae_in, sae_out, cdmap, screen="int4")


def test_responses_before_attach(steering):
    with pytest.raises(dspa.ModelError, match=r"not attached: call attach\(model\)"), steering.responses([3]):
        pass


def test_detach_without_the_steering(gemma, sae_in, sae_out, cdmap):
    before = dict(gemma.__dict__)
    dspa.Steering(sae_in, sae_out, cdmap).attach(gemma)
    dspa.detach(gemma)
    dspa.detach(gemma)
    assert gemma.__dict__ == before
    gemma(PROMPT)


def test_swapped_saes(sae_in, sae_out, cdmap):
    with pytest.raises(dspa.MapError, match="Are the two SAEs swapped"):
        dspa.Steering(sae_out, sae_in, cdmap)


def test_encoder_decoder(steering):
    model = T5ForConditionalGeneration(T5Config(vocab_size=61, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8))
    with pytest.raises(dspa.ModelError, match="encoder-decoder; accepted: decoder-only"):
        steering.attach(model)


def test_guidance(gemma, steering):
    """Its second pass is over another text, whose plan nobody made."""
    with steering.attach(gemma), pytest.raises(dspa.ModelError, match="guidance_scale"):
        gemma.generate(PROMPT, guidance_scale=2.0, max_new_tokens=2)
