"""Writes what is said of GPUs from results: `python -m bench.report [FILE...]`.

Results of a GPU in the given files, such as results.jsonl of bench/gpu.sh, are first copied to bench/results/<gpu>/.
README.md says between markers which backends have run on which GPU, docs/benchmarks.md has the newest times, and
`dspa info` reads dspa_kernels/gpu_runs.json, which is part of the installed package, as bench/results is not.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.harness import results
from bench.harness.results import Run

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
README, BENCHMARKS = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
GPU_RUNS = ROOT / "dspa_kernels" / "gpu_runs.json"
NO_TABLE = "No result of a GPU is recorded yet, so there is no table here."
NO_RUN = "not yet"
# Backends that are written for GPUs; results name the kinds of launches of one ("cuda-ahead").
GPU_BACKENDS = ("triton", "cuda")
# Columns of the tables of `steer`: heading and case. `SHARES` are not times of a case.
OF_CEILING, OF_READ, READ = "of ceiling", "of read alone", "read alone"
SHARES = (OF_CEILING, OF_READ)
COLUMNS = {
    "whole encoder": "stream",
    OF_CEILING: "stream",
    OF_READ: "stream",
    READ: READ,
    "hard": "hard",
    "hard, screen": "hard, SCREEN",
    "easy": "easy",
    "easy, screen": "easy, SCREEN",
    "dense": "dense PyTorch, eager",
    "dense, compiled": "dense PyTorch, compiled",
    "SAELens": "SAELens, eager",
    "SAELens, compiled": "SAELens, compiled",
}
LAUNCH = "launch only"
FIXED = {
    "launch alone": LAUNCH,
    "no row steered": "unsteered",
    "nothing active": "inactive",
    "all settled": "settled",
}
FIXED_TEXT = (
    "Steps that read nothing of the encoder. `all settled` less `launch alone` is select phase, grid barrier and tail, "
    "and so at least what barrier and tail take together."
)
FORMULA_TEXT = "SAELens was not installed: its times are those of its formula, written out in PyTorch."
FUSE_TEXT = (
    "Without SAELens there is nothing to `fuse`: only its function that makes latents was run, without hook points. "
    "Its decode, its call and its sparse call were not run."
)
TIMED = ("wall_us", "device_us")
# What may become of a case that is not timed.
KINDS = ("wrong", "failed", "checked", "compiled", "lost")

Result = dict[str, Any]
# Where each backend has run: the newest run on each GPU.
GPURuns = dict[str, list[str]]


def path_of(folder: Path, run: Run) -> Path:
    """Where a run's results belong: by GPU, date and commit; `latest.jsonl` without a GPU."""
    if run["device"] == "cpu":
        return folder / "latest.jsonl"
    gpu = re.sub(r"[^a-z0-9]+", "-", run["device"].lower()).strip("-")
    moment = re.sub(r"[^0-9T]", "", run["date"])
    return folder / gpu / f"{moment}-{run['commit']}{'-dirty' if run['dirty'] else ''}.jsonl"


def adopt(file: Path, folder: Path) -> list[Path]:
    """Copy the runs of a file that a GPU made to where they belong, and return these paths."""
    paths = []
    for run in results.runs(file):
        if run["device"] != "cpu":
            paths.append(path_of(folder, run))
            paths[-1].unlink(missing_ok=True)
            for line in ({"run": {name: value for name, value in run.items() if name != "lines"}}, *run["lines"]):
                results.append(paths[-1], line)
    return paths


def runs_on_gpus(folder: Path) -> list[Run]:
    """All runs on a GPU, the newest last."""
    runs = [run for path in folder.glob("*/*.jsonl") for run in results.runs(path)]
    return sorted((run for run in runs if run["device"] != "cpu"), key=lambda run: run["date"])


def newest(folder: Path) -> Run | None:
    """The newest GPU results, with what else was measured on that GPU at that commit. Of a case, the last counts."""
    runs = runs_on_gpus(folder)
    if not runs:
        return None
    last = runs[-1]
    same = [run for run in runs if all(run[name] == last[name] for name in ("device", "commit", "dirty"))]
    return last | {"lines": [line for run in same for line in run["lines"]]}


def is_timed(line: Result) -> bool:
    """Return True for a result that was right and timed."""
    return any(line.get(name) for name in TIMED)


def timed(lines: Iterable[Result]) -> list[Result]:
    """The timed results with the parameters of the launch table, once each."""
    return list({name_of(line): line for line in lines if is_timed(line) and "launch" not in line}.values())


