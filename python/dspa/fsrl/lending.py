"""Lending a model to a trainer, and getting it back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from transformers import PreTrainedTokenizerBase

from dspa.fsrl.adapter import FSRLAdapter
from dspa.models.layers import CausalLM

# The adapter's name among the model's modules, for the trainer, its optimizer and its processes.
MODULE = "fsrl_adapter"
# Attributes with the probability of a dropout that is not a module. TRL switches off the modules.
DROPOUTS = ("attention_dropout", "activation_dropout", "dropout")
# Switch by which bitsandbytes' 4-bit layers change to a layout without a backward pass, in the first pass on a CPU that
# needs no gradients.
CPU_LAYOUT = "support_avx512bf16_for_cpu"


@contextmanager
def trainable(
    model: CausalLM, tokenizer: PreTrainedTokenizerBase, adapter: FSRLAdapter, *, gradient_checkpointing: bool
) -> Iterator[None]:
    """Prepare `model` for a trainer: frozen and without dropout, while `adapter` is trainable.

    The model may be quantised: the trainer sees in it a frozen base of a trainable adapter, as of PEFT's.

    Afterwards everything is as it was, whatever the trainer did: attributes of all modules (training mode, hooks, state
    of gradient checkpointing), configurations, which parameters require gradients, and the tokenizer's padding token.
    The adapter is then not trainable. After an exception it has the weights that it came with.
    """
    with ExitStack() as stack:
        stack.callback(setattr, tokenizer, "pad_token", tokenizer.pad_token)
        for owner in (*model.modules(), model.config, model.config.get_text_config(), model.generation_config):
            stack.enter_context(_attributes_kept(owner))
        for parameter in model.parameters():
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
        model.requires_grad_(False)
        # With dropout, the adapter would be trained on another model than the frozen one.
        for module in model.modules():
            for name in DROPOUTS:
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
        for module in model.modules():
            if hasattr(module, CPU_LAYOUT):
                setattr(module, CPU_LAYOUT, False)
        if gradient_checkpointing:
            _checkpoint_gradients(model)
        # The trainer takes a quantised model only with trainable adapters of PEFT on it, which set this attribute.
        model._hf_peft_config_loaded = True
        stack.enter_context(_unfrozen(adapter))
        yield


@contextmanager
def _unfrozen(adapter: FSRLAdapter) -> Iterator[None]:
    before = {name: tensor.detach().cpu().clone() for name, tensor in adapter.state_dict().items()}
    adapter.requires_grad_(True)
    try:
        yield
    except BaseException:
        adapter.load_state_dict(before)
        raise
    finally:
        adapter.requires_grad_(False).eval()
        adapter.zero_grad()


@contextmanager
def _attributes_kept(owner: object) -> Iterator[None]:
    """Give `owner` its attributes back, and those that are dictionaries their contents."""
    before = dict(vars(owner))
    contents = [(value, dict(value)) for value in before.values() if isinstance(value, dict)]
    try:
        yield
    finally:
        vars(owner).clear()
        vars(owner).update(before)
        for value, content in contents:
            value.clear()
            value.update(content)


def _checkpoint_gradients(model: CausalLM) -> None:
    # Until transformers 5.23, the method had the second name.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    # A reentrant checkpoint passes no gradient on if its input needs none.
    enable({"use_reentrant": False})
    # With gradients of the inputs, every layer below the adapter's would be run backward too.
    model.disable_input_require_grads()
