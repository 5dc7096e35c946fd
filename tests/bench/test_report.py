"""The parts that `bench.report` writes to README.md, docs/benchmarks.md and the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import report

PAGES = (report.README, report.BENCHMARKS)


def run(date: str, results: list[dict[str, Any]], device: str = "Some GPU", commit: str = "abc") -> dict[str, Any]:
    origin = {
        "device": device,
        "commit": commit,
        "dirty": False,
        "date": date,
        "versions": {"torch": "2", "sae-lens": None},
    }
    return origin | {"read_gb_s": 4000.0, "matmul_tflop_s": 700.0, "results": results}


def result(case: str, micro: float, backend: str = "triton", **others: Any) -> dict[str, Any]:
    times = {"device_us": {"median": micro}, "wall_us": {"median": 99.0}, "of_read_ceiling": 0.5}
    return {"op": "steer", "case": case, "backend": backend, "shape": [64, 512], "rows": 1} | times | others


def write(folder: Path, measured: dict[str, Any]) -> None:
    path = report.path_of(folder, measured)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(measured))


def test_without_a_gpu_result_the_readme_says_so(tmp_path: Path) -> None:
    write(tmp_path, run("2030-01-01T00:00:00Z", [result("stream", 7.0)], device="cpu"))
    assert (tmp_path / "latest.json").is_file()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "latest.json").rename(tmp_path / "cpu" / "latest.json")
    assert report.benchmark_section(report.newest(tmp_path)) == report.NO_TABLE
    texts = report.sections(tmp_path)[report.README]
    assert texts["triton on GPUs"] == texts["cuda on GPUs"] == "not yet"
    assert texts["status"].startswith("\n**Status: no kernel has run on a GPU yet.**")
    assert report.gpu_runs(tmp_path) == {"triton": [], "cuda": []}


def test_the_newest_commit_is_shown_with_all_of_its_runs(tmp_path: Path) -> None:
    write(tmp_path, run("2030-01-01T00:00:00Z", [result("stream", 1.0)], commit="old"))
    write(tmp_path, run("2030-01-02T00:00:00Z", [result("stream", 2.0), result("hard", 3.0)]))
    write(tmp_path, run("2030-01-03T00:00:00Z", [result("stream", 4.0), result("stream", 9.0, "reference")]))
    last = report.newest(tmp_path)
    assert last is not None
    text = report.benchmark_section(last)
    assert "| 64 x 512 | 1 | triton | 4.0 | 50 % |  | 3.0 |" in text and "reference" not in text
    assert "2030-01-03" in text and "commit abc" in text and "torch 2" in text and "sae-lens" not in text


def test_where_a_backend_has_run_is_its_newest_run_on_each_gpu(tmp_path: Path) -> None:
    write(tmp_path, run("2030-01-01T00:00:00Z", [result("stream", 1.0), result("stream", 1.0, "cuda")], commit="old"))
    write(tmp_path, run("2030-01-02T00:00:00Z", [result("stream", 1.0, "torch")], device="Other GPU", commit="none"))
    write(tmp_path, run("2030-01-03T00:00:00Z", [result("stream", 1.0, "cuda-ahead")], device="Other GPU"))
    write(tmp_path, run("2030-01-04T00:00:00Z", [result("stream", 1.0)], commit="new") | {"dirty": True})
    triton = "Some GPU, commit new with changes, 2030-01-04"
    cuda = ["Some GPU, commit old, 2030-01-01", "Other GPU, commit abc, 2030-01-03"]
    assert report.gpu_runs(tmp_path) == {"triton": [triton], "cuda": cuda}
    texts = report.sections(tmp_path)[report.README]
    assert texts["triton on GPUs"] == triton and texts["cuda on GPUs"] == "; ".join(cuda)
    assert f"triton: {triton}; cuda: {cuda[0]} and {cuda[1]}." in texts["status"]


def test_kernels_stand_below_each_other_with_what_they_share() -> None:
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


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_only_the_sections_change(path: Path) -> None:
    page, present = path.read_text(), report.sections(report.RESULTS)[path]
    texts = {name: f"TEXT OF {name}" for name in present}
    changed = report.with_sections(page, texts)
    assert all(text in changed for text in texts.values())
    assert report.with_sections(changed, texts) == changed
    assert report.with_sections(changed, present) == page


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_page_is_up_to_date(path: Path) -> None:
    page = path.read_text()
    assert report.with_sections(page, report.sections(report.RESULTS)[path]) == page


def test_the_package_is_up_to_date() -> None:
    assert report.GPU_RUNS.read_text() == report.as_json(report.gpu_runs(report.RESULTS))
