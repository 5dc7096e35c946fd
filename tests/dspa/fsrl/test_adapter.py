"""The adapter on real small models: what it changes, how it is attached, saved and loaded, and what it refuses."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import vector_to_parameters
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

import dspa
from dspa.errors import AdapterError, ModelError
from dspa.fsrl import FSRLAdapter, FSRLConfig
from dspa.fsrl.config import ACTIVATIONS
from dspa.models.layers import decoder_layers
from dspa.models.reading import read_layers
from dspa.testing import D_IN, D_SAE_OUT, FAMILIES, L_OUT, make_map, make_model, make_sae

from ...rounding import PASS, assert_same_logits, rounding
from ..steering.test_generate import PROMPTS, compiled_decoding, new_tokens, padded
from ..support.adapters import make_adapter
from ..support.saes import DECODING

N_NEW = 6


@pytest.fixture(scope="module", params=ACTIVATIONS)
def adapter(request: pytest.FixtureRequest, sae_out) -> FSRLAdapter:
    return make_adapter(sae_out, request.param)


def by_hand(adapter: FSRLAdapter, h: Tensor) -> Tensor:
    """Decode the modified latents, and add what the SAE misses."""
    sae, u = adapter.sae, h @ adapter.W_a.T + adapter.b_a
    if adapter.config.activation == "soft_threshold":
        v = u.sign() * (u.abs() - adapter.threshold).clamp(min=0)
    else:
        v = u.relu() if adapter.config.activation == "relu" else u * (u > adapter.log_threshold.exp())
    f = sae.encode(h)
    return sae.decode((f + v).relu()) + (h - sae.decode(f))


def in_a_plain_loop(model: PreTrainedModel, adapter: FSRLAdapter, prompt: list[int]) -> list[int]:
    """Greedy tokens of one row, by passes over the whole sequence and a hook written out here."""

    def edit(_module: Any, _args: Any, output: Any) -> Any:
        edited = by_hand(adapter, output[0] if isinstance(output, tuple) else output)
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    handle = decoder_layers(model)[adapter.sae.layer].register_forward_hook(edit)
    try:
        tokens = list(prompt)
        for _ in range(N_NEW):
            with torch.no_grad():
                tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    finally:
        handle.remove()
    return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def expected(model, adapter) -> list[list[int]]:
    tokens = [in_a_plain_loop(model, adapter, prompt) for prompt in PROMPTS]
    assert tokens != new_tokens(model.generate(**padded(PROMPTS), max_new_tokens=N_NEW, do_sample=False))
    return tokens


def test_moves_latents_as_defined(model, adapter) -> None:
    ids = torch.tensor([PROMPTS[2]])
    h = read_layers(model, [L_OUT], input_ids=ids)[L_OUT]
    with adapter.attach(model), torch.no_grad():
        after = model(ids, output_hidden_states=True).hidden_states[L_OUT + 1]
    f, v = adapter.sae.encode(h), adapter.steering_vector(h)
    terms = (2 * f + v.abs()) @ adapter.sae.W_dec.abs() + h.abs()
    assert ((after - by_hand(adapter, h)).abs() <= rounding(DECODING, terms)).all()
    assert (after - h).abs().max() > 0.1


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 4},
    ],
    ids=lambda how: next(iter(how), "cached"),
)
def test_ways_of_decoding(model, adapter, expected, how) -> None:
    """Each gives the tokens of a plain loop over one row."""
    with adapter.attach(model):
        assert new_tokens(model.generate(**padded(PROMPTS), max_new_tokens=N_NEW, do_sample=False, **how)) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, sae_out) -> None:
    model, adapter = make_model(family), make_adapter(sae_out)
    wanted = [in_a_plain_loop(model, adapter, prompt) for prompt in PROMPTS]
    with adapter.attach(model):
        assert new_tokens(model.generate(**padded(PROMPTS), max_new_tokens=N_NEW, do_sample=False)) == wanted


def test_compiled_decoding(model, sae_out) -> None:
    """One graph per step, without a break. Each adapter, and the bare model, has a graph of its own."""
    config, adapters = compiled_decoding(), [make_adapter(sae_out), make_adapter(sae_out, seed=1)]
    wanted = [[in_a_plain_loop(model, adapter, prompt) for prompt in PROMPTS] for adapter in adapters]
    torch.compiler.reset()
    before = model.generate(**padded(PROMPTS), generation_config=config)
    for adapter, tokens in zip(adapters, wanted, strict=True):
        with adapter.attach(model):
            assert new_tokens(model.generate(**padded(PROMPTS), generation_config=config)) == tokens
        assert torch.equal(model.generate(**padded(PROMPTS), generation_config=config), before)
    torch.compiler.reset()


def test_a_compiled_model_sees_what_is_attached_later(model, sae_out) -> None:
    torch.compiler.reset()
    compiled, ids, adapter = torch.compile(model, backend="eager"), torch.tensor([PROMPTS[2]]), make_adapter(sae_out)
    with torch.no_grad():
        base = compiled(ids).logits
        with adapter.attach(model):
            assert_same_logits(compiled(ids).logits, model(ids).logits)
            assert (compiled(ids).logits - base).abs().max() > 0.1
        assert_same_logits(compiled(ids).logits, base)
    torch.compiler.reset()


def test_a_generate_that_goes_round_the_layers_is_refused(model, sae_out, monkeypatch) -> None:
    monkeypatch.setattr(model, "generate", lambda inputs, **_: inputs)
    with make_adapter(sae_out).attach(model), pytest.raises(ModelError, match=f"hook at layer {L_OUT} did not run"):
        model.generate(torch.tensor([PROMPTS[0]]))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_starts_as_nothing(model, sae_out, activation) -> None:
    """Logits within rounding in fp32, and the same tokens."""
    ids = padded(PROMPTS)
    with torch.no_grad():
        base, tokens = model(**ids).logits, model.generate(**ids, max_new_tokens=N_NEW, do_sample=False)
        with FSRLAdapter(sae_out, FSRLConfig(activation)).attach(model):
            # The adapter starts by moving a residual by less than 1e-5 of its length.
            assert (model(**ids).logits - base).abs().max() < (rounding(PASS, 1.0) + 1e-5) * base.abs().max()
            assert torch.equal(model.generate(**ids, max_new_tokens=N_NEW, do_sample=False), tokens)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_step_of_training_moves_the_adapter_alone(model, sae_out, activation) -> None:
    adapter, ids = FSRLAdapter(sae_out, FSRLConfig(activation, initial_threshold=1e-3)), torch.tensor([PROMPTS[2]])
    named = dict(adapter.named_parameters())
    threshold = {"soft_threshold": ["threshold"], "relu": [], "jumprelu": ["log_threshold"]}[activation]
    assert list(named) == ["W_a", "b_a", *threshold]
    assert named["W_a"].shape == (D_SAE_OUT, D_IN) and named["W_a"].abs().max() <= 1e-3 and not named["b_a"].any()
    frozen = {name: p.detach().clone() for name, p in model.named_parameters()}
    weights = {name: getattr(sae_out, name).clone() for name in ("W_enc", "b_enc", "W_dec", "threshold")}
    model.requires_grad_(False)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    with adapter.attach(model):
        losses = []
        for _ in range(5):
            optimizer.zero_grad()
            with adapter.recording() as moves:
                logits = model(ids).logits
            loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]) + 1e-3 * moves.l1[0].mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert moves.l0[0].shape == ids.shape and losses[-1] < losses[0]
    model.requires_grad_(True)
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters())
    assert all(torch.equal(getattr(sae_out, name), value) for name, value in weights.items())


def test_a_recording_holds_each_pass_and_its_penalty_has_a_gradient(model, sae_out) -> None:
    adapter = make_adapter(sae_out).requires_grad_()
    with adapter.attach(model), adapter.recording() as moves:
        model(torch.tensor([PROMPTS[0]]))
        with adapter.disabled():
            model(torch.tensor([PROMPTS[1]]))
        model(torch.tensor(PROMPTS[:1] * 2))
    assert [tuple(l1.shape) for l1 in moves.l1] == [(1, 6), (2, 6)]
    h = read_layers(model, [L_OUT], input_ids=torch.tensor([PROMPTS[0]]))[L_OUT]
    v = adapter.steering_vector(h)
    torch.testing.assert_close(moves.l1[0].detach(), v.abs().sum(dim=-1), rtol=rounding(PASS, D_IN**0.5), atol=0)
    assert torch.equal(moves.l0[0].long(), (v != 0).sum(dim=-1))
    moves.l1[0].sum().backward()
    assert adapter.W_a.grad is not None and adapter.threshold.grad is not None and adapter.b_a.grad is not None
    assert adapter.threshold.grad.max() <= 0 < adapter.W_a.grad.abs().max()


def test_disabled_is_the_base_model(model, sae_out) -> None:
    ids = torch.tensor([PROMPTS[2]])
    with torch.no_grad():
        base = model(ids).logits
        adapter = make_adapter(sae_out).attach(model)
        with adapter.disabled():
            assert torch.equal(model(ids).logits, base)
        assert not torch.equal(model(ids).logits, base)
        adapter.detach()
        assert torch.equal(model(ids).logits, base)


def test_mask_and_fraction(model, sae_out) -> None:
    adapter, ids = make_adapter(sae_out), torch.tensor([PROMPTS[2]])
    with adapter.attach(model), torch.no_grad(), adapter.recording() as moves:
        model(ids)
        adapter.fraction = 0.25
        model(ids)
        adapter.fraction, adapter.mask = 1.0, torch.arange(D_SAE_OUT) < 10
        model(ids)
    whole, quarter, ten = (l0[0] for l0 in moves.l0)
    assert torch.equal(quarter, (whole / 4).ceil().int()) and ten.max() <= 10 and ten.sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_models_see_what_is_trained(sae_out, dtype) -> None:
    """In evaluation mode W_a is converted once and again after a change, and the parameters stay fp32."""
    model, adapter = make_model("qwen3").to(dtype), make_adapter(sae_out.to(dtype=dtype))
    ids = torch.tensor([PROMPTS[2]])
    with adapter.attach(model), torch.no_grad():
        first = model(ids).logits
        assert torch.equal(model(ids).logits, first) and first.dtype == dtype
        adapter.W_a.mul_(0.5)
        second = model(ids).logits
        assert not torch.equal(second, first)
        adapter.load_state_dict({**adapter.state_dict(), "W_a": 2 * adapter.W_a})
        assert torch.equal(model(ids).logits, first)
        adapter.train()
        assert torch.equal(model(ids).logits, first)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}


def assign_data(W_a: Tensor) -> None:
    W_a.data = 0.5 * W_a


def assign_data_twice(W_a: Tensor) -> None:
    """The second tensor may get the memory that the parameter had before."""
    W_a.data = torch.zeros_like(W_a)
    W_a.data = torch.full_like(W_a, 0.3)


def write_to_numpy(W_a: Tensor) -> None:
    array = W_a.detach().numpy()
    array *= 0.5


CHANGES: dict[str, Callable[[Tensor], object]] = {
    "in place": lambda W_a: W_a.mul_(0.5),
    "data": assign_data,
    "data, twice": assign_data_twice,
    "vector_to_parameters": lambda W_a: vector_to_parameters(0.5 * W_a.flatten(), [W_a]),
    "data in place": lambda W_a: W_a.data.mul_(0.5),
    "a NumPy array": write_to_numpy,
}
# Those that leave the address and the version of a tensor as they are.
UNSEEN = ("data in place", "a NumPy array")


def fresh(adapter: FSRLAdapter) -> FSRLAdapter:
    """An adapter of the same parameters that has converted nothing yet."""
    other = FSRLAdapter(adapter.sae, adapter.config)
    other.load_state_dict({name: tensor.clone() for name, tensor in adapter.state_dict().items()})
    return other.requires_grad_(False).eval()


@pytest.mark.parametrize("change", CHANGES)
def test_a_pass_sees_every_change_of_the_parameter(sae_out, change) -> None:
    adapter = make_adapter(sae_out.to(dtype=torch.bfloat16))
    h = torch.randn(2, 7, D_IN, generator=torch.Generator().manual_seed(5)).bfloat16()
    with torch.no_grad():
        before, step = adapter(h), adapter(h[:, :1])
        CHANGES[change](adapter.W_a)
        if change not in UNSEEN:
            assert torch.equal(adapter(h[:, :1]), fresh(adapter)(h[:, :1])), "a pass over one token"
        after = adapter(h)
        assert torch.equal(after, fresh(adapter)(h)) and not torch.equal(after, before)
        assert torch.equal(adapter(h[:, :1]), fresh(adapter)(h[:, :1])) and not torch.equal(adapter(h[:, :1]), step)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("prompt", [PROMPTS[2], PROMPTS[2][:1]], ids=["prompt", "one token"])
def test_generate_sees_every_change_of_the_parameter(sae_out, prompt, change) -> None:
    model, adapter = make_model("qwen3").to(torch.bfloat16), make_adapter(sae_out.to(dtype=torch.bfloat16))
    ids = torch.tensor([prompt])

    def logits() -> Tensor:
        kept = {"return_dict_in_generate": True, "output_logits": True}
        return torch.stack(model.generate(ids, max_new_tokens=3, do_sample=False, **kept).logits)

    with torch.no_grad():
        with adapter.attach(model):
            before = logits()
            CHANGES[change](adapter.W_a)
            after = logits()
        with fresh(adapter).attach(model):
            assert torch.equal(after, logits()) and not torch.equal(after, before)


def test_another_parameter_in_its_place(sae_out) -> None:
    adapter = make_adapter(sae_out.to(dtype=torch.bfloat16))
    step = torch.randn(1, 1, D_IN, generator=torch.Generator().manual_seed(5)).bfloat16()
    with torch.no_grad():
        before = adapter(step)
        adapter.W_a = torch.nn.Parameter(0.5 * adapter.W_a, requires_grad=False)
        assert torch.equal(adapter(step), fresh(adapter)(step)) and not torch.equal(adapter(step), before)


def test_passes_with_gradients_read_the_parameter(sae_out) -> None:
    adapter = make_adapter(sae_out.to(dtype=torch.bfloat16))
    step = torch.randn(1, 1, D_IN, generator=torch.Generator().manual_seed(5)).bfloat16()
    with torch.no_grad():
        before = adapter(step)
    adapter.W_a.data.mul_(0.5)
    assert torch.equal(adapter(step), fresh(adapter)(step)) and not torch.equal(adapter(step), before)


def test_an_adapter_made_in_inference_mode(sae_out) -> None:
    """Its parameters have no version."""
    step = torch.randn(1, 1, D_IN, generator=torch.Generator().manual_seed(5)).bfloat16()
    narrow = sae_out.to(dtype=torch.bfloat16)
    with torch.inference_mode():
        adapter = make_adapter(narrow)
        before = adapter(step)
        adapter.W_a.mul_(0.5)
        assert torch.equal(adapter(step), fresh(adapter)(step)) and not torch.equal(adapter(step), before)
    with torch.no_grad():
        assert torch.equal(adapter(step), fresh(adapter)(step))


def test_decoding_converts_nothing(sae_out, monkeypatch) -> None:
    """W_a is read by the prompt's pass and by nothing after it."""
    model, adapter = make_model("qwen3").to(torch.bfloat16), make_adapter(sae_out.to(dtype=torch.bfloat16))
    calls, refresh = [], FSRLAdapter._refresh_cast
    monkeypatch.setattr(FSRLAdapter, "_refresh_cast", lambda *args: [calls.append(1), refresh(*args)][1])
    with adapter.attach(model):
        for _ in range(2):
            calls.clear()
            model.generate(**padded(PROMPTS), max_new_tokens=2, do_sample=False)
            few = len(calls)
            calls.clear()
            model.generate(**padded(PROMPTS), max_new_tokens=9, do_sample=False)
            assert few <= len(calls) == 2


