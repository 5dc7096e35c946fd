"""Launch parameters of `steer`: what is measured, and what the results say: `python -m bench.tuning FILE...`.

It prints candidates that are faster than the launch table's parameters, and enters in dspa_kernels/cuda_table.json
where CUDA is faster than Triton. The files hold results of one GPU, of the stages `stream`, `mean` and `tune`.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from bench import report
from bench.harness import results
from bench.harness.cases import LAUNCHES, ROWS, SCREEN, Case, Shape
from bench.harness.measure import DEVICE
from bench.ops import steer
from dspa_kernels import launch
from dspa_kernels.launch import NATIVE, CudaEntry, Launch, launch_parameters

# Bytes of a number of 16 bits, and of the shared memory of a multiprocessor.
NUMBER, SHARED = 2, 227 << 10
MOST_STAGES = 6
# A gain that is not noise.
GAIN = 0.98
# The cases that decide whether CUDA is entered: it has to be faster in the first, and not slower in the others. An
# entry of `steer` serves its variants, too, but those of a variant come first.
SCREENED = f"hard, {SCREEN}"
VARIANTS = {f"steer+{SCREEN}": (SCREENED,), "steer": ("stream", "hard", SCREENED)}


def candidates(present: Launch) -> list[Launch]:
    """The present parameters, and others with the same rows and step along d_in, so that they give the same bits."""
    launches = [present]
    for latents in (64, 128):
        stage = present.BLOCK_K * (latents + present.BLOCK_N) * NUMBER
        most = min(MOST_STAGES, SHARED // stage)
        launches += [replace(present, BLOCK_L=latents, num_stages=n, programs=1) for n in (most, most - 1)]
    return list(dict.fromkeys(launches))


def cases(shape: Shape) -> Iterator[Case]:
    """Steps that read the whole encoder, with candidates for each tile of rows."""
    for rows in (n for n in (1, 32, 64) if n in ROWS):
        present = launch_parameters("steer", rows, *shape, NATIVE, DEVICE)
        for parameters, case in itertools.product(
            candidates(present), steer.cases(["stream"], ["triton"], shape, [rows])
        ):
            yield replace(case, launch=parameters)


Times = dict[tuple[Any, ...], float]


def faster(times: Times, variant: str, shape: Shape, rows: int) -> str | None:
    """The best kind of CUDA's launches that is faster than Triton where the variant has to be, and slower nowhere."""
    first, *others = VARIANTS[variant]

    def of(name: str, kernel: str) -> float:
        return times.get(("steer", shape, rows, name, kernel), float("nan"))

    better = [
        kernel
        for kernel in LAUNCHES
        if of(first, kernel) <= GAIN * of(first, "triton")
        and all(GAIN * of(name, kernel) <= of(name, "triton") for name in others)
    ]
    return min(better, key=lambda kernel: of(first, kernel), default=None)


def cuda_entries(times: Times, capability: int) -> list[CudaEntry]:
    """Entries up to the largest number of rows at which, as at every smaller one, CUDA is faster."""
    entries: list[CudaEntry] = []
    shapes = sorted({shape for op, shape, *_ in times if op == "steer"})
    for variant, shape in itertools.product(VARIANTS, shapes):
        numbers = sorted({rows for op, of, rows, name, _ in times if (of, name) == (shape, VARIANTS[variant][-1])})
        for rows, best in ((rows, faster(times, variant, shape, rows)) for rows in numbers):
            if best is None:
                break
            # An entry serves all smaller numbers of rows, too.
            entry = CudaEntry(variant, NATIVE, capability, rows, *shape, **LAUNCHES[best])
            if entries and replace(entries[-1], rows=rows) == entry:
                entries.pop()
            entries.append(entry)
    return entries


def updated(table: Iterable[CudaEntry], new: Sequence[CudaEntry]) -> list[CudaEntry]:
    """The table with new entries instead of the old ones of their capabilities."""
    capabilities = {entry.capability for entry in new}
    return [*(entry for entry in table if entry.capability not in capabilities), *new]


def as_text(entries: Iterable[CudaEntry]) -> str:
    """The table as it is stored, one entry per line."""
    lines = ",\n".join("  " + json.dumps(asdict(entry)) for entry in entries)
    return f"[\n{lines}\n]\n" if lines else "[\n]\n"


def better_launches(lines: Iterable[dict[str, Any]]) -> list[str]:
    """List changes of the launch table: per number of rows, the best candidate if it is faster by more than noise."""
    by_rows: dict[int, list[tuple[float, dict[str, Any]]]] = {}
    for line in lines:
        if "launch" in line and report.is_timed(line):
            by_rows.setdefault(line["rows"], []).append((report.micro(line), line["launch"]))
    changes = []
    for rows, measured in by_rows.items():
        present, best = measured[0], min(measured, key=lambda pair: pair[0])
        if best[0] <= GAIN * present[0]:
            changes.append(f"{rows} rows: {best[0]:.2f} us with {best[1]}, {present[0]:.2f} us with {present[1]}")
    return changes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=results.existing, nargs="+", help="files of results")
    runs = [run for file in parser.parse_args().files for run in results.runs(file) if run["device"] != "cpu"]
    if not runs:
        print("no run on a GPU: no launch parameters are proposed, and the CUDA table stays as it is")
    times: Times = {}
    for run in runs:
        print(*better_launches(run["lines"]), sep="\n")
        times |= {report.name_of(line): report.micro(line) for line in run["lines"] if report.is_timed(line)}
    for capability in {10 * run["capability"][0] + run["capability"][1] for run in runs}:
        entries = updated(launch.cuda_table(), cuda_entries(times, capability))
        launch.CUDA_TABLE.write_text(as_text(entries))
        print(f"{len(entries)} entries in {launch.CUDA_TABLE}")


if __name__ == "__main__":
    main()
