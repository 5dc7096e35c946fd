"""Attaching and detaching every kind of `Attachable`, which leaves nothing behind."""

from __future__ import annotations

import copy
import io
import os
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

import dspa
from dspa.fsrl import FSRLAdapter
from dspa.models.attachment import LOCK, Attachable
from dspa.models.layers import CausalLM, decoder_layers, device_of
from dspa.testing import D_IN, L_IN, L_OUT, make_map, make_model, make_sae

from ...rounding import assert_same_logits

PROMPT = torch.tensor([[1, 5, 9, 33, 20, 7]])
SETTINGS = {"max_new_tokens": 6, "do_sample": False}


class AddVector(Attachable):
    """Adds a vector to the residual, with the least code that a method of steering needs."""

    def __init__(self, layer: int, vector: Tensor) -> None:
        super().__init__()
        self._layer, self.vector = layer, vector

    @property
    def layer(self) -> int:
        return self._layer

    def _prepare(self, model: CausalLM, stack: nn.ModuleList, model_name: str | None) -> None:
        self.vector = self.vector.to(device_of(stack[self.layer]))

    def _edit(self, h: Tensor, kwargs: dict[str, Any]) -> Tensor:
        return h + self.vector


@pytest.fixture
def vector() -> AddVector:
    return AddVector(L_OUT, 2 * torch.randn(D_IN, generator=torch.Generator().manual_seed(3)))


def added_by_hand(model: PreTrainedModel, vector: AddVector) -> tuple[Tensor, Tensor]:
    """Tokens and logits of `PROMPT`, by a hook written out here."""

    def add(_module: Any, _args: Any, output: Any) -> Any:
        return (output[0] + vector.vector, *output[1:]) if isinstance(output, tuple) else output + vector.vector

    handle = decoder_layers(model)[vector.layer].register_forward_hook(add)
    with torch.no_grad():
        answer = model.generate(PROMPT, **SETTINGS), model(PROMPT).logits
    handle.remove()
    return answer


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "gpt_neox"])
def test_another_kind_of_attachable(family, vector):
    model = make_model(family)
    before = dict(model.__dict__)
    tokens, logits = added_by_hand(model, vector)
    base, base_logits = model.generate(PROMPT, **SETTINGS), model(PROMPT).logits
    assert not torch.equal(tokens, base)
    with vector.attach(model) as attached, torch.no_grad():
        assert attached is vector
        assert torch.equal(model.generate(PROMPT, **SETTINGS), tokens) and torch.equal(model(PROMPT).logits, logits)
        with vector.disabled():
            assert torch.equal(model.generate(PROMPT, **SETTINGS), base)
            assert torch.equal(model(PROMPT).logits, base_logits)
        assert torch.equal(model.generate(PROMPT, **SETTINGS), tokens)
    assert model.__dict__ == before and torch.equal(model(PROMPT).logits, base_logits)


def test_it_stands_at_one_layer_with_the_others(gemma, vector, steering):
    """One of each kind can be attached to a layer."""
    added, _ = added_by_hand(gemma, vector)
    with steering.attach(gemma):
        steered = gemma.generate(PROMPT, **SETTINGS)
        with vector.attach(gemma):
            with pytest.raises(dspa.ModelError, match="Layer 2 of this model has another AddVector"):
                AddVector(L_OUT, vector.vector).attach(gemma)
            assert not torch.equal(gemma.generate(PROMPT, **SETTINGS), steered)
            with vector.disabled():
                assert torch.equal(gemma.generate(PROMPT, **SETTINGS), steered)
            with steering.disabled():
                assert torch.equal(gemma.generate(PROMPT, **SETTINGS), added)
        assert torch.equal(gemma.generate(PROMPT, **SETTINGS), steered)


def test_a_compiled_model_sees_every_change(gemma, vector):
    torch.compiler.reset()
    compiled = torch.compile(gemma, backend="eager")
    _, logits = added_by_hand(gemma, vector)
    with torch.no_grad():
        base = compiled(PROMPT).logits
        with vector.attach(gemma):
            assert_same_logits(compiled(PROMPT).logits, logits)
            with vector.disabled():
                assert_same_logits(compiled(PROMPT).logits, base)
            assert_same_logits(compiled(PROMPT).logits, logits)
        assert_same_logits(compiled(PROMPT).logits, base)
    assert (logits - base).abs().max() > 0.1
    torch.compiler.reset()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_residuals_from_which_a_later_layer_overflows(family, vector):
    """They are finite where they are changed: fp16 ends at 65504."""
    model = make_model(family, dtype=torch.float16)
    vector.vector = torch.full((D_IN,), 6e4, dtype=torch.float16)
    vector.vector[::2] *= -1
    following = decoder_layers(model)[L_OUT + 1]
    following.mlp.register_forward_hook(lambda _module, _args, output: output * 0 + 2e4)
    base = model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), **SETTINGS)
    with vector.attach(model):
        with pytest.raises(dspa.ModelError, match="logits are NaN"):
            model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), **SETTINGS)
        with vector.disabled():
            assert torch.equal(model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), **SETTINGS), base)


