"""Writes what is said of GPUs from the results in bench/results: `python -m bench.report`.

README.md says between markers which backends have run on which GPU, docs/benchmarks.md has the newest times, and
`dspa info` reads dspa_kernels/gpu_runs.json, which is part of the installed package, as bench/results is not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
README, BENCHMARKS = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
GPU_RUNS = ROOT / "dspa_kernels" / "gpu_runs.json"
NO_TABLE = "No result of a GPU is recorded yet, so there is no table here."
NO_RUN = "not yet"
# Backends that are written for GPUs; results name the kinds of launches of one ("cuda-ahead").
GPU_BACKENDS = ("triton", "cuda")
# Columns of the tables of `steer`: heading and case.
SHARE = "of ceiling"
COLUMNS = {
    "whole encoder": "stream",
    SHARE: "stream",
    "read alone": "read only",
    "hard": "hard",
    "hard, int8": "hard, int8",
    "easy": "easy",
    "easy, int8": "easy, int8",
    "dense": "dense PyTorch, eager",
    "dense, compiled": "dense PyTorch, compiled",
    "SAELens": "SAELens, eager",
}
FIXED = {
    "launch alone": "launch only",
    "no row steered": "unsteered",
    "nothing active": "inactive",
    "all settled": "settled",
}
FIXED_TEXT = (
    "Steps that read nothing of the encoder. `all settled` less `launch alone` is select phase, grid barrier and tail, "
    "and so at least what barrier and tail take together."
)
# Shown in every kernel's line.
OTHERS = ("torch", "read")

Result = dict[str, Any]
# Where each backend has run: the newest run on each GPU.
GPURuns = dict[str, list[str]]


def path_of(folder: Path, run: Result) -> Path:
    """Where a run's results belong: by GPU, date and commit; `latest.json` without a GPU."""
    if run["device"] == "cpu":
        return folder / "latest.json"
    gpu = re.sub(r"[^a-z0-9]+", "-", run["device"].lower()).strip("-")
    moment = re.sub(r"[^0-9T]", "", run["date"])
    return folder / gpu / f"{moment}-{run['commit']}{'-dirty' if run['dirty'] else ''}.json"


def runs_on_gpus(folder: Path) -> list[Result]:
    """All runs on a GPU, the newest last."""
    runs: list[Result] = [json.loads(path.read_text()) for path in folder.glob("*/*.json")]
    return sorted((run for run in runs if run["device"] != "cpu"), key=lambda run: run["date"])


def newest(folder: Path) -> Result | None:
    """The newest GPU results, with what else was measured on that GPU at that commit."""
    runs = runs_on_gpus(folder)
    if not runs:
        return None
    last = runs[-1]
    same = [run for run in runs if all(run[name] == last[name] for name in ("device", "commit", "dirty"))]
    by_name = {name_of(result): result for run in same for result in run["results"]}
    return last | {"results": list(by_name.values())}


def gpu_runs(folder: Path) -> GPURuns:
    """For each backend, the GPUs that it has run on, each with the newest commit and date."""
    newest_runs: dict[str, dict[str, str]] = {backend: {} for backend in GPU_BACKENDS}
    for run in runs_on_gpus(folder):
        for backend in {result.get("backend", "").split("-")[0] for result in run["results"]} & newest_runs.keys():
            newest_runs[backend][run["device"]] = f"{run['device']}, {commit_of(run)}, {run['date'][:10]}"
    return {backend: list(devices.values()) for backend, devices in newest_runs.items()}


def commit_of(run: Result) -> str:
    return f"commit {run['commit']}{' with changes' if run['dirty'] else ''}"


def name_of(result: Result) -> tuple[Any, ...]:
    """Return the identity of a result: op, shape, rows, case and backend."""
    return result["op"], tuple(result["shape"]), result["rows"], result["case"], result["backend"]


