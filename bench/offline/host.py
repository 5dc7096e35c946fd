"""Host time of an eager decoding step: `python -m bench.offline.host`.

CPU time of the calling thread for `dspa_kernels.steer` and for the hook of `dspa.Steering` around it, with a backend
that computes nothing: it returns the same results each time. So it is the time of checks, of the dispatch and of what
the hook does, without that of the kernel's launcher. On a CPU, it is also without the guard of the current device.
"""

from __future__ import annotations

import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated
from unittest import mock

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.harness.machine import describe
from bench.harness.measure import DEVICE
from dspa import Steering, SteeringConfig
from dspa.testing import D_IN, D_SAE_IN, D_SAE_OUT, L_IN, L_OUT, make_map, make_model, make_sae
from dspa_kernels import SteeringPlan, backends, steer

BATCHES = (1, 64)
CALLS, ROUNDS = 200, 51


def micros(call: Callable[[], object]) -> float:
    """Microseconds of CPU time per call, the median of rounds."""
    rounds = []
    for _ in range(ROUNDS):
        start = time.thread_time()
        for _ in range(CALLS):
            call()
        rounds.append(1e6 * (time.thread_time() - start) / CALLS)
    return statistics.median(rounds)


def steps(steering: Steering, layer: torch.nn.Module, n: int) -> dict[str, Callable[[], object]]:
    """A step of `n` rows, by name: the op with more and more arguments, and the hook of the layer."""
    h = torch.randn(n, 1, D_IN, device=DEVICE)
    config, sae, cdmap, stream = steering.config, steering.sae_out.weights, steering._weights, steering._stream
    slots = torch.zeros(n, 2 * config.k_diff, dtype=torch.int32, device=DEVICE)
    plan = SteeringPlan(slots=slots, signs=torch.ones_like(slots, dtype=torch.int8))
    positions, start = torch.full((n, 1), 9, device=DEVICE), torch.full((n,), 3, device=DEVICE)
    gate = {"positions": positions.flatten(), "start": start}
    rows = torch.arange(n, dtype=torch.int32, device=DEVICE)
    call = steering._new_call()
    values = (plan.slots, plan.signs, start, call)
    kwargs = dict(zip(steering.keywords, values, strict=True)) | {"position_ids": positions}
    inputs = (h[:, 0], sae, cdmap, plan)
    return {
        "steer": lambda: steer(*inputs, stream=stream),
        "steer, default stream": lambda: steer(*inputs),
        "steer, rows": lambda: steer(*inputs, rows, stream=stream),
        "steer, positions": lambda: steer(*inputs, stream=stream, **gate),
        "steer, positions and paths": lambda: steer(*inputs, stream=stream, paths=call.counters, **gate),
        "hook": lambda: steering._change_output(layer, (), kwargs, h),
    }


@functools.cache
def results_of(n: int) -> tuple[Tensor, ...]:
    """The same results for each step of `n` rows."""
    return (torch.zeros(n, D_IN, device=DEVICE), *(torch.zeros(0, device=DEVICE) for _ in range(3)))


def nothing(_op: str, _backend: str) -> Callable[..., tuple[Tensor, ...]]:
    """The implementation of a backend that computes nothing."""
    return lambda h, **_: results_of(h.shape[0])


def main(out: Annotated[Path | None, typer.Option(help="Write results here, as JSON.")] = None) -> None:
    """Time each step at each batch size."""
    sae_in, sae_out = make_sae(L_IN, D_SAE_IN, seed=1), make_sae(L_OUT, D_SAE_OUT, seed=2)
    model = make_model("gemma2").to(DEVICE)
    results = []
    steering = Steering(sae_in, sae_out, make_map(sae_in, sae_out), SteeringConfig(k_diff=8))
    with (
        mock.patch.object(backends, "implementation", nothing),
        torch.no_grad(),
        steering.attach(model),
    ):
        layer = model.model.layers[L_OUT]
        for n in BATCHES:
            named = steps(steering, layer, n)
            results += [{"step": name, "rows": n, "micros": micros(step)} for name, step in named.items()]
    table = Table("step", *(f"{n} rows, us" for n in BATCHES))
    for name in dict.fromkeys(result["step"] for result in results):
        table.add_row(name, *(f"{result['micros']:.1f}" for result in results if result["step"] == name))
    Console().print(table)
    if out is not None:
        out.write_text(json.dumps(describe("") | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
