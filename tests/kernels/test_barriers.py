"""Barrier words: which launches share one, and that a captured launch allocates nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dspa_kernels import barriers
from dspa_kernels.barriers import LINE, N_WORDS, GetCaptureInfo, barrier_word
from dspa_kernels.cuda_library import CudaError

DEVICE = torch.device("cuda", 0)


@dataclass
class Driver:
    """The current stream, the id of the capture in which it is, and the number of allocations."""

    stream: int = 0
    capture: int | None = None
    error: int = 0
    n_allocations: int = 0

    def word(self, stream: int = 0, capture: int | None = None, device: torch.device = DEVICE) -> Tensor:
        self.stream, self.capture = stream, capture
        return barrier_word(device)

    def allocate(self, _device: torch.device) -> list[Tensor]:
        self.n_allocations += 1
        return list(torch.zeros(N_WORDS, LINE, dtype=torch.int32))

    def get_capture_info(self, stream: Any, status: Any, capture: Any, graph: Any, nodes: Any, n_nodes: Any) -> int:
        assert (stream or 0, graph, nodes, n_nodes) == (self.stream, None, None, None)
        status[0], capture[0] = 1, self.capture
        return self.error


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    driver = Driver()
    get_capture_info = GetCaptureInfo(driver.get_capture_info)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: mock.Mock(cuda_stream=driver.stream))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: driver.capture is not None)
    monkeypatch.setattr(barriers, "_get_capture_info", lambda: get_capture_info)
    monkeypatch.setattr(barriers, "_allocate", driver.allocate)
    barriers._words_of.cache_clear()
    yield driver
    barriers._words_of.cache_clear()


class NoOperators(TorchDispatchMode):
    """Refuses every operator but views: a captured launch must not add one to its graph."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.is_view, f"{func} ran"
        return func(*args, **(kwargs or {}))


def test_captures_allocate_nothing_and_have_words_of_their_own(driver: Driver) -> None:
    first = driver.word()
    with NoOperators():
        words = [driver.word(stream=2**40 + 1, capture=2**40 + i) for i in range(200)]
    assert driver.n_allocations == 1
    addresses = {word.data_ptr() for word in (first, *words)}
    assert len(addresses) == 201 and not any(word.any() for word in words)
    assert min(b - a for a, b in zip(sorted(addresses), sorted(addresses)[1:], strict=False)) >= 128


def test_launches_that_run_in_order_share_a_word(driver: Driver) -> None:
    """Those of one stream, or of one stream in a capture, do; other streams, captures and devices have their own."""
    places = [(0, None), (1, None), (1, 7), (2, 7), (1, 8)]
    first = [driver.word(*place).data_ptr() for place in places]
    again = [driver.word(*place).data_ptr() for place in reversed(places)]
    assert first == again[::-1] and len(set(first)) == len(places)
    assert driver.word(0, None, torch.device("cuda", 1)).data_ptr() not in first and driver.n_allocations == 2


def test_launches_outside_of_captures_keep_half_of_the_words_free(driver: Driver) -> None:
    driver.word()
    for i in range(4 * N_WORDS):
        driver.word(stream=i // 100)
        driver.word(stream=1, capture=i)
    assert driver.n_allocations == 5


def test_a_capture_without_a_word_says_what_to_do(driver: Driver) -> None:
    with pytest.raises(CudaError, match=r"captured on cuda:0 and no barrier word is left.*Run one step outside"):
        driver.word(capture=1)
    driver.word()
    driver.word(capture=1)
    with pytest.raises(CudaError, match="no barrier word is left"):
        for capture in range(N_WORDS):
            driver.word(capture=capture)
    driver.word(capture=1)
    driver.word(stream=1)
    driver.word(capture=N_WORDS)


def test_an_error_of_the_driver_is_raised(driver: Driver) -> None:
    driver.word()
    driver.error = 906
    with pytest.raises(CudaError, match="cuStreamGetCaptureInfo_v2 failed with error 906"):
        driver.word(capture=1)


def test_threads_get_different_words(driver: Driver) -> None:
    words, start = barriers._words_of(DEVICE), threading.Barrier(8)

    def take(stream: int) -> set[int]:
        start.wait()
        return {words.word(stream, capture).data_ptr() for capture in (None, *range(100))}

    with ThreadPoolExecutor(8) as threads:
        assert len(set().union(*threads.map(take, range(8)))) == 8 * 101


def test_words_are_allocated_in_another_thread() -> None:
    """A mode of this thread sees nothing of it, and so the memory pool of a graph that it may be using gets none."""
    with NoOperators():
        words = barriers._allocate(torch.device("cpu"))
    assert len(words) == N_WORDS and not any(word.any() for word in words)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, to capture graphs")
def test_captures_of_a_device() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    words = [barrier_word(device).data_ptr()]
    for _ in range(3):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch.zeros(1, device=device)  # a graph must not be empty
            words += [barrier_word(device).data_ptr(), barrier_word(device).data_ptr()]
    assert words[1::2] == words[2::2] and len(set(words)) == 4
    assert not barrier_word(device).any()
