"""Cases that are checked and not timed: the bits of a row in any batch, graph replays, streams.

Everything is compared to the last bit with plain eager calls of the same backend.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from bench.harness.cases import ON_GPU, SCREEN, Case, Setting, Shape, Steps, activity_of
from dspa_kernels import BackendError, EncoderStream
from dspa_kernels.testing import same_bits

ROWS = (1, 8, 64) if ON_GPU else (1, 4)
BATCHES = (2, 3, 4, 8, 16, 17, 32, 33, 64, 65, 200)
CHAINED = 8
# Launches that differ in what they compile, and those of them that are also replayed and chained.
VARIANTS = ("whole encoder", "calibrated", SCREEN, "recorded", "top-k", f"top-k {SCREEN}", "fp32 rows", "fp16")
REPLAYED = VARIANTS[:3]

# `Setting.steer` on a backend.
Steer = Callable[..., Tensor]


@lru_cache(maxsize=len(VARIANTS))
def variant(shape: Shape, name: str) -> tuple[Setting, dict[str, Any]]:
    """Inputs and options of `steer`."""
    activity = activity_of(shape)
    hard = Setting.of(activity, "hard", max(ROWS))
    whole, ranked = hard.never_settled(activity), hard.ranked()
    half = replace(hard.sae, encoder_rows=hard.sae.encoder_rows.half(), W_dec=hard.sae.W_dec.half())
    screened = partial(EncoderStream.of, screen=SCREEN, mean=activity.mean)
    made: dict[str, Callable[[], tuple[Setting, dict[str, Any]]]] = {
        "whole encoder": lambda: (whole, {}),
        "calibrated": lambda: (hard, {"stream": activity.stream()}),
        SCREEN: lambda: (hard, {"stream": activity.stream(screen=SCREEN)}),
        "recorded": lambda: (hard, {"record": True}),
        "top-k": lambda: (ranked, {}),
        f"top-k {SCREEN}": lambda: (ranked, {"stream": screened(ranked.sae)}),
        "fp32 rows": lambda: (replace(whole, h=whole.h.float()), {}),
        "fp16": lambda: (replace(hard, h=hard.h.half()).with_sae(half), {}),
    }
    return made[name]()


def inputs(setting: Setting, n_rows: int, turn: int) -> tuple[Tensor, Tensor]:
    """Rows of a turn, different from those of other turns."""
    first = 37 * turn % (len(setting.h) - n_rows + 1)
    return setting.h[first : first + n_rows], setting.rows[first : first + n_rows]


def equal(ours: Tensor, wanted: Tensor, what: str) -> None:
    if not same_bits(ours, wanted):
        different = (ours != wanted).flatten(1).any(dim=1).nonzero().flatten().tolist()
        raise AssertionError(f"{what}: rows {different[:8]} differ")


def captured(setting: Setting, run: Steer, n_rows: int) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, Tensor], Tensor]:
    """A graph of one call, the tensors that it reads, and the tensor that it writes."""
    held = tuple(tensor.clone() for tensor in inputs(setting, n_rows, 0))
    h, rows = held
    run(h, rows)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(h, rows)
    return graph, (h, rows), out


def refill(held: Sequence[Tensor], new: Sequence[Tensor]) -> None:
    for old, tensor in zip(held, new, strict=True):
        old.copy_(tensor)


def graph_replays(setting: Setting, run: Steer, n_rows: int, turns: int) -> None:
    """Replay one graph with changing inputs."""
    graph, held, out = captured(setting, run, n_rows)
    for turn in range(turns):
        refill(held, inputs(setting, n_rows, turn))
        graph.replay()
        if turn % 50 == 0 or turn == turns - 1:
            equal(out, run(*held), f"replay {turn}")


def chain(run: Steer, h: Tensor, rows: Tensor, then: Callable[[], None] = lambda: None) -> Tensor:
    """Launch back to back, each on the result of the one before."""
    for _ in range(CHAINED):
        h = run(h, rows)
        then()
    return h


def chained(setting: Setting, run: Steer, n_rows: int, turns: int) -> None:
    """Compare such launches, eager and in a graph, with those that wait for each other."""
    h, rows = inputs(setting, n_rows, 0)
    wanted = chain(run, h, rows, torch.cuda.synchronize)
    graph, _, out = captured(setting, partial(chain, run), n_rows)
    for turn in range(turns):
        graph.replay()
        equal(out, wanted, f"replay {turn}")
        equal(chain(run, h, rows), wanted, f"turn {turn}")


def two_streams(setting: Setting, run: Steer, n_rows: int, turns: int) -> None:
    """Launch on one `EncoderStream` from two streams of the device at the same time, eagerly and by graphs."""
    sides = [(torch.cuda.Stream(), captured(setting, run, n_rows)) for _ in range(2)]
    for start in range(0, turns, 20):
        torch.cuda.synchronize()
        results: list[tuple[int, Tensor]] = []
        for turn, (stream, (graph, held, out)) in itertools.product(range(start, start + 20), sides):
            with torch.cuda.stream(stream):
                results.append((turn, run(*inputs(setting, n_rows, turn))))
                refill(held, inputs(setting, n_rows, turn))
                graph.replay()
                results.append((turn, out.clone()))
        torch.cuda.synchronize()
        for turn, result in results:
            equal(result, run(*inputs(setting, n_rows, turn)), f"turn {turn}")


def fresh_weights(setting: Setting, run: Steer, n_rows: int, turns: int) -> None:
    """Steer with a new stream of weights that the launch before has just written."""
    h, rows = inputs(setting, n_rows, 0)
    for turn in range(turns // 10):
        rolled = setting.sae.encoder_rows.roll(turn, dims=0)
        stream = EncoderStream.of(replace(setting.sae, encoder_rows=rolled))
        at_once = run(h, rows, stream=stream)
        torch.cuda.synchronize()
        equal(at_once, run(h, rows, stream=stream), f"turn {turn}")


def compiled(setting: Setting, run: Steer, n_rows: int, turns: int) -> None:
    """Call from a graph of torch.compile, which CUDA graphs replay."""
    torch.compiler.reset()
    caller = torch.compile(lambda h, rows: 2 * run(h + h, rows), fullgraph=True, mode="reduce-overhead")
    for turn in range(turns):
        h, rows = inputs(setting, n_rows, turn)
        torch.compiler.cudagraph_mark_step_begin()
        equal(caller(h, rows), 2 * run(h + h, rows), f"call {turn}")


def batches(setting: Setting, run: Steer, _n_rows: int, _turns: int) -> None:
    """Compare a row's result alone with its result in batches."""
    h, rows = setting.h, setting.rows
    alone = torch.cat([run(h[i : i + 1], rows[i : i + 1]) for i in range(min(max(ROWS), len(h)))])
    for n in (n for n in BATCHES if n <= len(h)):
        try:
            together = run(h[:n], rows[:n])
        except BackendError:
            # The backend takes fewer rows.
            break
        equal(together[: len(alone)], alone[:n], f"in a batch of {n}")


