"""Time and peak memory of a training step of `fsrl_residual`, forward and backward: `python -m bench.offline.fsrl`.

It is compared with the same formula in plain PyTorch, eager and under torch.compile. Each runs in a process of its own
on the same numbers, and the results have to agree. Activation memory is a step's peak above weights, inputs and the
gradients that it returns, as PyTorch's allocator counts it on a GPU, and for the whole process on a CPU.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.harness.machine import describe
from bench.harness.measure import DEVICE, synchronize
from dspa_kernels import SAEWeights, fsrl_residual

SHAPES = ((2304, 16_384), (2304, 65_536))
TOKENS, L0, L1 = 2048, 70, 2e-2
# The share of latents that is moved per token: all of them at the start of a training, few later on.
MOVED = {"all": 1.0, "1 %": 0.01}
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
AGREEMENT = 2e-2 if DEVICE.type == "cuda" else 1e-4


@dataclass(frozen=True)
class Case:
    """A shape, and the share of latents that the adapter moves (a name in `MOVED`)."""

    d_in: int
    d_sae: int
    tokens: int
    moved: str

    def tensors(self) -> tuple[SAEWeights, dict[str, Tensor]]:
        """Random weights of a JumpReLU SAE and of an adapter, with thresholds that give L0 and MOVED."""
        torch.manual_seed(0)

        def rows(scale: float) -> Tensor:
            return torch.empty(self.d_sae, self.d_in, device=DEVICE, dtype=DTYPE).normal_(std=scale)

        h = torch.empty(self.tokens, self.d_in, device=DEVICE, dtype=DTYPE).normal_()
        W_dec, W_a = rows(self.d_in**-0.5), rows(self.d_in**-0.5)
        normal = torch.distributions.Normal(0.0, 1.0)
        threshold = normal.icdf(torch.tensor(1 - L0 / self.d_sae)).item()
        moved = 1e-6 if MOVED[self.moved] == 1 else normal.icdf(torch.tensor(1 - MOVED[self.moved] / 2)).item()
        zeros = torch.zeros(self.d_sae, device=DEVICE)
        sae = SAEWeights(encoder_rows=W_dec, b_enc=zeros, threshold=zeros + threshold, W_dec=W_dec)
        adapter = {"W_a": W_a, "b_a": zeros.clone(), "threshold": zeros + moved}
        return sae, {"h": h, **{name: tensor.requires_grad_() for name, tensor in adapter.items()}}


def plain(h: Tensor, sae: SAEWeights, W_a: Tensor, b_a: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """The formula as written in PyTorch."""
    pre = h @ sae.W_enc + sae.b_enc.to(h.dtype)
    f = pre * (pre > sae.threshold)
    u = h @ W_a.T + b_a.to(h.dtype)
    v = u.sign() * (u.abs() - threshold.to(h.dtype)).relu()
    return h + ((f + v).relu() - f) @ sae.W_dec, v.abs().sum(dim=1)


def ours(h: Tensor, sae: SAEWeights, W_a: Tensor, b_a: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """`fsrl_residual` on the default backend."""
    return fsrl_residual(h, sae, W_a, b_a, threshold)[:2]


METHODS: dict[str, Callable[[], Any]] = {
    "fsrl_residual": lambda: ours,
    "PyTorch, eager": lambda: plain,
    "PyTorch, compiled": lambda: torch.compile(plain),
}


def held_bytes() -> int:
    """Memory in use; on a GPU, peaks count from here."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_bytes() -> int:
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


Step = Callable[[Tensor], tuple[Tensor, Tensor, tuple[Tensor, ...]]]


