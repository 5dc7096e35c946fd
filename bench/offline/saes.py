"""An SAE on the CPU compared with SAELens': `python -m bench.offline.saes`.

Times of `FusedSAE`, of a copy of the SAELens SAE that went through `fuse`, and of that SAE itself, in turn in one run,
each the least of many rounds. Other programs of the machine only lengthen a round. Rows are standard normal, and
thresholds are such that as many latents are active as `L0`.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.harness.machine import describe
from dspa_kernels import fuse
from dspa_kernels.nn import FusedSAE

ARCHITECTURES = ("jumprelu", "topk")
DTYPES = ("float32", "bfloat16")
ROWS, WIDTHS, LATENTS = (1, 64, 2048), (576, 2304), (512, 4096, 16_384, 65_536)
OURS = ("FusedSAE", "fuse")
L0 = 64
SECONDS, LEAST_ROUNDS, MOST_ROUNDS = 0.6, 3, 400


def sae_lens_sae(arch: str, d_in: int, d_sae: int, dtype: str) -> Any:
    """A SAELens SAE with random weights."""
    import sae_lens

    name, options = {"jumprelu": ("JumpReLU", {}), "topk": ("TopK", {"k": L0})}[arch]
    config = getattr(sae_lens, f"{name}SAEConfig")(d_in, d_sae, dtype, apply_b_dec_to_input=False, **options)
    sae = getattr(sae_lens, f"{name}SAE")(config)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        sae.W_enc.copy_(torch.randn(d_in, d_sae, generator=g) / d_in**0.5)
        if arch == "jumprelu":
            sae.threshold.fill_(torch.special.ndtri(torch.tensor(1 - L0 / d_sae)))
    return sae


def least_micros(calls: dict[str, Callable[[], object]]) -> tuple[dict[str, float], int]:
    """The least microseconds of each call, in rounds of all of them, and the number of rounds."""
    seconds = {name: float("inf") for name in calls}
    for call in calls.values():
        call()
    end, rounds = time.perf_counter() + SECONDS * len(calls), 0
    while rounds < LEAST_ROUNDS or (time.perf_counter() < end and rounds < MOST_ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
        rounds += 1
    return {name: 1e6 * value for name, value in seconds.items()}, rounds


def compared(arch: str, dtype: str, d_in: int, d_sae: int, rows: Sequence[int]) -> list[dict[str, Any]]:
    """The calls of one SAE at each number of rows."""
    theirs = sae_lens_sae(arch, d_in, d_sae, dtype)
    saes = {"FusedSAE": FusedSAE.from_sae_lens(theirs), "fuse": fuse(copy.deepcopy(theirs)), "SAELens": theirs}
    results = []
    for n in rows:
        x = torch.randn(n, d_in, generator=torch.Generator().manual_seed(n)).to(theirs.dtype)
        f = theirs.encode(x)
        for name in OURS:
            check(saes[name].encode(x), f)
        for call, argument in {"encode": x, "decode": f, "forward": x}.items():
            calls = {name: functools.partial(getattr(sae, call), argument) for name, sae in saes.items()}
            micros, rounds = least_micros(calls)
            case = {"arch": arch, "dtype": dtype, "d_in": d_in, "d_sae": d_sae, "rows": n, "call": call}
            ratios = {name: micros[name] / micros["SAELens"] for name in OURS}
            l0 = float(f.count_nonzero()) / n
            results.append(case | {"micros": micros, "ratios": ratios, "rounds": rounds, "l0": l0})
    return results


def check(ours: Tensor, theirs: Tensor) -> None:
    """Raise unless the latents are the same, but for those at the threshold."""
    n_others = int(((ours > 0) != (theirs > 0)).sum())
    assert n_others <= 1 + ours.numel() / 1000, "the latents differ"


def main(
    out: Annotated[Path | None, typer.Option(help="Write results here, as JSON.")] = None,
    arch: Annotated[list[str] | None, typer.Option(help="Architectures.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Dtypes of the SAEs.")] = None,
    d_in: Annotated[list[int] | None, typer.Option(help="Widths of the rows.")] = None,
    d_sae: Annotated[list[int] | None, typer.Option(help="Numbers of latents.")] = None,
    rows: Annotated[list[int] | None, typer.Option(help="Numbers of rows.")] = None,
    threads: Annotated[int, typer.Option(help="Threads of PyTorch.")] = 1,
) -> None:
    """Time each call at each size, by default all."""
    torch.set_num_threads(threads)
    results: list[dict[str, Any]] = []
    with torch.no_grad():
        sizes = (d_in or WIDTHS, d_sae or LATENTS)
        for case in itertools.product(arch or ARCHITECTURES, dtype or DTYPES, *sizes):
            results += compared(*case, rows or ROWS)
            if out is not None:
                out.write_text(json.dumps(describe("") | {"threads": threads, "results": results}, indent=1) + "\n")
    table = Table("SAE", "dtype", "rows", "call", "SAELens, us", *(f"{name}, relative" for name in OURS))
    for r in results:
        sae = f"{r['arch']} {r['d_in']} x {r['d_sae']}"
        times = (f"{r['micros']['SAELens']:.0f}", *(f"{ratio:.2f}" for ratio in r["ratios"].values()))
        table.add_row(sae, r["dtype"], str(r["rows"]), r["call"], *times)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
