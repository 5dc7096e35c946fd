"""Checks that only a GPU can run: `python -m bench.checks.stress`.

Graph replays, launches back to back, concurrent streams, compiled callers, batch invariance and equality from run to
run. Everything is compared to the last bit with plain eager calls of the same backend.
"""

from __future__ import annotations

import argparse
import itertools
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.harness.cases import KERNELS, SHAPES, Setting, activity_of, running
from bench.harness.measure import DEVICE
from dspa_kernels import activation_counts, sparse_decode, sparse_encode
from dspa_kernels.backends import IMPLEMENTED
from dspa_kernels.testing import Activity, same_bits, tensors

ROWS = (1, 8, 64)
BATCHES = (2, 3, 4, 8, 16, 17, 32, 33, 64, 65, 200)
CHAINED = 8

Steer = Callable[[Tensor, Tensor], Tensor]
Check = Callable[[], None]


def variants(activity: Activity, backend: str) -> dict[str, tuple[Setting, Steer]]:
    """Inputs and `steer` on a backend, for each of its variants by name."""
    hard = Setting.of(activity, "hard", 64)
    whole, ranked = hard.never_settled(activity), hard.ranked()
    screened = activity.stream(screen="int8")
    ranked_screened = type(screened).of(ranked.sae, screen="int8", mean=activity.mean)
    options: dict[str, tuple[Setting, dict[str, Any]]] = {
        "calibrated": (hard, {"stream": activity.stream()}),
        "int8": (hard, {"stream": screened}),
        "recorded": (hard, {"record": True}),
        "whole encoder": (whole, {}),
        "top-k": (ranked, {}),
        "top-k int8": (ranked, {"stream": ranked_screened}),
    }
    return {
        name: (setting, partial(setting.steer, backend=backend, **keywords))
        for name, (setting, keywords) in options.items()
    }


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


def graph_replays(setting: Setting, run: Steer, n_rows: int, replays: int) -> None:
    """Replay one graph with changing inputs."""
    graph, held, out = captured(setting, run, n_rows)
    for turn in range(replays):
        refill(held, inputs(setting, n_rows, turn))
        graph.replay()
        if turn % 50 == 0 or turn == replays - 1:
            equal(out, run(*held), f"replay {turn}")


def chain(run: Steer, h: Tensor, rows: Tensor, then: Check = lambda: None) -> Tensor:
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


def two_streams(first: tuple[Setting, Steer], second: tuple[Setting, Steer], n_rows: int, turns: int) -> None:
    """Launch from two streams at the same time, eagerly and by graphs."""
    sides = list(zip((first, second), (torch.cuda.Stream(), torch.cuda.Stream()), strict=True))
    graphs = [captured(setting, run, n_rows) for (setting, run), _ in sides]
    for start in range(0, turns, 20):
        torch.cuda.synchronize()
        results: list[list[Tensor]] = [[], []]
        for turn, (i, ((setting, run), stream)) in itertools.product(range(start, start + 20), enumerate(sides)):
            with torch.cuda.stream(stream):
                results[i].append(run(*inputs(setting, n_rows, turn)))
                graph, held, out = graphs[i]
                refill(held, inputs(setting, n_rows, turn))
                graph.replay()
                results[i].append(out.clone())
        torch.cuda.synchronize()
        for ((setting, run), _), outs in zip(sides, results, strict=True):
            for turn in range(start, start + 20):
                wanted = run(*inputs(setting, n_rows, turn))
                for out in outs[2 * (turn - start) : 2 * (turn - start) + 2]:
                    equal(out, wanted, f"turn {turn}")


def compiled(setting: Setting, run: Steer, n_rows: int) -> None:
    """Call from a graph of torch.compile, which CUDA graphs replay."""
    torch.compiler.reset()
    caller = torch.compile(lambda h, rows: 2 * run(h + h, rows), fullgraph=True, mode="reduce-overhead")
    for turn in range(60):
        h, rows = inputs(setting, n_rows, turn)
        torch.compiler.cudagraph_mark_step_begin()
        equal(caller(h, rows), 2 * run(h + h, rows), f"call {turn}")


