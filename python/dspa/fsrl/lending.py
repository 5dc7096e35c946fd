"""Give a model to a trainer, and have it back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from transformers import PreTrainedTokenizerBase

from dspa.fsrl.adapter import FSRLAdapter
from dspa.models.layers import CausalLM

# Under which name a trainer, its optimizer and its processes see the adapter.
MODULE = "fsrl_adapter"
# What layers call the probability of a dropout that is no module; modules, TRL switches off.
DROPOUTS = ("attention_dropout", "activation_dropout", "dropout")


@contextmanager
def trainable(
    model: CausalLM, tokenizer: PreTrainedTokenizerBase, adapter: FSRLAdapter, *, gradient_checkpointing: bool
) -> Iterator[None]:
    """`model` for a trainer: frozen, without dropout, and with `adapter` as a module of it that alone is trained.

    Afterwards everything is as it was, whatever a trainer did: attributes of all modules (training mode, hooks, state
    of gradient checkpointing), configurations, which parameters require gradients, the tokenizer's padding token. The
    adapter is then not trainable, and after an exception has the weights that it came with.
    """
    with ExitStack() as stack:
        stack.callback(setattr, tokenizer, "pad_token", tokenizer.pad_token)
        for thing in (*model.modules(), model.config, model.config.get_text_config(), model.generation_config):
            stack.enter_context(_kept(thing))
        for parameter in model.parameters():
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
        model.requires_grad_(False)
        # What is trained with dropout is another model than the frozen one.
        for module in model.modules():
            for name in DROPOUTS:
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
        if gradient_checkpointing:
            _checkpoint(model)
        stack.enter_context(_trainable(adapter))
        model.add_module(MODULE, adapter)
        yield


@contextmanager
def _trainable(adapter: FSRLAdapter) -> Iterator[None]:
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
def _kept(thing: object) -> Iterator[None]:
    """Give `thing` back the attributes that it has, and what is in those that are dictionaries."""
    before = dict(vars(thing))
    contents = [(value, dict(value)) for value in before.values() if isinstance(value, dict)]
    try:
        yield
    finally:
        vars(thing).clear()
        vars(thing).update(before)
        for value, content in contents:
            value.clear()
            value.update(content)


def _checkpoint(model: CausalLM) -> None:
    # Until transformers 5.23, where it was called so.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    # Reentrant checkpoints pass no gradient on where their input needs none.
    enable({"use_reentrant": False})
    # For their sake all inputs would, and every layer below the adapter's be run backward.
    model.disable_input_require_grads()
