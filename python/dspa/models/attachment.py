"""What is attached to a model, and what travels with a call of it: each prompt's plan, as keyword tensors that
`generate()` carries.

Nothing here guesses what a call is. What a row steers is decided from the whole prompt before generation
starts, and reaches the layers as keywords of one row a sequence, which `generate()` itself repeats for beams
and return sequences; a token is then gated by its position alone. So the same row steers the same way alone,
padded, in chunks, with or without a cache, in a compiled model.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from dspa.errors import ModelError
from dspa.models.layers import CausalLM, cache_in, check_context

ATTRIBUTE = "_dspa_attachment"
# Tensors of a call of generate() that this package understands; token types are all alike in text.
PROMPT_TENSORS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids")


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts as a model gets them.

    inputs: input_ids [B, T] or inputs_embeds [B, T, d_in]; mask [B, T] bool, True at prompt tokens;
    positions [B, T], the position_ids that the tokens have in the model.
    """

    inputs: dict[str, Any]
    mask: Tensor
    positions: Tensor

    @property
    def last_position(self) -> Tensor:
        """Position of each prompt's last token, [B]."""
        return self.positions.where(self.mask, 0).amax(dim=1)


class Steers(Protocol):
    """What can be attached to a model."""

    @property
    def keywords(self) -> tuple[str, ...]:
        """Names under which the plans travel, different for everything attached at one time; none without plans."""

    @property
    def unsaved(self) -> str:
        """What `save_pretrained` would lose, and what to do about it; empty for nothing."""

    def begin(self, prompts: Prompts) -> dict[str, Tensor]:
        """The keyword tensors, one row a prompt."""

    def progress(self) -> tuple[int, int]:
        """Rows of hidden states seen so far, and of those that were to be steered the ones that were not finite."""

    def finish(self, before: tuple[int, int]) -> None:
        """Raise if the call that began at `before` was not steered as it should be."""

    def detach(self) -> None:
        """Leave the model as it was."""


