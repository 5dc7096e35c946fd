"""Measures where `steer` is faster in CUDA than in Triton: `python -m bench.tuning.cuda`, after `bench.tuning.triton`.

It writes `dspa_kernels/cuda_table.json`. For each kernel, shape and precision, at a few numbers of rows, Triton's
launches with the parameters of the launch table and each kind of CUDA's are timed one after the other, from a cold
cache: on steps that read the whole encoder, and on steps with realistic activity. CUDA is entered up to the largest
number of rows at which, as at every smaller one, it is faster on the former and not slower on the latter. It is left
out where a result is not close to Triton's. Measurements are kept in `--state`, so that a run that was stopped
continues there.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch

from bench.harness.cases import KERNELS, LAUNCHES, SHAPES, Setting, check_rows, running
from bench.harness.measure import DEVICE, Stopwatch
from bench.tuning.triton import (
    BYTES,
    GAIN,
    Place,
    State,
    activity_for,
    as_text,
    merged,
    reason_of,
    setting_of,
    shape,
    stream_of,
)
from dspa_kernels import EncoderStream, launch
from dspa_kernels.launch import CudaEntry, capability_of, launch_parameters

VARIANTS = ("steer", "steer_topk", "steer_int8", "steer_topk_int8")
ROWS = (1, 2, 4, 6, 8)
TRITON, *CUDA = KERNELS

# Microseconds per step by kernel, for steps that read the whole encoder ("whole") and for realistic ones ("mean").
Times = dict[str, dict[str, float]]
Measured = Callable[[Place], Times | str | None]


def faster(times: Times) -> str | None:
    """The best kind of CUDA's launches that is faster on whole reads by more than noise and not slower otherwise."""
    whole, mean = times["whole"], times["mean"]
    better = [name for name in CUDA if whole[name] <= GAIN * whole[TRITON] and GAIN * mean[name] <= mean[TRITON]]
    return min(better, key=lambda name: whole[name], default=None)


def entries_of(places: Iterable[Place], capability: int, measured: Measured) -> list[CudaEntry]:
    """Entries of one kernel and shape, whose places are ordered by their rows."""
    entries: list[CudaEntry] = []
    for place in places:
        times = measured(place)
        best = faster(times) if isinstance(times, dict) else None
        if best is None:
            break
        # An entry serves all smaller numbers of rows, too.
        served = (place.kernel, place.precision, capability, place.rows, place.d_in, place.d_sae)
        entry = CudaEntry(*served, **LAUNCHES[best])
        if entries and replace(entries[-1], rows=entry.rows) == entry:
            entries.pop()
        entries.append(entry)
    return entries


def updated(entries: Iterable[CudaEntry], place: Place, capability: int, new: Iterable[CudaEntry]) -> list[CudaEntry]:
    """The table with new entries for the kernel and shape of `place`, instead of all old ones for them."""
    here = (place.kernel, place.precision, capability, place.d_in, place.d_sae)
    others = [e for e in entries if (e.kernel, e.precision, e.capability, e.d_in, e.d_sae) != here]
    return merged(others, new)


class Comparison:
    """Times the kernels at a place, unless the state has it or the time is over."""

    def __init__(self, state: State, until: float) -> None:
        self.state, self.until = state, until
        self.stopwatch = Stopwatch()

    def __call__(self, place: Place) -> Times | str | None:
        """Times, or the error; None where there was no time left."""
        parameters = launch_parameters(place.kernel, place.n_rows, place.d_in, place.d_sae, place.precision, DEVICE)
        entry = place.entry(parameters, capability_of(DEVICE))
        if self.state.of(entry) is None and time.monotonic() < self.until:
            self.state.add(entry, self.compared(place))
        result: Times | str | None = self.state.of(entry)
        print(place, "no time left" if result is None else result, flush=True)
        return result

    def compared(self, place: Place) -> Times | str:
        activity = activity_for(place.d_in, place.d_sae)
        setting = setting_of(place, activity)
        stream = stream_of(place, setting, activity)
        try:
            return {"whole": self.timed(setting.never_settled(activity), stream), "mean": self.timed(setting, stream)}
        except Exception as error:
            return reason_of(error)

    def timed(self, setting: Setting, stream: EncoderStream) -> dict[str, float]:
        """Microseconds per step by kernel. Raises where a result is not close to Triton's."""
        times, wanted = {}, None
        for name in KERNELS:
            with running(name) as backend:
                run = partial(setting.steer, stream=stream, backend=backend)
                out = setting.all_steps(stream=stream, backend=backend)
                wanted = out if wanted is None else wanted
                check_rows(out, wanted)
                times[name] = self.stopwatch.device(setting.steps(run)).median
        return times


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--precisions", nargs="+", type=int, choices=list(BYTES), default=[0])
    parser.add_argument("--shapes", nargs="+", type=shape, default=SHAPES, metavar="D_INxD_SAE")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop measuring after this long")
    parser.add_argument("--state", type=Path, default=Path("build/tune_cuda.json"), help="what has been measured")
    parser.add_argument("--launch-table", type=Path, default=launch.TABLE, help="Triton's parameters")
    parser.add_argument("--table", type=Path, default=launch.CUDA_TABLE, help="where the table is written")
    return parser.parse_args(arguments)


def main() -> int:
    chosen = parsed()
    if DEVICE.type != "cuda":
        print("bench.tuning.cuda needs a CUDA device, and torch finds none; the table is unchanged")
        return 2
    table, capability = list(launch.cuda_table()), capability_of(DEVICE)
    launch.table.cache_clear()
    with torch.no_grad(), mock.patch.object(launch, "TABLE", chosen.launch_table):
        measured = Comparison(State(chosen.state), time.monotonic() + chosen.seconds)
        for (d_in, d_sae), kernel, precision in itertools.product(chosen.shapes, chosen.kernels, chosen.precisions):
            if time.monotonic() > measured.until:
                print("the time is over: run again with the same --state to continue")
                break
            places = [Place(kernel, precision, rows, d_in, d_sae) for rows in ROWS]
            table = updated(table, places[0], capability, entries_of(places, capability, measured))
    chosen.table.write_text(as_text(table))
    print(f"{len(table)} entries written to {chosen.table}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
