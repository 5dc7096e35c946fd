"""Tensors that must stay as they are: the same objects, at the same place in memory, of the same version."""

from __future__ import annotations

from torch import Tensor


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