class Attachment:
    """Everything attached to one model, and the `generate()` that carries its plans."""

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        self.steerings: list[Steers] = []
        self._undo = ExitStack()

    @classmethod
    def of(cls, model: CausalLM) -> Attachment:
        """The attachment of `model`, a new one if it has none."""
        found = model.__dict__.get(ATTRIBUTE)
        return found if isinstance(found, Attachment) else cls(model)

    def add(self, steering: Steers) -> Callable[[], None]:
        """Carry the plans of `steering` from now on; returns what ends that."""
        self._set([*self.steerings, steering])
        return lambda: self._set([each for each in self.steerings if each is not steering])

    def __deepcopy__(self, _memo: object) -> Attachment:
        raise ModelError("A steered model cannot be copied: its generate() would be the original's. detach() first.")

    def _set(self, steerings: list[Steers]) -> None:
        """Override the model's methods for these steerings, and for none leave it as it was."""
        self._undo.close()
        self.steerings = steerings
        if not steerings:
            return
        self._undo.enter_context(accepting(self.model, self._keywords()))
        self._undo.enter_context(overridden(self.model, "generate", self._generate(self.model.generate)))
        unsaved = " ".join(each.unsaved for each in steerings if each.unsaved)
        if unsaved:
            self._undo.enter_context(overridden(self.model, "save_pretrained", functools.partial(_refuse, unsaved)))
        setattr(self.model, ATTRIBUTE, self)
        self._undo.callback(delattr, self.model, ATTRIBUTE)

    def _keywords(self) -> list[str]:
        return [name for steering in self.steerings for name in steering.keywords]

    def _generate(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def generate(inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
            names = self._keywords()
            if any(name in kwargs for name in names):  # a call that `generate()` makes of itself
                return original(inputs, *args, **kwargs)
            began = [(steering, steering.progress()) for steering in self.steerings]
            plans = self._plans(inputs, args, kwargs) if names else {}
            assistant = kwargs.get("assistant_model")
            with accepting(assistant, names) if assistant is not None else nullcontext():
                result = original(inputs, *args, **kwargs, **plans)
            for steering, before in began:
                if steering not in self.steerings:
                    name = type(steering).__name__
                    raise ModelError(f"A {name} was detached while generate() ran: the end of its text is unsteered.")
                steering.finish(before)
            return result

        return generate

    def _plans(self, inputs: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
        prompts = generate_prompts(self.model, inputs, args, kwargs)
        return {name: row for steering in self.steerings for name, row in steering.begin(prompts).items()}


class Attachable:
    """What can be attached, to one model at a time, until it is detached or a `with` block ends."""

    _attachment: Attachment | None
    _undo: list[Callable[[], None]]

    def check_unattached(self) -> None:
        """Raise if this is attached already."""
        if self._attachment is not None:
            name, held = type(self).__name__, type(self._attachment.model).__name__
            raise ModelError(f"This {name} is attached to a {held} already: detach() it first.")

    def detach(self) -> None:
        """Leave the model as it was. Does nothing when not attached."""
        while self._undo:
            self._undo.pop()()
        self._attachment = None

    def __enter__(self: A) -> A:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


A = TypeVar("A", bound=Attachable)


def _refuse(problem: str, *_args: Any, **_kwargs: Any) -> None:
    raise ModelError(problem)


@contextmanager
def overridden(model: CausalLM, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Give the instance a method of its own, and take it back."""
    before = model.__dict__.get(name)
    setattr(model, name, method)
    try:
        yield
    finally:
        if before is None:
            delattr(model, name)
        else:
            setattr(model, name, before)


@contextmanager
def accepting(model: CausalLM, names: Iterable[str]) -> Iterator[None]:
    """Let `generate()` pass the keywords `names` on to every layer.

    `generate()` asks the signature of `prepare_inputs_for_generation` which keywords a model knows, and
    refuses the rest.
    """
    original = model.prepare_inputs_for_generation

    @functools.wraps(original)
    def prepare(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    signature = inspect.signature(original)
    extra = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]
    # A keyword-only parameter stands before **kwargs, which is last.
    *known, rest = signature.parameters.values()
    prepare.__signature__ = signature.replace(parameters=[*known, *extra, rest])  # type: ignore[attr-defined]
    with overridden(model, "prepare_inputs_for_generation", prepare):
        yield


def generate_prompts(model: CausalLM, inputs: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Prompts:
    """The prompts of `generate(inputs, *args, **kwargs)`, refused where they cannot be read for certain."""
    foreign = [name for name, value in kwargs.items() if isinstance(value, Tensor) and name not in PROMPT_TENSORS]
    if foreign:
        raise ModelError(
            f"generate() got {', '.join(foreign)}. Steering selects from the text of a prompt; accepted tensors: "
            f"{', '.join(PROMPT_TENSORS)}."
        )
    tokens = inputs if inputs is not None else kwargs.get("input_ids")
    name, whole = "input_ids", tokens
    if kwargs.get("inputs_embeds") is not None:
        name, whole = "inputs_embeds", kwargs["inputs_embeds"]
    if whole is None or whole.dim() < 2 or 0 in whole.shape[:2]:
        shape = None if whole is None else list(whole.shape)
        raise ModelError(f"The prompt is empty ({name}: {shape}). Steering selects from a prompt: pass one.")
    mask = kwargs.get("attention_mask")
    if mask is None:
        _check_unpadded(tokens, [kwargs, kwargs.get("generation_config"), *args[:1], model.generation_config])
        mask = torch.ones(whole.shape[:2], dtype=torch.bool)
    mask = mask.to(whole.device).bool()
    _check_prompt(model, whole.shape[1], mask, cache_in(kwargs))
    positions = kwargs.get("position_ids")
    if positions is None:
        positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    return Prompts(inputs={name: whole}, mask=mask, positions=positions.to(whole.device))


def _check_unpadded(tokens: Tensor | None, settings: list[Any]) -> None:
    """Raise if generate() would take tokens for padding; the first of `settings` that names one decides."""
    for each in settings:
        pad = each.get("pad_token_id") if isinstance(each, dict) else getattr(each, "pad_token_id", None)
        if pad is not None:
            break
    else:
        return
    if tokens is not None and bool((tokens == int(pad)).any()):
        raise ModelError(
            "A prompt holds the padding token and there is no attention_mask, so it cannot be told where the prompt "
            "is. Pass it: generate(**tokenizer(prompts, padding=True, return_tensors='pt'))."
        )


def _check_prompt(model: CausalLM, length: int, mask: Tensor, cache: Any) -> None:
    cached = int(cache.get_seq_length()) if cache is not None else 0
    if mask.dim() != 2 or mask.shape[1] != length or cached >= length:
        raise ModelError(
            f"generate() got {length} tokens, an attention_mask of shape {list(mask.shape)} and a cache of {cached} "
            "tokens. What is steered is selected from the whole conversation: pass all its input_ids with a 2-D "
            "attention_mask; tokens in the cache are still not computed again."
        )
    if not bool(mask.any(dim=1).all()):
        raise ModelError(f"Prompt {int((~mask.any(dim=1)).nonzero()[0])} of the batch is empty (all padding).")
    if bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        raise ModelError("A prompt is padded on the right. Set tokenizer.padding_side = 'left' to generate.")
    check_context(model, int(mask.sum(dim=1).max()))