def gpu_runs(folder: Path) -> GPURuns:
    """For each backend, the GPUs on which it gave right results, each with the newest commit and date."""
    newest_runs: dict[str, dict[str, str]] = {backend: {} for backend in GPU_BACKENDS}
    for run in runs_on_gpus(folder):
        right = [line for line in run["lines"] if is_timed(line) or line.get("checked")]
        for backend in {line["backend"].split("-")[0] for line in right} & newest_runs.keys():
            newest_runs[backend][run["device"]] = f"{run['device']}, {commit_of(run)}, {run['date'][:10]}"
    return {backend: list(devices.values()) for backend, devices in newest_runs.items()}


def commit_of(run: Run) -> str:
    return f"commit {run['commit']}{' with changes' if run['dirty'] else ''}"


def name_of(result: Result) -> tuple[Any, ...]:
    """Return the identity of a result: op, shape, rows, case and backend."""
    return result["op"], tuple(result["shape"]), result["rows"], result["case"], result["backend"]


def kind_of(case: str) -> str:
    """Return "name, backend" of a case that is written out, as cases of all sizes have it."""
    return case.partition(" rows, ")[2]


def micro(result: Result) -> float:
    """Return microseconds: of the device, or wall time where the device was not timed by itself."""
    times = result.get("device_us") or result["wall_us"]
    return float(times["median"])


def time_of(result: Result) -> str:
    """Device time, or wall time in brackets where the device was not timed by itself."""
    return f"{micro(result):.1f}" if result["device_us"] else f"({micro(result):.1f})"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def reads(shown: list[Result]) -> dict[tuple[int, ...], dict[str, Result]]:
    """For each shape, the fastest bare read of its encoder and the bare launch."""
    by_shape: dict[tuple[int, ...], dict[str, Result]] = {}
    for result in shown:
        if result["op"] == "read":
            kept = by_shape.setdefault(tuple(result["shape"]), {})
            name = LAUNCH if result["case"] == LAUNCH else READ
            kept[name] = min(result, kept.get(name, result), key=micro)
    return by_shape


def steer_table(shown: list[Result], columns: dict[str, str]) -> str:
    """One line per shape, number of rows and kernel."""
    screens = [match[1] for result in shown if (match := re.fullmatch(r"(?:hard|easy), (\w+)", result["case"]))]
    cases = {heading: case.replace("SCREEN", screens[0] if screens else "") for heading, case in columns.items()}
    steer = {name_of(result)[1:]: result for result in shown if result["op"] == "steer"}
    bare = reads(shown)
    kernels = [name for name in steer if name[2] in cases.values() and name[3] not in ("torch", "reference")]
    places = {(shape, rows, kernel) for shape, rows, _, kernel in kernels}
    lines = []
    for shape, rows, kernel in sorted(places, key=lambda place: (place[0][1], place[0][0], *place[1:])):
        cells = []
        for heading, case in cases.items():
            names = [(shape, rows, case, backend) for backend in (kernel, "torch")]
            result = next((steer[name] for name in names if name in steer), bare.get(shape, {}).get(case))
            cells.append("" if result is None else cell(result, heading, bare.get(shape, {}).get(READ)))
        lines.append([f"{shape[0]} x {shape[1]}", rows, kernel, *cells])
    return table(["SAE", "rows", "kernel", *columns], lines)


def cell(result: Result, heading: str, read: Result | None) -> str:
    """The time of a result, or its share of the read-only rate or of the time of a bare read."""
    if heading == OF_CEILING:
        return percent(result["of_read_ceiling"])
    if heading == OF_READ:
        return "" if read is None else percent(micro(read) / micro(result))
    return time_of(result)


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def other_table(shown: list[Result]) -> str:
    """One line per result of the other ops."""
    lines = []
    for result in shown:
        if result["op"] not in ("steer", "read"):
            shares = {"of_read_ceiling": "of the read ceiling", "of_matmul_rate": "of the matrix rate"}
            notes = [f"{percent(result[name])} {words}" for name, words in shares.items() if name in result]
            if result["op"] == "generate":
                notes.append(f"{1e6 * result['rows'] / micro(result):.1f} tokens/s")
            if "activation_bytes" in result:
                notes.append(f"{1e-6 * result['activation_bytes']:.0f} MB of activations")
            shape = " x ".join(str(size) for size in result["shape"])
            place = (result["op"], shape, result["rows"], result["case"], result["backend"])
            lines.append([*place, time_of(result), ", ".join(notes)])
    return table(["op", "SAE (model: layers x width)", "rows", "case", "backend", "time", ""], lines) if lines else ""


