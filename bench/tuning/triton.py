"""Measures launch parameters of the Triton kernels: `python -m bench.tuning.triton`.

It writes the best to `dspa_kernels/launch_table.json`. For each kernel, number of rows, shape and precision, candidates
are compiled in several processes. Those that fail, spill registers or give other bits than the present parameters (with
an adapter: other numbers) are dropped, and the rest are timed from a cold cache. Results are kept in `--state`, so that
a run that was stopped continues there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor
from tqdm import tqdm

from bench.harness.cases import SHAPES, Adapter, Setting
from bench.harness.measure import DEVICE, Step, Stopwatch, synchronize
from bench.ops.dense import widened
from dspa_kernels import EncoderStream, activation_counts, fsrl_residual, launch, sparse_encode
from dspa_kernels.launch import STEER_WARPS, Entry, Launch, Served, capability_of, launch_parameters
from dspa_kernels.testing import Activity, realistic_activity, same_bits, tensors

# Bytes per weight and per number of a row, by precision; the shared memory of a multiprocessor.
BYTES = {0: (2, 2), 1: (2, 4), 2: (4, 4)}
SHARED = 227 << 10
# With fewer bytes under way to a multiprocessor the memory is not busy.
IN_FLIGHT = 32 << 10
# Rows where an entry serves any number of them; steps timed together; latents of a trial; a gain that is not noise.
MANY_ROWS, N_STEPS, FEW_LATENTS, GAIN = 2048, 32, 1024, 0.98

AnyEntry = TypeVar("AnyEntry", bound=Served)


@dataclass(frozen=True)
class Place:
    """The launches that an entry of the table serves."""

    kernel: str
    precision: int
    rows: int | None
    d_in: int
    d_sae: int

    @property
    def n_rows(self) -> int:
        return self.rows or MANY_ROWS

    def entry(self, parameters: Launch, capability: int | None) -> Entry:
        return Entry(self.kernel, self.precision, capability, self.rows, self.d_in, self.d_sae, parameters)


def candidates(place: Place) -> list[Launch]:
    """Parameters that fit on a multiprocessor and keep the memory busy."""
    weight, row = BYTES[place.precision]
    shapes = ((4, 1), (4, 2), (4, 3), (8, 1), (8, 2))
    if place.kernel.startswith("steer"):
        shapes = tuple(shape for shape in shapes if shape[0] == STEER_WARPS)
    fitting = []
    for rows, latents, k, (warps, programs), stages in itertools.product(
        (place.rows,) if place.rows else (64, 128),
        (64, 128),
        (32, 64, 128, 256),
        shapes,
        (2, 3, 4, 5),
    ):
        shared = stages * k * (latents * weight + rows * row) * programs
        if shared <= SHARED and (stages - 1) * k * latents * weight * programs >= IN_FLIGHT:
            fitting.append(Launch(rows, latents, k, warps, stages, programs))
    return fitting


# The tables


def kind_of(entry: Served) -> tuple[Any, ...]:
    """The launches that an entry serves: two entries with the same ones replace each other."""
    return tuple(getattr(entry, name) for name in ("kernel", "precision", "capability", "rows", "d_in", "d_sae"))


def ordered(entries: Iterable[AnyEntry]) -> list[AnyEntry]:
    """The entries in the order in which the first that fits is used: those for a shape come before those for any shape,
    those for a capability before those for any, few rows before many."""
    entries = list(entries)
    kernels = list(dict.fromkeys(entry.kernel for entry in entries))

    def place(entry: Served) -> tuple[Any, ...]:
        shape = (entry.d_in is None, entry.d_in or 0, entry.d_sae is None, entry.d_sae or 0)
        rows = (entry.rows is None, entry.rows or 0)
        return kernels.index(entry.kernel), *shape, -(entry.capability or 0), entry.precision, *rows

    return sorted(entries, key=place)


def merged(entries: Iterable[AnyEntry], new: Iterable[AnyEntry]) -> list[AnyEntry]:
    """The table with new entries, which replace those for the same launches."""
    return ordered({kind_of(entry): entry for entry in (*entries, *new)}.values())


def as_text(entries: Iterable[Served]) -> str:
    """A table as it is stored, one entry per line."""
    lines = ",\n".join("  " + json.dumps(asdict(entry)) for entry in entries)
    return f"[\n{lines}\n]\n" if lines else "[\n]\n"


def anywhere(entry: Entry) -> Entry:
    """The entry for every shape."""
    return replace(entry, d_in=None, d_sae=None)


@contextmanager
def using(place: Place, parameters: Launch) -> Iterator[None]:
    """Within the context, launches of the place's kernel use these parameters, whatever their shape."""
    entry = replace(anywhere(place.entry(parameters, None)), rows=None)
    everything = (entry, *launch.table())
    launch_parameters.cache_clear()
    try:
        with mock.patch.object(launch, "table", lambda: everything):
            yield
    finally:
        launch_parameters.cache_clear()