def test_a_compiled_step_sees_changes_since_the_last_call(sae_out) -> None:
    model, adapter = make_model("qwen3").to(torch.bfloat16), make_adapter(sae_out.to(dtype=torch.bfloat16))
    config = compiled_decoding()
    torch.compiler.reset()
    with adapter.attach(model):
        before = model.generate(**padded(PROMPTS), generation_config=config)
        with torch.no_grad():
            adapter.W_a.data.mul_(-3)
        after = model.generate(**padded(PROMPTS), generation_config=config)
    torch.compiler.reset()
    with fresh(adapter).attach(model):
        expected = model.generate(**padded(PROMPTS), generation_config=config)
    torch.compiler.reset()
    assert torch.equal(after, expected) and not torch.equal(after, before)


def test_attached_to_the_model_yet_no_part_of_it(model, sae_out) -> None:
    before = list(model.state_dict()), len(list(model.parameters())), len(list(model.modules()))
    with make_adapter(sae_out).attach(model):
        assert before == (list(model.state_dict()), len(list(model.parameters())), len(list(model.modules())))


def test_save_pretrained_refuses_while_attached(model, sae_out, tmp_path) -> None:
    message = r"without the FSRL adapter at layer 2\. Save that by adapter\.save"
    with make_adapter(sae_out).attach(model), pytest.raises(ModelError, match=message):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    model.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model").exists()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=str)