def time_of(result: Result) -> str:
    """Device time, or wall time in brackets where the device was not timed by itself."""
    if result["device_us"]:
        return f"{result['device_us']['median']:.1f}"
    return f"({result['wall_us']['median']:.1f})"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def steer_table(results: list[Result], columns: dict[str, str]) -> str:
    """One line per shape, number of rows and kernel."""
    cases = (result for result in results if result["op"] == "steer" and result["case"] in columns.values())
    steer = {name_of(result): result for result in cases}
    places = {(shape, rows, kernel) for _, shape, rows, _, kernel in steer if kernel not in (*OTHERS, "reference")}
    lines = []
    for shape, rows, kernel in sorted(places, key=lambda place: (place[0][1], place[0][0], *place[1:])):
        cells = []
        for heading, case in columns.items():
            names = [("steer", shape, rows, case, backend) for backend in (kernel, *OTHERS)]
            result = next((steer[name] for name in names if name in steer), None)
            cells.append("" if result is None else share_of(result) if heading == SHARE else time_of(result))
        lines.append([f"{shape[0]} x {shape[1]}", rows, kernel, *cells])
    return table(["SAE", "rows", "kernel", *columns], lines)


def share_of(result: Result) -> str:
    return f"{100 * result['of_read_ceiling']:.0f} %"


def other_table(results: list[Result]) -> str:
    """One line per result of the other ops."""
    lines = []
    for result in results:
        if result["op"] != "steer":
            shares = {"of_read_ceiling": "of the read ceiling", "of_matmul_rate": "of the matrix rate"}
            notes = [f"{100 * result[name]:.0f} % {words}" for name, words in shares.items() if name in result]
            notes += [f"{result['tokens_a_second']:.1f} tokens/s"] if "tokens_a_second" in result else []
            shape = " x ".join(str(size) for size in result["shape"])
            place = (result["op"], shape, result["rows"], result["case"], result["backend"])
            lines.append([*place, time_of(result), ", ".join(notes)])
    return table(["op", "SAE (model: layers x width)", "rows", "case", "backend", "time", ""], lines)


def plain(results: list[Result]) -> str:
    """One line per result."""
    lines = []
    for result in results:
        shape = "x".join(str(size) for size in result["shape"])
        share = result.get("of_read_ceiling", result.get("of_matmul_rate"))
        name = f"{result['op']:18} {shape:12} {result['rows']:5} {result['backend']:17} {result['case']:26}"
        lines.append(f"{name} {time_of(result):>12}" + (f" {100 * share:6.1f} %" if share is not None else ""))
    return "\n".join(lines)


def benchmark_section(run: Result | None) -> str:
    """The newest times."""
    if run is None:
        return NO_TABLE
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items() if version)
    return (
        f"{run['device']}, {run['date'][:10]}, {commit_of(run)}; {versions}. Measured in the same "
        f"run: read-only bandwidth {run['read_gb_s']:.0f} GB/s, bf16 matrix product {run['matmul_tflop_s']:.0f} "
        f"TFLOP/s.\n\n{steer_table(run['results'], COLUMNS)}\n\n{FIXED_TEXT}\n\n"
        f"{steer_table(run['results'], FIXED)}\n\n{other_table(run['results'])}"
    )


def status_section(runs: GPURuns) -> str:
    """One line that says on which GPUs the backends have run."""
    if not any(runs.values()):
        return (
            "**Status: no kernel has run on a GPU yet.** Without one the tests run every kernel in an emulator, and "
            "compile it for sm_80 and sm_90."
        )
    places = "; ".join(f"{backend}: {' and '.join(devices) or NO_RUN}" for backend, devices in runs.items())
    return f"**Status: where the kernels have run on a GPU, last with which commit.** {places}."


def sections(folder: Path) -> dict[Path, dict[str, str]]:
    """The parts of each page by the names of their markers."""
    runs = gpu_runs(folder)
    places = {f"{backend} on GPUs": "; ".join(devices) or NO_RUN for backend, devices in runs.items()}
    return {
        README: {"status": f"\n{status_section(runs)}\n"} | places,
        BENCHMARKS: {"benchmark": f"\n{benchmark_section(newest(folder))}\n"},
    }


def with_sections(page: str, texts: dict[str, str]) -> str:
    """The page with each text between its markers."""
    for name, text in texts.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, rest = page.split(begin)
        _, after = rest.split(end)
        page = f"{before}{begin}{text}{end}{after}"
    return page


def as_json(runs: GPURuns) -> str:
    return json.dumps(runs, indent=2) + "\n"


def main() -> None:
    for path, texts in sections(RESULTS).items():
        path.write_text(with_sections(path.read_text(), texts))
    GPU_RUNS.write_text(as_json(gpu_runs(RESULTS)))


if __name__ == "__main__":
    main()
