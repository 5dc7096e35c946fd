"""The README's table as `bench.report` makes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench import report


def run(date: str, results: list[dict[str, Any]], device: str = "Some GPU", commit: str = "abc") -> dict[str, Any]:
    found = {
        "device": device,
        "commit": commit,
        "dirty": False,
        "date": date,
        "versions": {"torch": "2", "sae-lens": None},
    }
    return found | {"read_gb_s": 4000.0, "matmul_tflop_s": 700.0, "results": results}


def result(case: str, micro: float, backend: str = "triton", **others: Any) -> dict[str, Any]:
    times = {"device_us": {"median": micro}, "wall_us": {"median": 99.0}, "of_read_ceiling": 0.5}
    return {"op": "steer", "case": case, "backend": backend, "shape": [64, 512], "rows": 1} | times | others


def write(folder: Path, found: dict[str, Any]) -> None:
    path = report.path_of(folder, found)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found))


def test_without_a_gpu_result_the_readme_says_so(tmp_path: Path) -> None:
    write(tmp_path, run("2030-01-01T00:00:00Z", [result("stream", 7.0)], device="cpu"))
    assert (tmp_path / "latest.json").is_file()
    assert report.section(report.newest(tmp_path)) == report.NOTHING


def test_the_newest_commit_is_shown_with_all_of_its_runs(tmp_path: Path) -> None:
    write(tmp_path, run("2030-01-01T00:00:00Z", [result("stream", 1.0)], commit="old"))
    write(tmp_path, run("2030-01-02T00:00:00Z", [result("stream", 2.0), result("hard", 3.0)]))
    write(tmp_path, run("2030-01-03T00:00:00Z", [result("stream", 4.0), result("stream", 9.0, "reference")]))
    found = report.newest(tmp_path)
    assert found is not None
    text = report.section(found)
    assert "| 64 x 512 | 1 | triton | 4.0 | 50 % |  | 3.0 |" in text and "reference" not in text
    assert "2030-01-03" in text and "commit abc" in text and "torch 2" in text and "sae-lens" not in text


def test_kernels_stand_below_each_other_and_beside_what_they_share() -> None:
    kernels = [result("stream", 2.0, "triton"), result("stream", 3.0, "cuda")]
    others = [result("read only", 1.0, "read"), result("SAELens, eager", 9.0, "torch")]
    *_, first, second = report.steer_table(kernels + others, report.COLUMNS).splitlines()
    assert first.startswith("| 64 x 512 | 1 | cuda | 3.0 | 50 % | 1.0 |")
    assert second.startswith("| 64 x 512 | 1 | triton | 2.0 | 50 % | 1.0 |")
    assert first.endswith("| 9.0 |") and second.endswith("| 9.0 |")


def test_fixed_costs_have_a_table_of_their_own() -> None:
    results = [result("stream", 2.0), result("settled", 5.0), result("launch only", 4.0, "read")]
    *_, line = report.steer_table(results, report.FIXED).splitlines()
    assert line == "| 64 x 512 | 1 | triton | 4.0 |  |  | 5.0 |"


def test_wall_time_stands_in_brackets() -> None:
    assert report.time_of(result("stream", 5.0)) == "5.0"
    assert report.time_of(result("stream", 5.0, device_us=None)) == "(99.0)"


def test_only_the_section_changes() -> None:
    readme = report.README.read_text()
    changed = report.with_section(readme, "A TABLE")
    assert "A TABLE" in changed and readme.split(report.BEGIN)[0] == changed.split(report.BEGIN)[0]
    assert readme.split(report.END)[1] == changed.split(report.END)[1]
    assert report.with_section(changed, "A TABLE") == changed


def test_the_readme_is_up_to_date() -> None:
    text = report.section(report.newest(report.RESULTS))
    assert report.with_section(report.README.read_text(), text) == report.README.read_text()