def test_together_with_steering(model, sae_in, sae_out, cdmap, order) -> None:
    """Whichever is detached first, the other one keeps acting, and the model ends as it was."""
    late = make_sae(3, 80, seed=7)
    steering = dspa.Steering(sae_in, late, make_map(sae_in, late, seed=8), dspa.SteeringConfig(alpha=1.5))
    attached = [make_adapter(sae_out), steering]
    ids, methods = padded(PROMPTS), dict(model.__dict__)
    base = model.generate(**ids, max_new_tokens=N_NEW, do_sample=False)
    alone = []
    for method in attached:
        with method.attach(model):
            alone.append(model.generate(**ids, max_new_tokens=N_NEW, do_sample=False))
    for method in attached:
        method.attach(model)
    both = model.generate(**ids, max_new_tokens=N_NEW, do_sample=False)
    assert not torch.equal(both, base)
    attached[order[0]].detach()
    assert torch.equal(model.generate(**ids, max_new_tokens=N_NEW, do_sample=False), alone[order[1]])
    attached[order[1]].detach()
    assert model.__dict__ == methods
    assert torch.equal(model.generate(**ids, max_new_tokens=N_NEW, do_sample=False), base)


def test_detach_all(model, sae_in, sae_out, cdmap) -> None:
    adapter, steering = make_adapter(sae_out), dspa.Steering(sae_in, sae_out, cdmap)
    adapter.attach(model)
    steering.attach(model)
    dspa.detach(model)
    assert "generate" not in model.__dict__
    adapter.attach(model).detach()
    adapter.detach()


