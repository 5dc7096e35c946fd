"""Launch parameters: candidates, and what their results say."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import tuning
from bench.harness import results
from bench.harness.cases import KERNELS, LAUNCHES, SCREEN
from dspa_kernels import launch
from dspa_kernels.launch import NATIVE, CudaEntry, Launch

SHAPE = (2304, 16384)
PRESENT = Launch(BLOCK_N=32, BLOCK_L=128, BLOCK_K=128, num_warps=8, num_stages=3, programs=1)


@pytest.mark.parametrize("rows", [16, 32, 64])
def test_candidates_fit_on_a_multiprocessor_and_keep_the_order_of_sums(rows: int) -> None:
    present = replace(PRESENT, BLOCK_N=rows)
    first, *others = tuning.candidates(present)
    assert first == present and 2 < len(others) == len(set(others)) < 6
    for other in others:
        assert (other.BLOCK_N, other.BLOCK_K, other.num_warps) == (rows, 128, 8)
        assert other.num_stages * other.BLOCK_K * (other.BLOCK_L + rows) * 2 <= 227 * 1024


def test_every_candidate_is_a_case() -> None:
    cases = list(tuning.cases((64, 512)))
    assert len({case.launch for case in cases}) == len(cases) > 2
    assert all(json.dumps(case.labels()["launch"]) for case in cases)


def line(case: str, kernel: str, micro: float, rows: int = 1, **others: Any) -> dict[str, Any]:
    labels = {"op": "steer", "case": case, "backend": kernel, "shape": list(SHAPE), "rows": rows}
    return labels | {"device_us": {"median": micro}, "wall_us": {"median": 99.0}} | others


def times(case: str, triton: float, cuda: float, ahead: float = 100.0, rows: int = 1) -> list[dict[str, Any]]:
    """Times of all kernels; programmatic launches are slow."""
    return [
        line(case, kernel, micro, rows) for kernel, micro in zip(KERNELS, (triton, cuda, ahead, 100.0), strict=True)
    ]


def entries(path: Path, lines: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The CUDA table after these results."""
    table = path / "table.json"
    table.write_text("[]")
    monkeypatch.setattr(launch, "CUDA_TABLE", table)
    launch.cuda_table.cache_clear()
    file = path / "results.jsonl"
    file.unlink(missing_ok=True)
    for written in ({"run": {"device": "Some GPU", "capability": [9, 0]}}, *lines):
        results.append(file, written)
    monkeypatch.setattr("sys.argv", ["tuning", str(file)])
    tuning.main()
    launch.cuda_table.cache_clear()
    written = json.loads(table.read_text())
    assert [asdict(entry) for entry in launch.cuda_table()] == written
    launch.cuda_table.cache_clear()
    return written


def entry(variant: str, rows: int, kind: str) -> dict[str, Any]:
    return asdict(CudaEntry(variant, NATIVE, 90, rows, *SHAPE, **LAUNCHES[kind]))


def mean(cuda: float, ahead: float = 100.0, rows: int = 1) -> list[dict[str, Any]]:
    """Realistic steps, with the screen no faster than Triton's 10 us."""
    return times("hard", 10, cuda, ahead, rows) + times(f"hard, {SCREEN}", 10, 10, 10, rows)


@pytest.mark.parametrize(
    ("lines", "kind"),
    [
        (times("stream", 30, 25, 26) + mean(10, 10), "cuda"),
        (times("stream", 30, 25, 24) + mean(10, 10), "cuda-ahead"),
        (times("stream", 30, 29.9, 29.8) + mean(10, 10), None),
        (times("stream", 30, 25, 24) + mean(10, 12), "cuda"),
        (times("stream", 30, 25, 24) + mean(11, 12), None),
        # An entry would serve steps with the screen, too.
        (times("stream", 30, 25, 24) + times("hard", 10, 9) + times(f"hard, {SCREEN}", 10, 11, 11), None),
        # Without all of its results there is no entry.
        (times("stream", 30, 25, 24) + times("hard", 10, 9), None),
        (mean(5, 5), None),
    ],
)
def test_faster_by_more_than_noise_and_nowhere_slower(
    lines: list[dict[str, Any]], kind: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert entries(tmp_path, lines, monkeypatch) == ([entry("steer", 1, kind)] if kind else [])


def test_cuda_is_entered_as_far_as_it_is_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def of(*kinds: str) -> list[dict[str, Any]]:
        micro = {"cuda": (30, 20, 25), "cuda-ahead": (30, 25, 20), "slow": (30, 31, 32)}
        return [
            result
            for rows, kind in zip((1, 4, 8), kinds, strict=True)
            for result in (*times("stream", *micro[kind], rows=rows), *mean(10, 10, rows))
        ]

    assert entries(tmp_path, of("cuda", "cuda", "cuda"), monkeypatch) == [entry("steer", 8, "cuda")]
    assert entries(tmp_path, of("cuda-ahead", "cuda", "slow"), monkeypatch) == [
        entry("steer", 1, "cuda-ahead"),
        entry("steer", 4, "cuda"),
    ]
    assert entries(tmp_path, of("slow", "cuda", "cuda"), monkeypatch) == []


def test_a_variant_comes_before_what_serves_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screened = times(f"hard, {SCREEN}", 30, 25, 20)
    assert entries(tmp_path, screened, monkeypatch) == [entry(f"steer+{SCREEN}", 1, "cuda-ahead")]
    lines = [*screened, *times("stream", 30, 20, 25), *times("hard", 10, 10, 10)]
    wanted = [entry(f"steer+{SCREEN}", 1, "cuda-ahead"), entry("steer", 1, "cuda")]
    assert entries(tmp_path, lines, monkeypatch) == wanted
    monkeypatch.setattr(launch, "capability_of", lambda _device: 90)
    launch.cuda_table.cache_clear()
    for variant, k, screen in (("ahead", 0, True), ("plain", 0, False)):
        name = launch.steer_variant(k, torch.zeros(1) if screen else None)
        chosen = launch.cuda_entry.__wrapped__(name, 1, *SHAPE, NATIVE, torch.device("cpu"))
        assert chosen is not None and chosen.ahead == (variant == "ahead")
    launch.cuda_table.cache_clear()


def test_nothing_measured_on_a_cpu_is_entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{"run": {"device": "cpu", "capability": None}}, *times("stream", 30, 20), *mean(5)]
    assert entries(tmp_path, lines, monkeypatch) == []


def test_entries_replace_those_of_their_capability() -> None:
    old, other = (
        CudaEntry("steer", NATIVE, capability, 1, *SHAPE, programmatic=False, ahead=False) for capability in (90, 80)
    )
    new = replace(old, rows=8)
    assert tuning.updated([old, other], [new]) == [other, new]


def test_better_launches_are_named() -> None:
    fast, slow = asdict(PRESENT), asdict(replace(PRESENT, num_stages=5))
    lines = [line("stream", "triton", 20.0, launch=slow), line("stream", "triton", 19.0, launch=fast)]
    (change,) = tuning.better_launches([*lines, line("stream", "triton", 1.0)])
    assert change.startswith(f"1 rows: 19.00 us with {fast}")
    assert tuning.better_launches([lines[1], lines[0]]) == []


def test_the_table_round_trips() -> None:
    assert tuning.as_text(launch.cuda_table()) == launch.CUDA_TABLE.read_text()
