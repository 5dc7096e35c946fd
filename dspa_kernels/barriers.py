"""The barrier word on which the blocks of a cooperative launch wait for each other."""

from __future__ import annotations

import collections
import threading

import torch
from torch import Tensor

from dspa_kernels.weights import N_BARRIERS

_streams: dict[tuple[int | None, int], int] = {}
_captures: collections.Counter[int] = collections.Counter()
_lock = threading.Lock()


def barrier_of(barriers: Tensor) -> Tensor:
    """Return the barrier word of this launch, one of `EncoderStream.barriers`.

    Each stream has its own, because launches on two streams may run at the same time. Each captured launch has its own,
    because a graph may be replayed on any stream. If all are taken, a new one is allocated.
    """
    half = N_BARRIERS // 2
    if barriers.device.type != "cuda":
        return barriers[0]
    captured = torch.cuda.is_current_stream_capturing()
    with _lock:
        if captured:
            i = _captures[barriers.data_ptr()]
            _captures[barriers.data_ptr()] += 1
        else:
            stream = (barriers.device.index, torch.cuda.current_stream(barriers.device).cuda_stream)
            i = _streams.setdefault(stream, len(_streams))
    return barriers[half * captured + i] if i < half else torch.zeros_like(barriers[0])