def test_in_a_peft_wrapper(model, adapter, expected) -> None:
    peft = pytest.importorskip("peft")
    own = make_model("qwen3" if "Qwen3" in type(model).__name__ else "gemma2")
    wrapped = peft.get_peft_model(own, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with adapter.attach(wrapped):
        output = wrapped.generate(**padded(PROMPTS), max_new_tokens=N_NEW, do_sample=False)
    assert new_tokens(output) == expected


def test_refused_when_attaching(model, sae_in, sae_out) -> None:
    adapter = make_adapter(sae_out)
    with adapter.attach(model):
        with pytest.raises(ModelError, match=r"attached to a .*ForCausalLM already"):
            adapter.attach(model)
        with pytest.raises(ModelError, match="Layer 2 of this model has another FSRLAdapter"):
            make_adapter(sae_out).attach(model)
        make_adapter(sae_in).attach(model).detach()
    for sae, message in (
        (make_sae(2, 40, d_in=32), r"`sae` reads 32 dimensions and the model's hidden size is 48"),
        (make_sae(9, 40), r"`sae` sits at layer 9; accepted: 0 to 3"),
        (make_sae(2, 40, model_name="gemma-2-2b"), "`sae` was made for 'gemma-2-2b' and the model is 'other'"),
    ):
        with pytest.raises(ModelError, match=message):
            make_adapter(sae).attach(model, model_name="other")
    with pytest.raises(ModelError, match="does not say its layer"):
        FSRLAdapter(make_sae(None, 40))
    assert "generate" not in model.__dict__


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"l1": -0.1}, r"`l1` is -0.1; accepted: a finite number >= 0 \(lambda"),
        ({"l1": float("nan")}, "`l1` is nan"),
        ({"activation": "gelu"}, "`activation` is 'gelu'; accepted: soft_threshold, relu, jumprelu"),
        ({"initial_threshold": 0.0}, "`initial_threshold` is 0.0; accepted: a finite number > 0"),
        ({"bandwidth": -1}, "`bandwidth` is -1"),
        ({"seed": 1.5}, "`seed` is 1.5"),
    ],
)
def test_settings_that_are_refused(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        FSRLConfig(**settings)


def test_its_dtype_stays(sae_out) -> None:
    with pytest.raises(TypeError, match=r"cannot become torch\.bfloat16"):
        make_adapter(sae_out).bfloat16()


# Files


def test_saved_and_loaded(model, adapter, sae_out, tmp_path) -> None:
    adapter.save(tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == ["adapter.json", "adapter.safetensors"]
    record = json.loads((tmp_path / "adapter" / "adapter.json").read_text())
    assert record["sae"]["fingerprint"] == sae_out.fingerprint and record["sae"]["layer"] == L_OUT
    loaded = FSRLAdapter.load(tmp_path / "adapter", sae_out)
    assert loaded.config == adapter.config and not loaded.training
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), adapter.parameters(), strict=True))
    ids = torch.tensor([PROMPTS[2]])
    with torch.no_grad():
        with adapter.attach(model):
            wanted = model(ids).logits
        with loaded.attach(model):
            assert torch.equal(model(ids).logits, wanted)