def plain(lines: list[Result]) -> str:
    """One line per timed result, with its share of the machine's ceiling and of a bare read of the same bytes."""
    texts, shown = [], list(filter(is_timed, lines))
    bare = reads(shown)
    for result in shown:
        shape = "x".join(str(size) for size in result["shape"])
        share, read = result.get("of_read_ceiling", result.get("of_matmul_rate")), bare.get(tuple(result["shape"]), {})
        text = f"{result['op']:18} {shape:12} {result['rows']:5} {result['backend']:17} {result['case']:26}"
        text += f" {time_of(result):>12}" + (f" {100 * share:6.1f} %" if share is not None else "")
        if result["case"] == COLUMNS[OF_READ] and READ in read:
            text += f", {percent(micro(read[READ]) / micro(result))} {OF_READ}"
        # Without them, the lines of different launch parameters would be the same but for the times.
        text += "".join(f" {name}={value}" for name, value in result.get("launch", {}).items())
        texts.append(text)
    return "\n".join(texts)


def described(line: Result) -> str:
    """Return the case of a result in words."""
    return f"{line['op']} {'x'.join(map(str, line['shape']))}, {line['rows']} rows, {line['case']}, {line['backend']}"


def missing(lines: Iterable[Result]) -> list[str]:
    """List what was wrong, failed, hung or was not reached."""
    texts = []
    for line in lines:
        kind = next((kind for kind in ("wrong", "failed") if kind in line), "")
        if kind:
            texts.append(f"{kind}: {described(line)}: {line[kind].splitlines()[0][:160]}")
        elif "lost" in line:
            texts.append(f"{line['outcome']}: {line['lost']}")
        elif line.get("outcome", "ok") not in ("ok", "failed"):
            last = f", after {line['last'][:160]!r}" if line["last"] else ""
            name = f"{line['stage']} {line['job']}".strip()
            texts.append(f"{line['outcome']}: stage {name}{last}")
    return texts


def outcomes(lines: list[Result]) -> str:
    """Write a line per stage: what ran, failed, hung and was not reached, and the seconds that it took."""
    texts = []
    stages: dict[str, list[Result]] = {}
    for line in lines:
        if "outcome" in line and "lost" not in line:
            stages.setdefault(line["stage"], []).append(line)
    for name, jobs in stages.items():
        mine = [line for line in lines if line.get("stage") == name]
        kinds = [kind for line in mine for kind in KINDS if kind in line] + ["timed"] * sum(map(is_timed, mine))
        tallies = ", ".join(f"{n} {kind}" for kind, n in Counter(kinds).items())
        ended = ", ".join(dict.fromkeys(job["outcome"] for job in jobs))
        texts.append(f"{name:10} {max(job['seconds'] for job in jobs):6.1f} s  {ended}{': ' * bool(tallies)}{tallies}")
    return "\n".join(texts)


def benchmark_section(run: Run | None) -> str:
    """The newest times, and what is missing among them."""
    shown = timed(run["lines"]) if run else []
    if run is None or not shown:
        return NO_TABLE
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items() if version)
    parts = [f"{run['device']}, {run['date'][:10]}, {commit_of(run)}; {versions}."]
    ceilings = [line for line in run["lines"] if "read_gb_s" in line]
    if ceilings:
        parts[0] += (
            f" Measured in the same run: read-only bandwidth {ceilings[-1]['read_gb_s']:.0f} GB/s, bf16 matrix product "
            f"{ceilings[-1]['matmul_tflop_s']:.0f} TFLOP/s."
        )
    parts += [steer_table(shown, COLUMNS)]
    formulas = [result["case"] for result in shown if result.get("sae_lens") == "formula"]
    parts += [FORMULA_TEXT] if formulas else []
    parts += [FUSE_TEXT] if any(case.startswith("fuse") for case in formulas) else []
    parts += [FIXED_TEXT, steer_table(shown, FIXED), other_table(shown)]
    lost = missing(run["lines"])
    parts += ["Not measured:\n\n" + "\n".join(f"- {text}" for text in lost)] if lost else []
    return "\n\n".join(part for part in parts if part)


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=results.existing, nargs="*", help="files of results")
    for file in parser.parse_args().files:
        print(*(adopt(file, RESULTS) or [f"{file} has no run on a GPU: nothing of it is reported"]), sep="\n")
    for path, texts in sections(RESULTS).items():
        path.write_text(with_sections(path.read_text(), texts))
    GPU_RUNS.write_text(as_json(gpu_runs(RESULTS)))


if __name__ == "__main__":
    main()
