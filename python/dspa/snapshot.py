"""Tensors that must stay as they are: the same objects, at the same place in memory, of the same version."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from dspa.errors import refusal


class Snapshot:
    """Tensors by name, as they were when this was made.

    Comparing reads no number, and waits for no device. It cannot see changes that leave a tensor's version as it is:
    through `.data` in place, through a NumPy array of the same memory, and of tensors that inference mode made.
    """

    def __init__(self, **tensors: Tensor) -> None:
        self._states = {name: _state(tensor) for name, tensor in tensors.items()}
        self._tensors = tensors
        # Memory that is held cannot become another tensor's.
        self._held = [tensor.detach() for tensor in tensors.values()]

    def changed(self, **tensors: Tensor) -> list[str]:
        """Return the names of the tensors that are others now, elsewhere, or changed."""
        return [
            name
            for name, tensor in tensors.items()
            if tensor is not self._tensors.get(name) or _state(tensor) != self._states[name]
        ]


def _state(tensor: Tensor) -> tuple[int, int]:
    # Tensors made in inference mode have no version.
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version


class Frozen(ABC):
    """An object that is known by a name or a check of its tensors, and refused once they are others.

    A subclass calls `_freeze()` when its tensors are made, and has `_tensors()`.
    """

    # What messages call it, and the class of their error.
    _kind: ClassVar[str]
    _error: ClassVar[type[Exception]]
    _made: Snapshot

    @abstractmethod
    def _tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name."""

    def _freeze(self) -> None:
        self._made = Snapshot(**self._tensors())

    @property
    def changed(self) -> list[str]:
        """Names of the tensors that were changed in place or replaced, as far as `Snapshot` sees it."""
        return self._made.changed(**self._tensors())

    def check_unchanged(self) -> None:
        """Raise if a tensor is among those `changed`."""
        if changed := self.changed:
            raise refusal(
                self._error,
                f"A tensor of the {self._kind}",
                f"changed ({', '.join(changed)}) after the {self._kind} was made, so that it is another one",
                f"what the {self._kind} was made with",
                f"Make a new {type(self).__name__} of the tensors.",
            )

    def __getstate__(self) -> dict[str, Any]:
        self.check_unchanged()
        return {name: value for name, value in vars(self).items() if name != "_made"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._freeze()
