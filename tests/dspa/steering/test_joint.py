"""Several Steerings of one model, separate or joint: one pass reads the prompt, and edits follow each other."""

from __future__ import annotations

import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

import dspa
from dspa.config import SteeringConfig
from dspa.fsrl import FSRLAdapter
from dspa.models.attachment import Attachment
from dspa.models.layers import decoder_layers
from dspa.models.reading import READING
from dspa.testing import D_IN, D_SAE_IN, D_SAE_OUT, L_IN, L_OUT, cache_names, make_map, make_model, make_sae

from ...rounding import assert_same_logits
from ..support.plain import Plain
from .test_generate import N_NEW, PROMPTS, compiled_decoding, new_tokens, padded

SEQUENCE = torch.tensor([[1, 5, 9, 33, 20, 7, 44, 12, 31]])
# The second gates where the first edits, and the third gates below and edits above both.
CONFIGS = (
    SteeringConfig(alpha=0.6, k_diff=8, k_prompt=12, mode="both"),
    SteeringConfig(alpha=3.0, k_diff=16, k_prompt=10, mode="both"),
    SteeringConfig(alpha=2.0, k_diff=8, k_prompt=6, mode="augment", positions="generated"),
)
MIDDLE, TOP, LOW = make_sae(L_OUT, D_SAE_OUT, seed=2), make_sae(L_OUT + 1, D_SAE_OUT, seed=3), make_sae(0, 64, seed=4)
PAIRS = ((make_sae(L_IN, D_SAE_IN, seed=1), MIDDLE), (MIDDLE, TOP), (LOW, make_sae(0, 80, seed=5)))
MAPS = [make_map(*pair, seed=n) for n, pair in enumerate(PAIRS)]


def make_parts(n: int = 3, **settings: Any) -> list[dspa.Steering]:
    return [dspa.Steering(*PAIRS[i], MAPS[i], CONFIGS[i], **settings) for i in range(n)]


@pytest.fixture
def joint() -> Iterator[dspa.JointSteering]:
    joint = dspa.JointSteering(make_parts())
    yield joint
    joint.detach()


def plain(model: PreTrainedModel, n: int = 3) -> Plain:
    others = [Plain(model, decoder_layers(model), *PAIRS[i], MAPS[i], CONFIGS[i]) for i in range(1, n)]
    return Plain(model, decoder_layers(model), *PAIRS[0], MAPS[0], CONFIGS[0], beside=others)


@pytest.fixture(scope="module")
def expected(model: PreTrainedModel) -> list[list[int]]:
    loop = plain(model)
    tokens = [loop.generate(prompt, N_NEW) for prompt in PROMPTS]
    for n in (1, 2):
        assert tokens != [plain(model, n).generate(prompt, N_NEW) for prompt in PROMPTS], "a part changes nothing"
    return tokens