def batch_invariance(setting: Setting, run: Steer) -> None:
    """Compare a row's result alone with its result in batches."""
    h, rows = setting.h, setting.rows
    alone = torch.cat([run(h[i : i + 1], rows[i : i + 1]) for i in range(min(64, len(h)))])
    for n in BATCHES:
        if n <= len(h):
            equal(run(h[:n], rows[:n])[: len(alone)], alone[:n], f"in a batch of {n}")


def run_to_run(run: Callable[[], Any], turns: int) -> None:
    first = tensors(run())
    for turn in range(turns):
        for ours, wanted in zip(tensors(run()), first, strict=True):
            assert same_bits(ours, wanted), f"run {turn} differs"


def other_ops(activity: Activity, backend: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    h, sae = activity.h[:1000], activity.sae
    sequences = torch.arange(len(h), dtype=torch.int32, device=h.device) // 90
    latents = sparse_encode(h[:64], sae, capacity=256, backend="reference")
    calls: dict[str, Callable[[], Any]] = {
        "activation_counts": lambda: activation_counts(h, sae, sequences, 12, backend=backend),
        "sparse_encode": lambda: sparse_encode(h[:64], sae, capacity=256, backend=backend),
        "sparse_decode": lambda: sparse_decode(latents, sae.W_dec, backend=backend),
    }
    return ((op, call) for op, call in calls.items() if (op, backend) in IMPLEMENTED)


def checks(backend: str, replays: int) -> Iterator[tuple[str, Check]]:
    """Names and checks: batch invariance and equality from run to run at all shapes, the rest at the first."""
    for shape in SHAPES:
        activity = activity_of(shape)
        of = variants(activity, backend)
        for name, (setting, run) in of.items():
            yield f"batch invariance {shape}, {name}", partial(batch_invariance, setting, run)
            call = partial(run, setting.h[:64], setting.rows[:64])
            yield f"run to run {shape}, {name}", partial(run_to_run, call, 100)
        for op, other in other_ops(activity, backend):
            yield f"run to run {shape}, {op}", partial(run_to_run, other, 30)
        if shape != SHAPES[0]:
            continue
        for (name, (setting, run)), n in itertools.product(of.items(), ROWS):
            yield f"{replays} replays, {name}, {n} rows", partial(graph_replays, setting, run, n, replays)
            yield f"chained, {name}, {n} rows", partial(chained, setting, run, n, 200)
        for (a, b), n in itertools.product((("calibrated", "int8"), ("whole encoder", "top-k")), ROWS):
            yield f"two streams, {a} and {b}, {n} rows", partial(two_streams, of[a], of[b], n, 1000)
        for name, (setting, run) in of.items():
            yield f"compiled, {name}", partial(compiled, setting, run, 8)


def passes(name: str, check: Check) -> bool:
    """Run a check, and print its result."""
    start, passed = time.perf_counter(), True
    try:
        check()
        torch.cuda.synchronize()
    except Exception:
        passed = False
        traceback.print_exc(limit=-3)
    print(f"{'passed' if passed else 'FAILED'} {name}, {time.perf_counter() - start:.1f} s", flush=True)
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replays", type=int, default=10000)
    parser.add_argument("--backends", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--only", default="", help="run the checks whose name contains this")
    chosen = parser.parse_args()
    if DEVICE.type != "cuda":
        print("bench.checks.stress needs a CUDA device, and torch finds none")
        return 2
    failed = []
    for kernel in chosen.backends:
        with torch.no_grad(), running(kernel) as backend:
            named = ((f"{kernel}, {name}", check) for name, check in checks(backend, chosen.replays))
            failed += [name for name, check in named if chosen.only in name and not passes(name, check)]
    print(f"stress: {len(failed)} failed" + "".join(f"\n  {name}" for name in failed))
    return min(len(failed), 1)


if __name__ == "__main__":
    raise SystemExit(main())
