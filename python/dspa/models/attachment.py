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
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar

from torch import Tensor, nn

from dspa.errors import ModelError
from dspa.models.layers import CausalLM, base_model
from dspa.models.prompts import Prompts, generate_prompts

ATTRIBUTE = "_dspa_attachment"


class Attachable(ABC):
    """Something attached to one model at a time, until it is detached or a `with` block ends.

    A subclass registers its hooks in `attach()`, which ends with `_attached_to()`, and overrides what it needs of
    `keywords`, `keyword_tensors`, `before_call`, `after_call` and `unsaved`. Its hooks do nothing where `enabled` is
    False.
    """

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True
        self._attachment: Attachment | None = None
        self._undo: list[Callable[[], None]] = []

    @abstractmethod
    def attach(self: A, model: nn.Module, *, layers: str | None = None, model_name: str | None = None) -> A:
        """Act on `model` until `detach()`, or until the end of a `with` block."""

    def detach(self) -> None:
        """Leave the model as it was. Does nothing when not attached."""
        while self._undo:
            self._undo.pop()()
        self._attachment = None

    def __enter__(self: A) -> A:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Leave residuals as they are for a while: the base model runs."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def check_attached(self, model: nn.Module) -> None:
        """Raise `ModelError` unless this is attached to `model`."""
        if self not in Attachment.of(base_model(model)).attached:
            name = type(self).__name__
            raise ModelError(f"The {name} is not attached to this model, so it would change nothing: attach it first.")

    def check_unattached(self) -> None:
        """Raise `ModelError` if this is attached already."""
        if self._attachment is not None:
            name, held = type(self).__name__, type(self._attachment.model).__name__
            raise ModelError(f"This {name} is attached to a {held} already: detach() it first.")

    def _attached_to(self, attachment: Attachment, *undo: Callable[[], None]) -> None:
        """Join `attachment`; `detach()` leaves it, and calls `undo`."""
        self._undo = [attachment.add(self), *undo]
        self._attachment = attachment

    # What an `Attachment` asks of it

    @property
    def keywords(self) -> tuple[str, ...]:
        """Names of the keyword tensors, unique among everything that is attached."""
        return ()

    @property
    def unsaved(self) -> str:
        """What `save_pretrained` would lose, and what to do about it; empty if nothing."""
        return ""

    def keyword_tensors(self, _prompts: Prompts) -> dict[str, Tensor]:
        """Plans of prompts as keyword tensors, one row per prompt."""
        return {}

    @abstractmethod
    def before_call(self) -> Any:
        """Prepare for a call of the model; returns what `after_call` is given."""

    @abstractmethod
    def after_call(self, _token: Any) -> None:
        """Raise `ModelError` if the call did not do what it should have done."""


A = TypeVar("A", bound=Attachable)


class Attachment:
    """Everything attached to one model, and the `generate()` that carries its plans."""

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        self.attached: list[Attachable] = []
        self._undo = ExitStack()

    @classmethod
    def of(cls, model: CausalLM) -> Attachment:
        """Return the attachment of `model`, a new one if it has none."""
        attachment = model.__dict__.get(ATTRIBUTE)
        return attachment if isinstance(attachment, Attachment) else cls(model)

    def add(self, attachable: Attachable) -> Callable[[], None]:
        """Carry the plans of `attachable` from now on; returns the function that ends it."""
        self._set([*self.attached, attachable])
        return lambda: self._set([other for other in self.attached if other is not attachable])

    def __deepcopy__(self, _memo: object) -> Attachment:
        raise ModelError("A steered model cannot be copied: its generate() would be the original's. detach() first.")

    def _set(self, attached: list[Attachable]) -> None:
        """Override the methods of the model for `attached`, or restore them if it is empty."""
        self._undo.close()
        self.attached = attached
        if not attached:
            return
        names = [name for attachable in attached for name in attachable.keywords]
        self._undo.enter_context(accepting(self.model, names))
        self._undo.enter_context(overridden(self.model, "generate", self._generate(self.model.generate)))
        unsaved = " ".join(attachable.unsaved for attachable in attached if attachable.unsaved)
        if unsaved:
            self._undo.enter_context(overridden(self.model, "save_pretrained", functools.partial(_refuse, unsaved)))
        setattr(self.model, ATTRIBUTE, self)
        self._undo.callback(delattr, self.model, ATTRIBUTE)

    def _generate(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def generate(inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
            acting = [attachable for attachable in self.attached if attachable.enabled]
            names = [name for attachable in acting for name in attachable.keywords]
            if any(name in kwargs for name in names):  # a call that `generate()` makes of itself
                return original(inputs, *args, **kwargs)
            tokens = [attachable.before_call() for attachable in acting]
            plans = {}
            if names:
                prompts = generate_prompts(self.model, inputs, args, kwargs)
                plans = {
                    name: rows for attachable in acting for name, rows in attachable.keyword_tensors(prompts).items()
                }
            assistant = kwargs.get("assistant_model")
            with accepting(assistant, names) if assistant is not None else nullcontext():
                result = original(inputs, *args, **kwargs, **plans)
            for attachable, token in zip(acting, tokens, strict=True):
                if attachable not in self.attached:
                    name = type(attachable).__name__
                    raise ModelError(f"A {name} was detached while generate() ran: the end of its text is unsteered.")
                attachable.after_call(token)
            return result

        return generate


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