class Passes:
    """Counts passes that only read, and how often each layer runs in them."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.layers = [0] * len(decoder_layers(model))
        self.handles = [
            layer.register_forward_pre_hook(self._counter(n), with_kwargs=True)
            for n, layer in enumerate(decoder_layers(model))
        ]

    def _counter(self, n: int) -> Callable[..., None]:
        def count(_layer: Any, _args: Any, kwargs: dict[str, Any]) -> None:
            self.layers[n] += READING in kwargs

        return count

    def __enter__(self) -> Passes:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def same_plans(mine: Any, other: Any) -> bool:
    return torch.equal(mine.slots, other.slots) and torch.equal(mine.signs, other.signs)


@pytest.fixture(scope="module")
def alone(model: PreTrainedModel) -> list[Any]:
    """The plan of each part attached alone."""
    plans = []
    for part in make_parts():
        with part.attach(model):
            model.generate(**padded(PROMPTS), max_new_tokens=1)
        plans.append(part.plan)
    return plans


@pytest.mark.parametrize("together", [True, False])
def test_one_pass_reads_the_prompt(model: PreTrainedModel, alone: list[Any], together: bool) -> None:
    """Up to the highest input layer, and plans are bit for bit those of each part alone."""
    parts = make_parts()
    for attachable in [dspa.JointSteering(parts)] if together else parts:
        attachable.attach(model)
    with Passes(model) as passes:
        model.generate(**padded(PROMPTS), max_new_tokens=N_NEW, do_sample=False)
    assert passes.layers == [1] * (L_OUT + 1) + [0] * (len(passes.layers) - L_OUT - 1)
    assert all(same_plans(part.plan, plan) for part, plan in zip(parts, alone, strict=True))
    assert all(bool((part.plan.slots >= 0).any()) for part in parts)
    with Passes(model) as passes, torch.no_grad():
        with parts[0].responses([5]), parts[1].responses([5]), parts[2].responses([5]):
            model(SEQUENCE)
        # Where a part's response starts elsewhere, its prompt is another one.
        with parts[0].responses([5]), parts[1].responses([5]), parts[2].responses([6]):
            model(SEQUENCE)
    assert passes.layers[: L_OUT + 1] == [3] * (L_OUT + 1)
    with Passes(model) as passes, parts[1].disabled():
        model.generate(**padded(PROMPTS), max_new_tokens=1)
    assert passes.layers == [1] * (L_IN + 1) + [0] * (len(passes.layers) - L_IN - 1)
    with Passes(model) as passes, parts[0].disabled(), parts[1].disabled(), parts[2].disabled():
        model.generate(**padded(PROMPTS), max_new_tokens=1)
    assert not any(passes.layers)
    dspa.detach(model)


def test_what_was_read_is_not_kept_while_tokens_are_generated(
    gemma: PreTrainedModel, joint: dspa.JointSteering, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[weakref.ref[Any]] = []
    original = Attachment.residual

    def residual(self: Attachment, *args: Any) -> Any:
        h = original(self, *args)
        read.append(weakref.ref(h))
        return h

    monkeypatch.setattr(Attachment, "residual", residual)
    with joint.attach(gemma):
        alive = []
        gemma.register_forward_hook(lambda *_: alive.append([h() is not None for h in read]))
        gemma.generate(**padded(PROMPTS), max_new_tokens=2)
    assert len(read) == 3 and alive and not any(map(any, alive))


@pytest.mark.parametrize("family", ["llama", "qwen3_5_text", "lfm2"])
def test_families(family: str, joint: dspa.JointSteering) -> None:
    model = make_model(family)
    loop = plain(model)
    wanted = [loop.generate(prompt, N_NEW) for prompt in PROMPTS]
    with joint.attach(model):
        output = model.generate(**padded(PROMPTS), max_new_tokens=N_NEW, do_sample=False)
    assert new_tokens(output) == wanted


@pytest.mark.parametrize(
    "how",
    [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}],
    ids=lambda how: next(iter(how), "plain"),
)
def test_ways_of_decoding(
    model: PreTrainedModel, joint: dspa.JointSteering, expected: list[list[int]], how: dict[str, Any]
) -> None:
    with joint.attach(model):
        output = model.generate(**padded(PROMPTS), max_new_tokens=N_NEW, do_sample=False, **how)
    assert new_tokens(output) == expected


@pytest.mark.parametrize("assistant", ["prompt lookup", "another model", "itself"])
def test_assisted(model: PreTrainedModel, joint: dspa.JointSteering, expected: list[list[int]], assistant: str) -> None:
    other = make_model("qwen3" if "Qwen3" in type(model).__name__ else "gemma2", seed=5)
    how: dict[str, Any] = {
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "another model": {"assistant_model": other},
        "itself": {"assistant_model": model},
    }[assistant]
    with joint.attach(model):
        for prompt, wanted in zip(PROMPTS, expected, strict=True):
            output = model.generate(torch.tensor([prompt]), max_new_tokens=N_NEW, do_sample=False, **how)
            assert new_tokens(output, len(output[0]) - len(prompt)) == [wanted]


def test_compiled_static_cache(model: PreTrainedModel, joint: dspa.JointSteering, expected: list[list[int]]) -> None:
    torch.compiler.reset()
    with joint.attach(model):
        assert new_tokens(model.generate(**padded(PROMPTS), generation_config=compiled_decoding())) == expected
    torch.compiler.reset()


def test_sampling(model: PreTrainedModel, joint: dspa.JointSteering) -> None:
    loop = plain(model)
    for prompt in PROMPTS:
        torch.manual_seed(3)
        wanted = loop.generate(prompt, N_NEW, sample=True)
        torch.manual_seed(3)
        with joint.attach(model):
            output = model.generate(torch.tensor([prompt]), max_new_tokens=N_NEW, do_sample=True, top_k=0)
        assert new_tokens(output) == [wanted]


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_beams(model: PreTrainedModel, joint: dspa.JointSteering, how: dict[str, Any]) -> None:
    loop, wanted = plain(model), []
    settings: dict[str, Any] = {"max_new_tokens": N_NEW, "do_sample": False, **how}
    for prompt in PROMPTS:
        with loop.steered(prompt):
            wanted += new_tokens(model.generate(torch.tensor([prompt]), use_cache=False, **settings))
    with joint.attach(model):
        assert new_tokens(model.generate(**padded(PROMPTS), **settings)) == wanted


def test_second_turn_on_a_kept_cache(model: PreTrainedModel, joint: dspa.JointSteering) -> None:
    """The second turn is selected from the whole conversation, unsteered."""
    cache = {cache_names()[0]: DynamicCache(config=model.config)}
    with joint.attach(model):
        first = model.generate(torch.tensor([PROMPTS[0]]), **cache, max_new_tokens=4, do_sample=False)
        second = torch.cat([first, torch.tensor([[33, 7, 21]])], dim=1)
        model.generate(second, **cache, max_new_tokens=4, do_sample=False)
    loop = plain(model)
    for part, one in zip(joint.parts, (loop, *loop.beside), strict=True):
        augment, ablate = one.select(second[0].tolist())
        latents = part.plan.latents(part.cdmap.columns)[0].tolist()
        assert [j for j in latents if j >= 0] == augment + ablate


@torch.no_grad()
def test_given_responses(model: PreTrainedModel, joint: dspa.JointSteering) -> None:
    base = model(SEQUENCE, use_cache=False).logits
    with plain(model).steered(SEQUENCE[0, :5].tolist()):
        wanted = model(SEQUENCE, use_cache=False).logits
    with joint.attach(model):
        with joint.responses([5]):
            assert_same_logits(model(SEQUENCE).logits, wanted)
            with joint.disabled():
                assert not joint.enabled
                assert torch.equal(model(SEQUENCE, use_cache=False).logits, base)
            assert joint.enabled
        with pytest.raises(dspa.ModelError, match="outside of generate"):
            model(SEQUENCE)
        with pytest.raises(dspa.ModelError, match="did not run, so the Steering changed nothing"), joint.checked_call():
            pass
    assert (wanted - base).abs().max() > 0.01


def test_a_peft_wrapper(model: PreTrainedModel, joint: dspa.JointSteering, expected: list[list[int]]) -> None:
    peft = pytest.importorskip("peft")
    model = make_model("qwen3" if "Qwen3" in type(model).__name__ else "gemma2")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with joint.attach(wrapped):
        joint.check_attached(wrapped)
        assert new_tokens(wrapped.generate(**padded(PROMPTS), max_new_tokens=N_NEW, do_sample=False)) == expected


def test_beside_others(gemma: PreTrainedModel, joint: dspa.JointSteering) -> None:
    """Vectors and adapters beside it act as beside a single Steering: everything in the order of the layers."""
    vector = dspa.SteeringVector(torch.ones(D_IN), 0, 0.3)
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    with vector.attach(gemma), FSRLAdapter(TOP).attach(gemma), dspa.Steering.of_latents(LOW, [3]).attach(gemma):
        before = gemma.generate(**padded(PROMPTS), **settings)
        with joint.attach(gemma):
            steered = gemma.generate(**padded(PROMPTS), **settings)
            with joint.disabled():
                assert torch.equal(gemma.generate(**padded(PROMPTS), **settings), before)
        with joint.parts[0].attach(gemma), joint.parts[1].attach(gemma), joint.parts[2].attach(gemma):
            assert torch.equal(gemma.generate(**padded(PROMPTS), **settings), steered)
        assert torch.equal(gemma.generate(**padded(PROMPTS), **settings), before)
    assert not torch.equal(steered, before)


def test_records(gemma: PreTrainedModel, joint: dspa.JointSteering) -> None:
    """A trace, a plan and counters for each output layer."""
    with joint.attach(gemma), joint.recording() as traces:
        gemma.generate(**padded(PROMPTS), max_new_tokens=N_NEW, do_sample=False)
    assert list(traces) == joint.layers == list(joint.plans) == list(joint.paths) == [L_OUT, L_OUT + 1, 0]
    for part in joint.parts:
        chosen = part.plan.latents(part.cdmap.columns)
        assert len(traces[part.layer]) and traces[part.layer].map_digest == part.cdmap.digest
        assert all(set(edit.latents) <= set(chosen[edit.row].tolist()) for edit in traces[part.layer])
        paths = joint.paths[part.layer]
        assert paths["settled"] + paths["streamed"] >= len(traces[part.layer])
    assert repr(joint).count("layers ") == 3


def test_an_sae_of_two_parts_is_held_once() -> None:
    assert MIDDLE.to(dtype=torch.bfloat16) is MIDDLE.to(dtype=torch.bfloat16)
    half = [sae.to(dtype=torch.bfloat16) for pair in PAIRS[:2] for sae in pair]
    parts = [dspa.Steering(*half[:2], MAPS[0]), dspa.Steering(*half[2:], MAPS[1])]
    joint = dspa.JointSteering(parts).attach(make_model("gemma2", dtype=torch.bfloat16))
    assert joint.parts[0].sae_out is joint.parts[1].sae_in
    joint.detach()


def test_gating_and_editing_at_one_layer(gemma: PreTrainedModel) -> None:
    """With one SAE for both."""
    cdmap, config = make_map(MIDDLE, MIDDLE), CONFIGS[1]
    loop = Plain(gemma, decoder_layers(gemma), MIDDLE, MIDDLE, cdmap, config)
    wanted = [loop.generate(prompt, N_NEW) for prompt in PROMPTS]
    assert wanted != new_tokens(gemma.generate(**padded(PROMPTS), max_new_tokens=N_NEW, do_sample=False))
    with dspa.Steering(MIDDLE, MIDDLE, cdmap, config).attach(gemma):
        output = gemma.generate(**padded(PROMPTS), max_new_tokens=N_NEW, do_sample=False)
    assert new_tokens(output) == wanted


# Bad input


def test_parts_that_are_refused() -> None:
    parts = make_parts(2)
    with pytest.raises(ValueError, match=r"`parts` is empty; accepted: one dspa\.Steering or more"):
        dspa.JointSteering([])
    with pytest.raises(TypeError, match=r"A part is a tuple; accepted: a dspa\.Steering"):
        dspa.JointSteering([(*PAIRS[0], MAPS[0])])  # type: ignore[list-item]
    with pytest.raises(
        ValueError, match=rf"`parts` is with 2 of layer {L_OUT}; accepted: one for each output layer.* make one map"
    ):
        dspa.JointSteering([*parts, *make_parts(1)])


@pytest.mark.parametrize("reason", ["attached elsewhere", "another model", "layer taken", "l_in above l_out"])
def test_attaching_all_or_nothing(gemma: PreTrainedModel, reason: str) -> None:
    parts, other = make_parts(2), make_model("gemma2", seed=1)
    if reason == "attached elsewhere":
        parts[1].attach(other)
    elif reason == "another model":
        saes = [make_sae(layer, 40, d_in=D_IN + 8) for layer in (L_IN, L_OUT + 1)]
        parts[1] = dspa.Steering(*saes, make_map(*saes))
    elif reason == "layer taken":
        make_parts(2)[1].attach(gemma)
    else:
        parts[1] = dspa.Steering(TOP, make_sae(0, 40), make_map(TOP, make_sae(0, 40)))
    n_attached, joint = len(Attachment.of(gemma).attached), dspa.JointSteering(parts)
    with pytest.raises(dspa.ModelError):
        joint.attach(gemma)
    assert len(Attachment.of(gemma).attached) == n_attached and parts[0]._attachment is None
    if reason == "attached elsewhere":
        parts[1].check_attached(other)
    with pytest.raises(dspa.ModelError, match="not attached to this model"):
        joint.check_attached(gemma)
    dspa.detach(gemma)
    dspa.detach(other)


def test_a_part_that_was_detached(gemma: PreTrainedModel, joint: dspa.JointSteering) -> None:
    joint.attach(gemma)
    with pytest.raises(dspa.ModelError, match="attached to a"):
        joint.attach(gemma)
    with pytest.raises(dspa.ModelError, match="cannot be copied or pickled"):
        pickle.dumps(joint)
    joint.parts[1].detach()
    with pytest.raises(dspa.ModelError, match="not attached"):
        joint.check_attached(gemma)
    joint.detach()
    assert not Attachment.of(gemma).attached
    assert pickle.loads(pickle.dumps(joint)).layers == joint.layers