# What is run


def setting_of(place: Place, activity: Activity) -> Setting:
    """Steps with realistic activity, in the place's precision and with its kind of SAE."""
    setting = Setting.of(activity, "hard", place.n_rows)
    setting = setting if place.precision == 0 else replace(setting, h=setting.h.float())
    setting = setting if place.precision < 2 else setting.with_sae(widened(setting.sae))
    return setting.ranked() if "topk" in place.kernel else setting


def stream_of(place: Place, setting: Setting, activity: Activity) -> EncoderStream:
    screened = "int8" in place.kernel
    return EncoderStream.of(setting.sae, screen="int8", mean=activity.mean) if screened else setting.sae.stream


def steps_of(place: Place, activity: Activity) -> list[Callable[[], Any]]:
    """Calls of the place's kernel in Triton, each with its own rows."""
    setting = setting_of(place, activity)
    if place.kernel == "encode":
        return [encoding(rows, setting, place.rows is None) for rows, _ in setting.batches()]
    if place.kernel.startswith("fsrl"):
        adapter = Adapter.of(activity)
        adapter = adapter._replace(W_a=adapter.W_a.to(setting.sae.encoder_rows.dtype))
        backward = place.kernel == "fsrl_backward"
        return [adapting(rows, setting, adapter, backward) for rows, _ in setting.batches()]
    setting, stream = setting.never_settled(activity), stream_of(place, setting, activity)
    return setting.steps(lambda h, rows: setting.steer(h, rows, stream=stream, backend="triton"))


