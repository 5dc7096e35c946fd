"""The parts that `bench.report` writes to README.md, docs/benchmarks.md and the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import report
from bench.harness import results

PAGES = (report.README, report.BENCHMARKS)


def run(date: str, lines: list[dict[str, Any]], device: str = "Some GPU", commit: str = "abc") -> dict[str, Any]:
    origin = {"device": device, "commit": commit, "dirty": False, "date": f"{date}T00:00:00Z"}
    return origin | {"versions": {"torch": "2", "sae-lens": None}, "lines": lines}


def result(case: str, micro: float, backend: str = "triton", **others: Any) -> dict[str, Any]:
    times = {"device_us": {"median": micro}, "wall_us": {"median": 99.0}, "of_read_ceiling": 0.5}
    return {"op": "steer", "case": case, "backend": backend, "shape": [64, 512], "rows": 1} | times | others


def read(micro: float, case: str = "a reader") -> dict[str, Any]:
    return result(case, micro, "read", op="read")


def write_lines(path: Path, measured: dict[str, Any]) -> Path:
    results.append(path, {"run": {name: value for name, value in measured.items() if name != "lines"}})
    for line in measured["lines"]:
        results.append(path, line)
    return path


def write(folder: Path, measured: dict[str, Any]) -> None:
    write_lines(report.path_of(folder, measured), measured)


def test_without_a_gpu_result_the_readme_says_so(tmp_path: Path) -> None:
    write(tmp_path, run("2030-01-01", [result("stream", 7.0)], device="cpu"))
    assert (tmp_path / "latest.jsonl").is_file()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "latest.jsonl").rename(tmp_path / "cpu" / "latest.jsonl")
    assert report.benchmark_section(report.newest(tmp_path)) == report.NO_TABLE
    texts = report.sections(tmp_path)[report.README]
    assert texts["triton on GPUs"] == texts["cuda on GPUs"] == "not yet"
    assert texts["status"].startswith("\n**Status: no kernel has run on a GPU yet.**")
    assert report.gpu_runs(tmp_path) == {"triton": [], "cuda": []}


def test_results_of_a_gpu_are_kept(tmp_path: Path) -> None:
    """Both calls may have written to one file. Those of a CPU, and lines of no known machine, are left behind."""
    file = tmp_path / "results.jsonl"
    results.append(file, result("stream", 1.0))
    write_lines(file, run("2030-01-01", [result("stream", 2.0)]))
    write_lines(file, run("2030-01-02", [result("stream", 3.0)], "cpu"))
    write_lines(file, run("2030-01-03", [result("stream", 4.0)]))
    for _ in range(2):
        paths = report.adopt(file, tmp_path / "kept")
        assert [path.name for path in paths] == ["20300101T000000-abc.jsonl", "20300103T000000-abc.jsonl"]
    kept = report.runs_on_gpus(tmp_path / "kept")
    assert [line["device_us"]["median"] for run in kept for line in run["lines"]] == [2.0, 4.0]


def test_a_file_without_a_run_on_a_gpu_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("README", "BENCHMARKS"):
        page = tmp_path / name
        page.write_text(getattr(report, name).read_text())
        monkeypatch.setattr(report, name, page)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "kept")
    monkeypatch.setattr(report, "GPU_RUNS", tmp_path / "gpu_runs.json")
    file = write_lines(tmp_path / "results.jsonl", run("2030-01-01", [result("stream", 2.0)], "cpu"))
    monkeypatch.setattr("sys.argv", ["report", str(file)])
    report.main()
    assert capsys.readouterr().out == f"{file} has no run on a GPU: nothing of it is reported\n"
    assert json.loads(report.GPU_RUNS.read_text()) == {"triton": [], "cuda": []}
    assert report.NO_TABLE in report.BENCHMARKS.read_text() and not report.RESULTS.exists()
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path / "nothing.jsonl")])
    with pytest.raises(SystemExit):
        report.main()
    assert "nothing.jsonl' is not a file" in capsys.readouterr().err


def test_the_newest_commit_is_shown_with_all_of_its_runs(tmp_path: Path) -> None:
    write(tmp_path, run("2030-01-01", [result("stream", 1.0)], commit="old"))
    ceilings = {"stage": "stream", "read_gb_s": 4000.0, "reader": "a", "matmul_tflop_s": 700.0}
    write(tmp_path, run("2030-01-02", [ceilings, result("stream", 2.0), result("hard", 3.0)]))
    write(tmp_path, run("2030-01-03", [result("stream", 4.0), result("stream", 9.0, "reference")]))
    last = report.newest(tmp_path)
    assert last is not None
    text = report.benchmark_section(last)
    assert "| 64 x 512 | 1 | triton | 4.0 | 50 % |  |  | 3.0 |" in text and "reference" not in text
    assert "2030-01-03" in text and "commit abc" in text and "torch 2" in text and "sae-lens" not in text
    assert "read-only bandwidth 4000 GB/s, bf16 matrix product 700 TFLOP/s" in text and "Not measured" not in text


def test_a_part_of_a_call_is_shown_with_what_is_missing(tmp_path: Path) -> None:
    labels = {"op": "steer", "shape": [64, 512], "rows": 8, "case": "hard", "backend": "cuda"}
    lines: list[dict[str, Any]] = [
        {"stage": "smoke", "job": "cuda", "outcome": "failed", "seconds": 3.0, "last": ""},
        {"stage": "stream", **result("stream", 2.0)},
        {"stage": "stream", **labels, "wrong": "AssertionError: 3 of 128 rows are wrong\nmore"},
        {"stage": "stream", "lost": "steer 64x512, 1 rows, stream, cuda", "outcome": "hung"},
        {"stage": "counts", "job": "", "outcome": "not reached", "seconds": 0.0, "last": ""},
    ]
    write(tmp_path, run("2030-01-01", lines))
    section = report.benchmark_section(report.newest(tmp_path))
    assert section.endswith(
        "Not measured:\n\n"
        "- wrong: steer 64x512, 8 rows, hard, cuda: AssertionError: 3 of 128 rows are wrong\n"
        "- hung: steer 64x512, 1 rows, stream, cuda\n"
        "- not reached: stage counts"
    )
    assert "Some GPU" in section and "| 64 x 512 | 1 | triton | 2.0 | 50 % |" in section
    assert report.gpu_runs(tmp_path)["cuda"] == []


def test_a_run_without_a_time_has_no_table(tmp_path: Path) -> None:
    labels = {"op": "steer", "shape": [64, 512], "rows": 1, "case": "stream", "backend": "cuda-ahead"}
    write(tmp_path, run("2030-01-01", [{"stage": "smoke", **labels, "checked": True}]))
    assert report.benchmark_section(report.newest(tmp_path)) == report.NO_TABLE
    assert report.gpu_runs(tmp_path) == {"triton": [], "cuda": ["Some GPU, commit abc, 2030-01-01"]}


def test_where_a_backend_has_run_is_its_newest_run_on_each_gpu(tmp_path: Path) -> None:
    write(tmp_path, run("2030-01-01", [result("stream", 1.0, "cuda-ahead")], commit="old"))
    new = run("2030-01-04", [result("stream", 1.0), result("stream", 1.0, "torch")], commit="new")
    write(tmp_path, new | {"dirty": True})
    write(tmp_path, run("2030-01-03", [result("stream", 1.0, "cuda")], "Other GPU"))
    triton = "Some GPU, commit new with changes, 2030-01-04"
    cuda = ["Some GPU, commit old, 2030-01-01", "Other GPU, commit abc, 2030-01-03"]
    assert report.gpu_runs(tmp_path) == {"triton": [triton], "cuda": cuda}
    texts = report.sections(tmp_path)[report.README]
    assert texts["triton on GPUs"] == triton and texts["cuda on GPUs"] == "; ".join(cuda)
    assert f"triton: {triton}; cuda: {cuda[0]} and {cuda[1]}." in texts["status"]


def test_kernels_stand_below_each_other_with_what_they_share() -> None:
    """A step is compared with the fastest bare read of the same bytes."""
    kernels = [result("stream", 2.0, "triton"), result("stream", 3.0, "cuda")]
    others = [read(1.5), read(1.2), read(0.1, report.LAUNCH), result("SAELens, eager", 9.0, "torch")]
    *_, first, second = report.steer_table(kernels + others, report.COLUMNS).splitlines()
    assert first.startswith("| 64 x 512 | 1 | cuda | 3.0 | 50 % | 40 % | 1.2 |")
    assert second.startswith("| 64 x 512 | 1 | triton | 2.0 | 50 % | 60 % | 1.2 |")
    assert first.endswith("| 9.0 |  |") and second.endswith("| 9.0 |  |")


def test_a_line_shows_both_shares() -> None:
    first, second, third = report.plain([result("stream", 2.0), read(1.2), result("hard", 3.0)]).splitlines()
    assert first.endswith(" 2.0   50.0 %, 60 % of read alone") and second.endswith(" 1.2   50.0 %")
    assert third.endswith(" 3.0   50.0 %")


def test_lines_of_candidates_show_their_launch() -> None:
    one, other = (result("stream", 2.0, launch={"BLOCK_L": size, "num_stages": 3}) for size in (64, 128))
    first, second = report.plain([one, other]).splitlines()
    assert first.endswith(" BLOCK_L=64 num_stages=3") and second.endswith(" BLOCK_L=128 num_stages=3")


def test_any_screen_has_the_column() -> None:
    *_, line = report.steer_table([result("hard, int3", 5.0), result("hard", 6.0)], report.COLUMNS).splitlines()
    assert line.startswith("| 64 x 512 | 1 | triton |  |  |  |  | 6.0 | 5.0 |")


def test_fixed_costs_have_a_table_of_their_own() -> None:
    lines = [result("stream", 2.0), result("settled", 5.0), read(4.0, report.LAUNCH)]
    *_, line = report.steer_table(lines, report.FIXED).splitlines()
    assert line == "| 64 x 512 | 1 | triton | 4.0 |  |  | 5.0 |"


def test_candidates_are_no_results_of_the_table() -> None:
    assert report.timed([result("stream", 2.0), result("stream", 1.0, launch={})]) == [result("stream", 2.0)]


def test_a_formula_is_not_passed_off_as_the_package() -> None:
    for source in ("package", "formula"):
        measured = run("2030-01-01", [result("SAELens, eager", 9.0, "torch", sae_lens=source)])
        assert (report.FORMULA_TEXT in report.benchmark_section(measured)) == (source == "formula")


def test_a_report_says_what_of_fuse_was_not_run() -> None:
    for source in ("package", "formula"):
        measured = run("2030-01-01", [result("fuse, bf16", 9.0, "torch", op="SAE.encode", sae_lens=source)])
        assert (report.FUSE_TEXT in report.benchmark_section(measured)) == (source == "formula")


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