def test_the_same_sae_in_another_dtype_is_the_same(sae_out, tmp_path) -> None:
    make_adapter(sae_out).save(tmp_path / "adapter")
    assert FSRLAdapter.load(tmp_path / "adapter", sae_out.to(dtype=torch.bfloat16)).W_a.dtype == torch.float32


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 5}, "fingerprint"),
        ({"layer": 1}, "layer 2"),
        ({"d_sae": 64}, "d_sae 128"),
        ({"d_in": 32}, "d_in 48"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_sae_is_refused(sae_out, tmp_path, other, message) -> None:
    make_adapter(sae_out).save(tmp_path / "adapter")
    sae = make_sae(**{"layer": L_OUT, "d_sae": D_SAE_OUT, "seed": 2, **other})
    with pytest.raises(AdapterError, match=rf"was trained with an SAE of {message}.*Load that SAE"):
        FSRLAdapter.load(tmp_path / "adapter", sae)


def test_damaged_folders_are_refused(sae_out, tmp_path) -> None:
    folder = tmp_path / "adapter"
    with pytest.raises(AdapterError, match=r"holds no adapter\.json; accepted: a folder that FSRLAdapter\.save wrote"):
        FSRLAdapter.load(folder, sae_out)
    make_adapter(sae_out).save(folder)
    record, tensors = (folder / "adapter.json").read_bytes(), (folder / "adapter.safetensors").read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(AdapterError, match=message):
            FSRLAdapter.load(folder, sae_out)
        (folder / "adapter.json").write_bytes(record)
        (folder / "adapter.safetensors").write_bytes(tensors)

    (folder / "adapter.json").write_bytes(record[:40])
    refused(r"adapter\.json is not JSON")
    (folder / "adapter.json").write_bytes(record.replace(b"dspa.fsrl.1", b"dspa.fsrl.9"))
    refused("`format` is 'dspa.fsrl.9'; accepted: dspa.fsrl.1")
    (folder / "adapter.json").write_bytes(record.replace(b"soft_threshold", b"gelu"))
    refused("is damaged: `config.activation` is 'gelu'")
    (folder / "adapter.safetensors").write_bytes(tensors[:1000])
    refused("is damaged")
    (folder / "adapter.safetensors").write_bytes(tensors[:-1] + bytes([tensors[-1] ^ 1]))
    refused("is damaged")
    (folder / "adapter.safetensors").unlink()
    refused("cannot be read")
    make_adapter(sae_out, seed=1).save(tmp_path / "other")
    (folder / "adapter.safetensors").write_bytes((tmp_path / "other" / "adapter.safetensors").read_bytes())
    refused("are of two different adapters")
    FSRLAdapter.load(folder, sae_out)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_parameters_that_are_not_finite(gemma, sae_out, tmp_path, activation, wrong) -> None:
    """One of them is enough to give token 0 for ever."""
    for name in dict(make_adapter(sae_out, activation).named_parameters()):
        adapter = make_adapter(sae_out, activation)
        adapter.get_parameter(name).data.view(-1)[-1] = wrong
        adapter.save(tmp_path / name)
        with pytest.raises(AdapterError, match=f"`{name}` of .*{name} is partly NaN or infinite; accepted: finite"):
            FSRLAdapter.load(tmp_path / name, sae_out)
        with pytest.raises(AdapterError, match=f"`{name}` of the adapter is partly NaN or infinite"):
            adapter.attach(gemma)
    gemma(torch.tensor([PROMPTS[0]]))


def test_mask_and_fraction_stay_within_a_call(gemma, sae_out) -> None:
    """A text would follow both values, in this thread or another."""

    class Change(StoppingCriteria):
        def __call__(self, *_: object, **__: object) -> Tensor:
            for name, value in (("fraction", 0.5), ("mask", torch.ones(D_SAE_OUT, dtype=torch.bool))):
                with pytest.raises(AdapterError, match=f"`{name}` cannot be changed while a call of generate"):
                    setattr(adapter, name, value)
            return torch.tensor([False])

    adapter = make_adapter(sae_out)
    with adapter.attach(gemma):
        criteria = StoppingCriteriaList([Change()])
        gemma.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=2, stopping_criteria=criteria)
        adapter.fraction = 0.5
    assert adapter.fraction == 0.5 and adapter.mask is None


