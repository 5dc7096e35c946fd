"""Counters of what became of rows, apart for the calls that run at the same time."""

from __future__ import annotations

import torch
from torch import Tensor

from dspa.models.attachment import LOCK
from dspa_kernels import PATHS

# What the counters of `steer` count.
COUNTED = (*PATHS, "encoder_rows_read")


class Counters:
    """Tensors of counters, each lent to one call at a time.

    Calls one after the other get the same tensor, since a CUDA graph holds its address.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._all: list[Tensor] = []
        self._idle: list[Tensor] = []

    def borrow(self) -> Tensor:
        """Return a tensor that no other call has, [6] int64. It holds what earlier calls have counted."""
        with LOCK:
            if self._idle:
                return self._idle.pop()
        with torch.inference_mode(False):
            counters = torch.zeros(len(COUNTED), dtype=torch.int64, device=self._device)
        # Not guarded: a graph is not compiled anew for the tensor of another call.
        torch._dynamo.mark_static_address(counters, guard=False)
        with LOCK:
            self._all.append(counters)
        return counters

    def to(self, device: torch.device) -> Counters:
        """Return counters on another device, which begin with the same total."""
        moved = Counters(device)
        moved._all = [counters.to(device) for counters in self._all]
        return moved

    def give_back(self, counters: Tensor) -> None:
        """Lend a tensor to later calls."""
        with LOCK:
            self._idle.append(counters)

    def total(self) -> dict[str, int]:
        """Return the sums over all calls. Waits for the device."""
        totals = [0] * len(COUNTED)
        for counters in list(self._all):
            totals = [total + count for total, count in zip(totals, counters.tolist(), strict=True)]
        return dict(zip(COUNTED, totals, strict=True))