def run_to_run(setting: Setting, run: Steer, n_rows: int, turns: int) -> None:
    h, rows = inputs(setting, n_rows, 0)
    first = run(h, rows)
    for turn in range(turns):
        equal(run(h, rows), first, f"run {turn}")


CHECKS = {
    check.__name__.replace("_", " "): check
    for check in (batches, run_to_run, graph_replays, chained, two_streams, fresh_weights, compiled)
}


def prepare(case: Case, backend: str, turns: int) -> Steps:
    """Steps of a case "check, variant", of which the first shows what is compiled."""
    check, _, name = case.name.partition(", ")
    setting, options = variant(case.shape, name)
    run = partial(setting.steer, backend=backend, **options)
    call = partial(run, *inputs(setting, case.rows, 0))
    return Steps([call], partial(CHECKS[check], setting, run, case.rows, turns))


def cases(backends: Iterable[str], shape: Shape, turns: int, *, thorough: bool = False) -> Iterator[Case]:
    """All checks, with as many turns. Of those without a GPU, what is only about bits."""
    of: list[tuple[str, Sequence[str], Sequence[int]]] = [("batches", VARIANTS, ROWS[:1])]
    if ON_GPU:
        of += [("run to run", VARIANTS, ROWS[-1:])]
        of += [(check, VARIANTS if thorough else REPLAYED, ROWS) for check in ("graph replays", "chained")]
        of += [("two streams", REPLAYED, ROWS), ("fresh weights", REPLAYED[:1], ROWS[:1])]
        of += [("compiled", REPLAYED, ROWS[1:2])] if thorough else []
    for backend, (check, names, numbers) in itertools.product(tuple(backends), of):
        for name, n_rows in itertools.product(names, numbers):
            yield Case("steer", f"{check}, {name}", backend, shape, n_rows, partial(prepare, turns=turns))