def step_of(case: Case, method: str) -> tuple[Step, Tensor]:
    """Return a step of rows, which gives the results and the gradients, and the rows."""
    sae, tensors = case.tensors()
    function, leaves = METHODS[method](), [tensor for tensor in tensors.values() if tensor.requires_grad]

    @torch.enable_grad()  # type: ignore[untyped-decorator]
    def step(h: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        steered, l1 = function(sae=sae, **tensors | {"h": h})
        grads = torch.full_like(steered, 1 / h.numel()), torch.full_like(l1, L1 / case.tokens)
        return steered, l1, torch.autograd.grad((steered, l1), leaves, grads)

    return step, tensors["h"]


def measure(case: Case, method: str, rounds: int, out: Path) -> None:
    """Write seconds per round, bytes of activations, and norms to compare; runs in a process of its own."""
    step, h = step_of(case, method)
    # Imports and compilation of the first call are not activations.
    step(h[:8])
    synchronize()
    loaded, seconds = held_bytes(), []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        steered, l1, grads = step(h)
        synchronize()
        seconds.append(time.perf_counter() - start)
        peak, gradients = peak_bytes(), sum(grad.nbytes for grad in grads)
        norms = [float(tensor.detach().norm()) for tensor in (steered, l1, *grads)]
        del steered, l1, grads
    # The first round compiles, and fills caches.
    result = {"seconds": seconds[1:], "activation_bytes": peak - loaded - gradients, "norms": norms}
    out.write_text(json.dumps(result))


# What a process runs; its arguments are those of `measure`.
MEASURE = """
import json, sys
from pathlib import Path
from bench.offline.fsrl import Case, measure

case, method, rounds, out = sys.argv[1:]
measure(Case(**json.loads(case)), method, int(rounds), Path(out))
"""


def measured(case: Case, method: str, rounds: int) -> dict[str, Any]:
    """The result of `measure` from another process."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        arguments = [json.dumps(asdict(case)), method, str(rounds), str(out)]
        subprocess.run([sys.executable, "-c", MEASURE, *arguments], check=True)
        result: dict[str, Any] = json.loads(out.read_text())
    return result


def check_norms(method: str, norms: list[float], wanted: list[float]) -> None:
    """Raise AssertionError where norms differ by more than rounding."""
    for ours, theirs in zip(norms, wanted, strict=True):
        assert abs(ours - theirs) <= AGREEMENT * abs(theirs), f"{method}: {ours} and not {theirs}"


def compare(case: Case, rounds: int) -> list[dict[str, Any]]:
    """Every method on one case. Raises where their numbers differ by more than rounding."""
    results: list[dict[str, Any]] = []
    for method in METHODS:
        results.append(asdict(case) | {"method": method} | measured(case, method, rounds))
        check_norms(method, results[-1]["norms"], results[0]["norms"])
    return results


def main(
    out: Annotated[Path | None, typer.Option(help="Write results here, as JSON.")] = None,
    tokens: Annotated[int, typer.Option(help="Rows per step.")] = TOKENS,
    rounds: Annotated[int, typer.Option(help="Steps that are timed, after one that is not.")] = 5,
    commit: Annotated[str, typer.Option(help="The commit that is measured, where git does not know it.")] = "",
) -> None:
    """Measure all methods at (2304, 16384) and (2304, 65536), with all and with few latents moved."""
    results = []
    for (d_in, d_sae), moved in ((shape, moved) for shape in SHAPES for moved in MOVED):
        results += compare(Case(d_in, d_sae, tokens, moved), rounds)
    where = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    table = Table(title=f"Forward and backward of {tokens} tokens, {str(DTYPE).removeprefix('torch.')}, on {where}")
    for column in ("SAE", "moved", "method", "ms", "ours is", "activations, MB", "of eager"):
        table.add_column(column, justify="left" if column in ("SAE", "moved", "method") else "right")
    for result in results:
        case = [r for r in results if all(r[name] == result[name] for name in ("d_in", "d_sae", "moved"))]
        best = {r["method"]: min(r["seconds"]) for r in case}
        memory = {r["method"]: r["activation_bytes"] for r in case}
        table.add_row(
            f"{result['d_in']} x {result['d_sae']}",
            result["moved"],
            result["method"],
            f"{1e3 * best[result['method']]:.2f}",
            f"{best[result['method']] / best['fsrl_residual']:.2f}x",
            f"{1e-6 * memory[result['method']]:.0f}",
            f"{memory[result['method']] / memory['PyTorch, eager']:.2f}",
        )
    Console().print(table)
    if out is not None:
        record = describe(commit) | {"threads": torch.get_num_threads(), "results": results}
        out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
