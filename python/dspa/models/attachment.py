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
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from dspa.errors import ModelError
from dspa.fsrl.adapter import FSRLAdapter
from dspa.models.layers import CausalLM, base_model
from dspa.models.prompts import Prompts, generate_prompts

ATTRIBUTE = "_dspa_attachment"


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


def check_attached(model: nn.Module, adapter: FSRLAdapter) -> None:
    """Raise unless the adapter acts on the model."""
    if adapter not in Attachment.of(base_model(model)).steerings:
        raise ModelError("The adapter is not attached to this model, where it would change nothing: attach it first.")
