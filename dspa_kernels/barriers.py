"""The barrier words on which the blocks of cooperative launches wait for each other.

A launch leaves its word ready for the next one, so launches that run one after the other share a word, and launches
that may run at the same time need two. Each stream has a word. Each captured graph has others, one for each stream of
its capture, because it may be replayed on any stream. A graph that is instantiated twice must not be replayed twice at
the same time.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from ctypes import POINTER, c_int, c_uint64, c_void_p
from typing import Any

import torch
from torch import Tensor

from dspa_kernels.cuda_library import CudaError

# Words that are allocated together, each in a cache line of its own, and the int32 numbers of such a line.
N_WORDS, LINE = 1024, 32

# cuStreamGetCaptureInfo_v2, the same in CUDA 12 and 13: stream, status, id, graph, dependencies and their number.
GetCaptureInfo = ctypes.CFUNCTYPE(c_int, c_void_p, POINTER(c_int), POINTER(c_uint64), c_void_p, c_void_p, c_void_p)


class BarrierWords:
    """The barrier words of a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: list[Tensor] = []
        self._taken: dict[tuple[int, int | None], Tensor] = {}
        self._lock = threading.Lock()

    def word(self, stream: int, capture: int | None) -> Tensor:
        """Return the word of a stream, or of a stream in a capture.

        Raises:
            CudaError: no word is left for a capture, which cannot allocate any.
        """
        with self._lock:
            if capture is None and len(self._free) < N_WORDS // 2:
                self._free += _allocate(self._device)
            if (stream, capture) not in self._taken:
                if not self._free:
                    raise CudaError(
                        f"A launch was captured on {self._device} and no barrier word is left for it. Run one step "
                        "outside of the capture before: that allocates them."
                    )
                self._taken[stream, capture] = self._free.pop()
            return self._taken[stream, capture]


def barrier_word(device: torch.device) -> Tensor:
    """Return the barrier word of a launch on the current stream of `device`, one int32.

    It is 0 before the first launch. Later its sign may be set.

    Raises:
        CudaError: no word is left for a capture, which cannot allocate any.
    """
    if device.type != "cuda":
        return torch.zeros(1, dtype=torch.int32, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream
    return _words_of(device).word(stream, _capture_id(stream) if torch.cuda.is_current_stream_capturing() else None)


@functools.cache
def _words_of(device: torch.device) -> BarrierWords:
    return BarrierWords(device)


def _allocate(device: torch.device) -> list[Tensor]:
    """Allocate words that every stream sees as zeros."""

    # A copy from the host has ended when it returns, whatever stream it ran on.
    def copy_zeros() -> list[Tensor]:
        return list(torch.zeros(N_WORDS, LINE, dtype=torch.int32).to(device))

    # In another thread, because this one may be allocating from the memory pool of a graph.
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(copy_zeros).result()


@functools.cache
def _get_capture_info() -> Any:
    return GetCaptureInfo(("cuStreamGetCaptureInfo_v2", ctypes.CDLL("libcuda.so.1")))


def _capture_id(stream: int) -> int:
    """Return the id of the capture of a stream, unique in this process."""
    status, capture = c_int(), c_uint64()
    error = _get_capture_info()(stream, status, capture, None, None, None)
    if error:
        raise CudaError(f"cuStreamGetCaptureInfo_v2 failed with error {error}.")
    return capture.value
