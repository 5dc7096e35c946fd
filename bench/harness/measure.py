"""Device time from a cold cache, eager wall time, and the ceilings of the machine.

The device time of a step is the difference of two CUDA graphs, divided by the number of steps: one empties the
second-level cache before each step, the other only empties it. So the time includes the cost of a launch inside a
graph, but neither the host nor the emptying. The cache is emptied by reads, so that nothing is left to be written back,
and memory is read again only when the cache cannot hold it any more. Without a GPU only wall time is measured.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS = 10
N_CHUNKS = 16

Step = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Microseconds per step over the rounds of a measurement."""

    median: float
    mean: float
    least: float
    most: float
    rounds: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Times:
        micro = [1e6 * second for second in seconds]
        return cls(statistics.median(micro), statistics.fmean(micro), min(micro), max(micro), len(micro))


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def captured(steps: Sequence[Step]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    return graph


def elapsed(run: Step) -> float:
    """Seconds on the device between two events around `run`."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return 1e-3 * start.elapsed_time(end)


def wall_seconds(run: Step, setup: Step, rounds: int, benchmark: Any = None) -> list[float]:
    """Seconds until the result of `run` is complete, per round and after `setup`; by pytest-benchmark if given."""

    def synchronised() -> None:
        run()
        synchronize()

    def prepare() -> None:
        setup()
        synchronize()

    if benchmark is not None:
        benchmark.pedantic(synchronised, setup=prepare, rounds=rounds, warmup_rounds=1)
        return list(benchmark.stats.stats.data)
    seconds = []
    for _ in range(rounds + 1):
        prepare()
        start = time.perf_counter()
        synchronised()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


class Stopwatch:
    """Measures on `DEVICE`, and holds the memory that empties its cache.

    Args:
        rounds: rounds of each measurement; by default ROUNDS, and of calls from Python at least one per step.
    """

    def __init__(self, rounds: int | None = None) -> None:
        self.rounds = rounds
        self._chunk = itertools.count()
        if DEVICE.type == "cuda":
            l2 = torch.cuda.get_device_properties(DEVICE).L2_cache_size
            self.memory = torch.rand(N_CHUNKS, max(l2 >> 20, 1) << 20, device=DEVICE)
        else:
            self.memory = torch.rand(1, 1 << 22)

    @cached_property
    def _fastest(self) -> tuple[float, Any]:
        """The read-only bandwidth in bytes per second, and the reader that reached it."""
        ways: list[Any] = [torch.sum]
        if DEVICE.type == "cuda":
            from bench.harness.read_triton import readers

            ways += readers()
        return max(((self._bandwidth(way), way) for way in ways), key=lambda pair: pair[0])

    def _bandwidth(self, read: Callable[[Tensor], object]) -> float:
        if DEVICE.type == "cuda":
            read(self.memory)
            seconds = [elapsed(lambda: read(self.memory)) for _ in range(5)]
        else:
            seconds = wall_seconds(lambda: read(self.memory), lambda: None, 3)
        return self.memory.nbytes / statistics.median(seconds)

    @property
    def read_bandwidth(self) -> float:
        """The fastest read of several GB (without a GPU of a few MB), in bytes per second."""
        return self._fastest[0]

    @property
    def reader(self) -> str:
        """The name of the reader that reached `read_bandwidth`."""
        return getattr(self._fastest[1], "__name__", None) or str(self._fastest[1])

    def read(self, x: Tensor) -> None:
        """Read `x` with the fastest reader."""
        self._fastest[1](x)

    @cached_property
    def matmul_rate(self) -> float:
        """Operations per second of a large bf16 product of random numbers."""
        n = 8192 if DEVICE.type == "cuda" else 256
        a, b = torch.randn(2, n, n, device=DEVICE).to(torch.bfloat16)
        torch.mm(a, b)
        times = [elapsed(lambda: torch.mm(a, b)) for _ in range(10)] if DEVICE.type == "cuda" else []
        times = times or wall_seconds(lambda: torch.mm(a, b), lambda: None, 3)
        return 2 * n**3 / statistics.median(times)

    def ceilings(self) -> dict[str, Any]:
        """Return the ceilings of the machine as a line of results."""
        return {
            "read_gb_s": 1e-9 * self.read_bandwidth,
            "reader": self.reader,
            "matmul_tflop_s": 1e-12 * self.matmul_rate,
        }

    def empty_cache(self) -> None:
        """Replace the contents of the second-level cache."""
        if DEVICE.type == "cuda":
            self.read(self.memory[next(self._chunk) % N_CHUNKS])

    def device(self, steps: Sequence[Step]) -> Times:
        """Mean device time of `steps`, which run in order, each from an empty cache."""
        for step in (self.empty_cache, *steps):
            step()
        synchronize()
        cold = captured([call for step in steps for call in (self.empty_cache, step)])
        idle = captured([self.empty_cache] * len(steps))
        for graph in (cold, idle):
            graph.replay()
        seconds = [(elapsed(cold.replay) - elapsed(idle.replay)) / len(steps) for _ in range(self.rounds or ROUNDS)]
        return Times.of(seconds)

    def wall(self, steps: Sequence[Step], benchmark: Any = None) -> Times:
        """Wall time of a step that Python calls, from an empty cache until it has finished."""
        rounds = self.rounds or max(ROUNDS, min(len(steps), 32))
        turn = itertools.cycle(steps)
        return Times.of(wall_seconds(lambda: next(turn)(), self.empty_cache, rounds, benchmark))