def encoding(h: Tensor, setting: Setting, counted: bool) -> Callable[[], Any]:
    if not counted:
        return lambda: sparse_encode(h, setting.sae, capacity=256, backend="triton")
    sequences = torch.arange(len(h), dtype=torch.int32, device=h.device) // 300
    return lambda: activation_counts(h, setting.sae, sequences, 1 + len(h) // 300, backend="triton")


def adapting(h: Tensor, setting: Setting, adapter: Adapter, backward: bool) -> Callable[[], Any]:
    def forward() -> Any:
        return fsrl_residual(h, setting.sae, *adapter, backend="triton")

    def both() -> Any:
        with torch.enable_grad():
            leaves = [tensor.requires_grad_() for tensor in adapter]
            out, l1, _ = forward()
            return torch.autograd.grad((out, l1), leaves, (h, torch.ones_like(l1)))

    return both if backward else forward


def agree(place: Place, ours: Tensor, wanted: Tensor) -> bool:
    """Compare bits; for an adapter, whose sums over latents follow the tiles, up to rounding."""
    if not place.kernel.startswith("fsrl") or not wanted.is_floating_point():
        return same_bits(ours, wanted)
    most = float(wanted.float().abs().max())
    return torch.allclose(ours.float(), wanted.float(), rtol=1e-2, atol=1e-2 * most)


@lru_cache(maxsize=1)
def activity_for(d_in: int, d_sae: int) -> Activity:
    return realistic_activity(d_in, d_sae, N_STEPS * 64, device=DEVICE)


def trouble(place: Place, parameters: Launch) -> str:
    """Compile and run once, with few latents; returns what is wrong, empty if nothing is."""
    from triton.runtime.jit import JITFunction

    kernels, run = [], JITFunction.run

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernels.append(run(self, *args, **kwargs))
        return kernels[-1]

    try:
        with torch.no_grad(), using(place, parameters), mock.patch.object(JITFunction, "run", noted):
            steps_of(place, activity_for(place.d_in, FEW_LATENTS))[0]()
            synchronize()
    except Exception as error:
        return reason_of(error)
    spilled = max((getattr(kernel, "n_spills", 0) or 0 for kernel in kernels), default=0)
    return f"spills {spilled}" if spilled else ""


def reason_of(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}"


# Measuring


class State:
    """The results of entries: microseconds, one or several by name, or why an entry was dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    @staticmethod
    def name(entry: Entry) -> str:
        return json.dumps(asdict(entry))

    def add(self, entry: Entry, result: Any) -> None:
        self.known[self.name(entry)] = result
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.known, indent=1) + "\n")

    def of(self, entry: Entry) -> Any:
        return self.known.get(self.name(entry))


class Tuner:
    """Measures places one after the other, until the time is over."""

    def __init__(self, state: State, pool: ProcessPoolExecutor, until: float) -> None:
        self.state, self.pool, self.until = state, pool, until
        self.capability = capability_of(DEVICE)
        self.stopwatch = Stopwatch(rounds=5)
        self.tried: dict[Entry, str] = {}

    def tune(self, place: Place, activity: Activity) -> Entry | None:
        """The best entry of a place, if it is better than the table's."""
        present = launch_parameters(place.kernel, place.n_rows, place.d_in, place.d_sae, place.precision, DEVICE)
        entries = [place.entry(tried, self.capability) for tried in dict.fromkeys([present, *candidates(place)])]
        waiting = [entry for entry in entries if self.state.of(entry) is None]
        if waiting:
            self.drop_unfit(place, waiting)
            self.time(place, activity, present, [entry for entry in waiting if self.state.of(entry) is None])
        times = {entry: us for entry in entries if isinstance(us := self.state.of(entry), float)}
        best = min(times, key=lambda entry: times[entry], default=None)
        if best is None or entries[0] not in times or times[best] > GAIN * times[entries[0]]:
            return None
        return best

    def drop_unfit(self, place: Place, entries: Sequence[Entry]) -> None:
        """Try entries in other processes, once for all shapes. Compiled kernels stay in Triton's cache."""
        tasks = {
            self.pool.submit(trouble, place, entry.launch): entry
            for entry in entries
            if anywhere(entry) not in self.tried
        }
        for task in tqdm(as_completed(tasks), total=len(tasks), desc=f"try {place}", leave=False):
            self.tried[anywhere(tasks[task])] = str(task.exception() or task.result())
        for entry in entries:
            if wrong := self.tried[anywhere(entry)]:
                self.state.add(entry, wrong)

    def time(self, place: Place, activity: Activity, present: Launch, entries: Sequence[Entry]) -> None:
        steps = steps_of(place, activity)
        with using(place, present):
            wanted = [tensors(step()) for step in steps]
        for entry in tqdm(entries, desc=f"measure {place}", leave=False):
            if time.monotonic() > self.until:
                return
            with using(place, entry.launch):
                self.state.add(entry, self.timed(place, steps, wanted))

    def timed(self, place: Place, steps: Sequence[Step], wanted: Sequence[Sequence[Tensor]]) -> float | str:
        try:
            for step, results in zip(steps, wanted, strict=True):
                if not all(agree(place, *pair) for pair in zip(tensors(step()), results, strict=True)):
                    return "other numbers"
            return self.stopwatch.device(steps).median
        except Exception as error:
            return reason_of(error)


def places(kernels: Sequence[str], precisions: Sequence[int], shapes: Sequence[tuple[int, int]]) -> Iterator[Place]:
    """The places of all numbers of rows in the table, shape after shape."""
    for (d_in, d_sae), kernel, precision in itertools.product(shapes, kernels, precisions):
        numbers = {entry.rows for entry in launch.table() if (entry.kernel, entry.precision) == (kernel, precision)}
        for rows in sorted(numbers, key=lambda n: n or MANY_ROWS):
            yield Place(kernel, precision, rows, d_in, d_sae)


def shape(text: str) -> tuple[int, int]:
    d_in, d_sae = text.split("x")
    return int(d_in), int(d_sae)


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = list(dict.fromkeys(entry.kernel for entry in launch.table()))
    parser.add_argument("--kernels", nargs="+", choices=known, default=known)
    parser.add_argument("--precisions", nargs="+", type=int, choices=list(BYTES), default=[0])
    parser.add_argument("--shapes", nargs="+", type=shape, default=SHAPES, metavar="D_INxD_SAE")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop measuring after this long")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument("--state", type=Path, default=Path("build/tune.json"), help="what has been measured")
    parser.add_argument("--table", type=Path, default=launch.TABLE, help="where the table is written")
    return parser.parse_args(arguments)


def main() -> int:
    chosen = parsed()
    if DEVICE.type != "cuda":
        print("bench.tuning.triton needs a CUDA device, and torch finds none; the table is unchanged")
        return 2
    context = multiprocessing.get_context("spawn")
    better: list[Entry] = []
    with torch.no_grad(), ProcessPoolExecutor(chosen.workers, mp_context=context) as pool:
        tuner = Tuner(State(chosen.state), pool, time.monotonic() + chosen.seconds)
        for place in places(chosen.kernels, chosen.precisions, chosen.shapes):
            if time.monotonic() > tuner.until:
                print("the time is over: run again with the same --state to continue")
                break
            best = tuner.tune(place, activity_for(place.d_in, place.d_sae))
            if best is not None:
                better.append(best)
                print(f"{tuner.state.of(best):8.2f} us  {best}", flush=True)
    chosen.table.write_text(as_text(merged(launch.table(), better)))
    print(f"{len(better)} entries written to {chosen.table}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
