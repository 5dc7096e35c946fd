"""The README's table, from the newest results on a GPU: `python -m bench.report`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS, README = ROOT / "bench" / "results", ROOT / "README.md"
BEGIN, END = "<!-- benchmark: begin -->", "<!-- benchmark: end -->"
NOTHING = "No result of a GPU is recorded yet, so there is no table here."
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
# What stands beside every kernel.
OTHERS = ("torch", "read")

Result = dict[str, Any]


def path_of(folder: Path, found: Result) -> Path:
    """Where results belong: by GPU, date and commit; `latest.json` without a GPU."""
    if found["device"] == "cpu":
        return folder / "latest.json"
    gpu = re.sub(r"[^a-z0-9]+", "-", found["device"].lower()).strip("-")
    moment = re.sub(r"[^0-9T]", "", found["date"])
    return folder / gpu / f"{moment}-{found['commit']}{'-dirty' if found['dirty'] else ''}.json"


def newest(folder: Path) -> Result | None:
    """The newest GPU results, with what else was measured on that GPU at that commit."""
    runs: list[Result] = [json.loads(path.read_text()) for path in folder.glob("*/*.json")]
    runs = sorted((run for run in runs if run["device"] != "cpu"), key=lambda run: run["date"])
    if not runs:
        return None
    last = runs[-1]
    same = [run for run in runs if all(run[name] == last[name] for name in ("device", "commit", "dirty"))]
    by_name = {name_of(result): result for run in same for result in run["results"]}
    return last | {"results": list(by_name.values())}


def name_of(result: Result) -> tuple[Any, ...]:
    """What a result is of."""
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
    """A line for each shape, number of rows and kernel."""
    steer = {name_of(each): each for each in results if each["op"] == "steer" and each["case"] in columns.values()}
    places = {(shape, rows, kernel) for _, shape, rows, _, kernel in steer if kernel not in (*OTHERS, "reference")}
    lines = []
    for shape, rows, kernel in sorted(places, key=lambda place: (place[0][1], place[0][0], *place[1:])):
        cells = []
        for heading, case in columns.items():
            names = [("steer", shape, rows, case, backend) for backend in (kernel, *OTHERS)]
            found = next((steer[name] for name in names if name in steer), None)
            cells.append("" if found is None else share_of(found) if heading == SHARE else time_of(found))
        lines.append([f"{shape[0]} x {shape[1]}", rows, kernel, *cells])
    return table(["SAE", "rows", "kernel", *columns], lines)


def share_of(result: Result) -> str:
    return f"{100 * result['of_read_ceiling']:.0f} %"


def other_table(results: list[Result]) -> str:
    """A line for each result of the other ops."""
    lines = []
    for each in results:
        if each["op"] != "steer":
            shares = {"of_read_ceiling": "of the read ceiling", "of_matmul_rate": "of the matrix rate"}
            notes = [f"{100 * each[name]:.0f} % {words}" for name, words in shares.items() if name in each]
            notes += [f"{each['tokens_a_second']:.1f} tokens/s"] if "tokens_a_second" in each else []
            shape = " x ".join(str(size) for size in each["shape"])
            line = [each["op"], shape, each["rows"], each["case"], each["backend"], time_of(each), ", ".join(notes)]
            lines.append(line)
    return table(["op", "SAE (model: layers x width)", "rows", "case", "backend", "time", ""], lines)


def plain(results: list[Result]) -> str:
    """Every result on a line of its own."""
    lines = []
    for each in results:
        shape = "x".join(str(size) for size in each["shape"])
        share = each.get("of_read_ceiling", each.get("of_matmul_rate"))
        name = f"{each['op']:18} {shape:12} {each['rows']:5} {each['backend']:17} {each['case']:26}"
        lines.append(f"{name} {time_of(each):>12}" + (f" {100 * share:6.1f} %" if share is not None else ""))
    return "\n".join(lines)


def section(found: Result | None) -> str:
    """What stands between the markers."""
    if found is None:
        return NOTHING
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    dirty = " with changes" if found["dirty"] else ""
    return (
        f"{found['device']}, {found['date'][:10]}, commit {found['commit']}{dirty}; {versions}. Measured in the same "
        f"run: read-only bandwidth {found['read_gb_s']:.0f} GB/s, bf16 matrix product {found['matmul_tflop_s']:.0f} "
        f"TFLOP/s.\n\n{steer_table(found['results'], COLUMNS)}\n\n{FIXED_TEXT}\n\n"
        f"{steer_table(found['results'], FIXED)}\n\n{other_table(found['results'])}"
    )


def with_section(readme: str, text: str) -> str:
    """The README with `text` between its markers."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def main() -> None:
    README.write_text(with_section(README.read_text(), section(newest(RESULTS))))


if __name__ == "__main__":
    main()