def test_saving_where_it_cannot_be(sae_out, tmp_path) -> None:
    adapter = make_adapter(sae_out)
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "missing" / "adapter"):
        with pytest.raises(AdapterError, match="accepted: a folder in one that exists"):
            adapter.save(path)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "edit",
    [
        lambda record: record["sae"].update(fingerprint=make_sae(L_OUT, D_SAE_OUT, seed=9).fingerprint),
        lambda record: record["config"].update(l1=0.5),
        lambda record: record.update(model_digest="x"),
        lambda record: record.update(seal="0" * 16),
    ],
    ids=["fingerprint", "config", "model_digest", "seal"],
)
def test_no_entry_of_the_record_can_be_edited(sae_out, tmp_path, edit) -> None:
    """Another SAE's fingerprint would pass that SAE off as the adapter's."""
    make_adapter(sae_out).save(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter.json"
    record = json.loads(path.read_text())
    edit(record)
    path.write_text(json.dumps(record))
    for seed in (2, 9):
        with pytest.raises(AdapterError, match=r"adapter\.json was changed after it was written: its seal"):
            FSRLAdapter.load(tmp_path / "adapter", make_sae(L_OUT, D_SAE_OUT, seed=seed))


def test_an_adapter_without_a_seal(sae_out, tmp_path) -> None:
    """Earlier versions wrote none. It is read, with a warning, and saved with one."""
    adapter, path = make_adapter(sae_out), tmp_path / "adapter" / "adapter.json"
    adapter.save(tmp_path / "adapter")
    record = json.loads(path.read_text())
    del record["seal"]
    path.write_text(json.dumps(record))
    with pytest.warns(UserWarning, match=r"earlier version, or its seal was removed: .*load and save it again"):
        loaded = FSRLAdapter.load(tmp_path / "adapter", sae_out)
    loaded.save(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FSRLAdapter.load(tmp_path / "adapter", sae_out)


def test_settings_that_are_missing_are_not_guessed(sae_out, tmp_path) -> None:
    folder = tmp_path / "adapter"
    make_adapter(sae_out).save(folder)
    record = json.loads((folder / "adapter.json").read_text())
    del record["config"]["l1"]
    (folder / "adapter.json").write_text(json.dumps(record))
    with pytest.raises(AdapterError, match=r"is damaged: `config` has no l1"):
        FSRLAdapter.load(folder, sae_out)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("fraction", "x", "`fraction` is 'x'; accepted: a number from 0"),
        ("fraction", 1.5, "`fraction` is 1.5"),
        ("mask", [True] * D_SAE_OUT, r"`mask` is a list; accepted: a tensor of torch.bool \[128\], or None"),
        ("mask", torch.ones(D_SAE_OUT), r"`mask` is torch.float32 \[128\]"),
        ("mask", torch.ones(3, dtype=torch.bool), r"`mask` is torch.bool \[3\]"),
    ],
)
def test_what_is_kept_is_checked_when_it_is_set(sae_out, name, value, message) -> None:
    adapter = make_adapter(sae_out)
    with pytest.raises(AdapterError, match=message):
        setattr(adapter, name, value)
    assert adapter.fraction == 1 and adapter.mask is None


@pytest.mark.parametrize(("sae", "config"), [("sae", None), (None, {"l1": 1.0})])
def test_another_kind_of_argument_is_refused(sae_out, sae, config) -> None:
    with pytest.raises(AdapterError, match=r"`(sae|config)` is a (str|dict); accepted: a (FrozenSAE|FSRLConfig)"):
        FSRLAdapter(sae or sae_out, config)


def test_the_callers_mask_is_copied(sae_out) -> None:
    adapter, mask = FSRLAdapter(sae_out), torch.ones(sae_out.d_sae, dtype=torch.bool)
    adapter.mask = mask
    mask.zero_()
    assert adapter.mask is not None and bool(adapter.mask.all())
