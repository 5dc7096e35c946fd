"""Lending a model to a trainer, and getting it back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from transformers import PreTrainedTokenizerBase

from dspa.fsrl.adapter import FSRLAdapter
from dspa.models.layers import CausalLM
from dspa.resuming import lent, remove_dropout

# The adapter's name among the model's modules, for the trainer, its optimizer and its processes.
MODULE = "fsrl_adapter"
# Switch by which bitsandbytes' 4-bit layers change to a layout without a backward pass, in the first pass on a CPU that
# needs no gradients.
CPU_LAYOUT = "support_avx512bf16_for_cpu"


@contextmanager
def trainable(
    model: CausalLM, tokenizer: PreTrainedTokenizerBase, adapter: FSRLAdapter, *, gradient_checkpointing: bool
) -> Iterator[None]:
    """Prepare `model` for a trainer: frozen and without dropout, while `adapter` is trainable.

    The model may be quantised: the trainer sees in it a frozen base of a trainable adapter, as of PEFT's.

    Afterwards everything is as it was, as after `lent`, and the adapter is not trainable. After an exception it has the
    weights that it came with.
    """
    with ExitStack() as stack:
        stack.enter_context(lent(model, tokenizer))
        model.requires_grad_(False)
        # With dropout, the adapter would be trained on another model than the frozen one.
        remove_dropout(model)
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


def _checkpoint_gradients(model: CausalLM) -> None:
    # Until transformers 5.23, the method had the second name.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    # A reentrant checkpoint passes no gradient on if its input needs none.
    enable({"use_reentrant": False})
    # With gradients of the inputs, every layer below the adapter's would be run backward too.
    model.disable_input_require_grads()