def test_a_call_without_an_edit(gemma, vector):
    with vector.attach(gemma):
        with vector.checked_call():
            gemma(PROMPT)
        for _ in range(2):
            with pytest.raises(dspa.ModelError, match="layer 2 did not run, so the AddVector"), vector.checked_call():
                pass
        with pytest.raises(ZeroDivisionError), vector.checked_call():
            _ = 1 / 0


def test_a_call_that_begins_does_not_hide_the_edits_of_another(gemma, vector):
    """Two threads call the model, and the second begins after the last pass of the first."""
    with vector.attach(gemma):
        first, second = vector.checked_call(), vector.checked_call()
        first.__enter__()
        gemma(PROMPT)
        second.__enter__()
        first.__exit__(None, None, None)
        gemma(PROMPT)
        second.__exit__(None, None, None)
        with pytest.raises(dspa.ModelError, match="did not run"), vector.checked_call():
            pass


def test_check_attached(gemma, vector, steering, sae_out):
    other = make_model("llama")
    for attachable in (vector, steering, dspa.fsrl.FSRLAdapter(sae_out)):
        message = f"The {type(attachable).__name__} is not attached to this model"
        with pytest.raises(dspa.ModelError, match=message):
            attachable.check_attached(gemma)
        with attachable.attach(gemma):
            attachable.check_attached(gemma)
            with pytest.raises(dspa.ModelError, match=message):
                attachable.check_attached(other)
            with attachable.disabled():
                attachable.check_attached(gemma)
        with pytest.raises(dspa.ModelError, match=message):
            attachable.check_attached(gemma)


def test_check_attached_to_a_wrapped_model(vector):
    peft = pytest.importorskip("peft")
    model = make_model("gemma2")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with vector.attach(wrapped):
        vector.check_attached(wrapped)
        vector.check_attached(model)


def test_attach_twice(gemma, steering, sae_in, sae_out, cdmap):
    steering.attach(gemma)
    with pytest.raises(dspa.ModelError, match=r"attached to a Gemma2ForCausalLM already: detach\(\) it first"):
        steering.attach(gemma)
    with pytest.raises(dspa.ModelError, match="Layer 2 of this model has another Steering"):
        dspa.Steering(sae_in, sae_out, cdmap).attach(gemma)
    steering.detach()
    steering.detach()
    with steering.attach(gemma):
        gemma.generate(PROMPT, max_new_tokens=1)


def test_detach_while_generating(gemma, steering):
    class Detach(StoppingCriteria):
        def __call__(self, *_: object, **__: object) -> torch.Tensor:
            steering.detach()
            return torch.tensor([False])

    steering.attach(gemma)
    with pytest.raises(dspa.ModelError, match="detached or disabled while generate"):
        gemma.generate(PROMPT, max_new_tokens=4, stopping_criteria=StoppingCriteriaList([Detach()]))


def test_failed_generation_leaves_the_model_clean(gemma, steering):
    before = dict(gemma.__dict__)
    with steering.attach(gemma), pytest.raises(ValueError, match="nonsense"):
        gemma.generate(PROMPT, nonsense=1)
    assert gemma.__dict__ == before


def test_a_copy_of_a_steered_model(gemma, steering):
    with steering.attach(gemma), pytest.raises(dspa.ModelError, match="cannot be copied"):
        copy.deepcopy(gemma)
    copy.deepcopy(gemma)


def test_detach_without_the_steering(gemma, sae_in, sae_out, cdmap):
    before = dict(gemma.__dict__)
    dspa.Steering(sae_in, sae_out, cdmap).attach(gemma)
    dspa.detach(gemma)
    dspa.detach(gemma)
    assert gemma.__dict__ == before
    gemma(PROMPT)


def made(kind: str) -> Attachable:
    sae_in, sae_out = make_sae(L_IN, 64), make_sae(L_OUT, 128)
    return dspa.Steering(sae_in, sae_out, make_map(sae_in, sae_out)) if kind == "dspa" else FSRLAdapter(sae_out).eval()


COPIES: dict[str, Any] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "save": lambda it: torch.save(it, io.BytesIO()),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", ["dspa", "fsrl"])
def test_what_is_attached_is_not_copied(how: str, kind: str) -> None:
    model, attached = make_model("gemma2"), made(kind)
    with attached.attach(model):
        for whole in [attached] + [model] * (how != "copy"):
            with pytest.raises(dspa.ModelError, match="cannot be copied"):
                COPIES[how](whole)
        assert "generate" in vars(model), "it is attached still"
    COPIES[how](attached)


def test_a_child_of_fork_does_not_wait_for_threads_of_its_parent() -> None:
    model, attached = make_model("gemma2"), made("dspa")
    taken, free = threading.Event(), threading.Event()

    def hold() -> None:
        with LOCK:
            taken.set()
            free.wait(1)

    with attached.attach(model):
        expected = model.generate(PROMPT, **SETTINGS).tolist()
        thread = threading.Thread(target=hold)
        thread.start()
        taken.wait()
        if not (child := os.fork()):
            threading.Timer(20, os._exit, [3]).start()
            os._exit(int(model.generate(PROMPT, **SETTINGS).tolist() != expected))
        free.set()
        thread.join()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
