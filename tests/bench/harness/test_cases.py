"""The measured cases: kinds of launches, and steps that do what their names say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.checks import every_kernel, one_step
from bench.harness.cases import (
    LAUNCHES,
    Case,
    Setting,
    Steps,
    activity_of,
    check_rows,
    launching,
    running,
    steer_backends,
    timed,
)
from bench.harness.measure import Stopwatch, Times
from bench.ops.steer import paths_of
from dspa_kernels import launch
from dspa_kernels.launch import launch_parameters
from dspa_kernels.testing import BACKENDS
from dspa_kernels.weights import PATHS

CPU, TINY = torch.device("cpu"), (64, 512)


def case(steps: Steps) -> Case:
    return Case("op", "name", "reference", TINY, 4, lambda *_: steps)


def test_a_wrong_result_is_not_timed() -> None:
    called: list[str] = []

    def check() -> None:
        raise AssertionError("wrong")

    with pytest.raises(AssertionError, match="wrong"):
        timed(case(Steps([lambda: called.append("step")], check)), Stopwatch(rounds=1))
    assert not called


def test_a_result_says_what_was_measured() -> None:
    called: list[str] = []
    steps = Steps(
        [lambda: called.append("first"), lambda: called.append("second")],
        lambda: called.append("check"),
        n_bytes=1e6,
        n_flops=1e6,
        facts=lambda: {"fact": 1},
    )
    stopwatch = Stopwatch(rounds=2)
    result = timed(case(steps), stopwatch)
    assert called == ["check", "first", "second", "first"]
    assert result.items() >= {"op": "op", "case": "name", "shape": TINY, "rows": 4, "fact": 1, "bytes": 1e6}.items()
    seconds = 1e-6 * result["wall_us"]["median"]
    assert result["of_read_ceiling"] == pytest.approx(1e6 / seconds / stopwatch.read_bandwidth)
    assert result["of_matmul_rate"] == pytest.approx(1e6 / seconds / stopwatch.matmul_rate)
    assert result["device_us"] is None and "launch" not in result


def test_steps_may_time_themselves() -> None:
    times = Times.of([2.0])
    result = timed(case(Steps([], times=lambda: (times, Times.of([3.0])))), Stopwatch(rounds=1))
    assert result["device_us"]["median"] == 2e6 and result["wall_us"]["median"] == 3e6


def test_launch_parameters_are_used_and_then_forgotten() -> None:
    place: Any = ("steer", 1, 2304, 16384, 0, CPU)
    before = launch_parameters(*place)
    other = replace(before, num_stages=before.num_stages + 1)
    with launching(other):
        assert launch_parameters(*place) == other
    assert launch_parameters(*place) == before


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_kind_of_launch_is_chosen_and_then_forgotten(name: str) -> None:
    entries = [("steer", 1, 2304, 16384, 0, CPU), ("steer+int5+topk", 500, 64, 512, 2, CPU)]
    before = [launch.cuda_entry(*entry) for entry in entries]
    with running(name) as backend:
        chosen = [launch.cuda_entry(*entry) for entry in entries]
        kinds = [{"programmatic": entry.programmatic, "ahead": entry.ahead} for entry in chosen if entry]
        assert backend == "cuda" and kinds == [LAUNCHES[name]] * 2
    assert [launch.cuda_entry(*entry) for entry in entries] == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device")
def test_nothing_that_is_emulated_is_timed() -> None:
    assert steer_backends() == ["reference"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("path", ["unsteered", "inactive", "settled", "streamed"])
def test_rows_take_their_path(path: str, backend: str) -> None:
    activity = activity_of(TINY)
    setting = Setting.of(activity, "hard", 4)
    setting = setting.never_settled(activity) if path == "streamed" else setting.taking(path, activity)
    *tallies, n_read = paths_of(setting, backend=backend).sum(dim=0).tolist()
    assert dict(zip(PATHS, tallies, strict=True)) == dict.fromkeys(PATHS, 0) | {path: len(setting.h)}
    assert (n_read > 0) == (path == "streamed")
    out, wanted = (setting.all_steps(backend=name) for name in (backend, "reference"))
    check_rows(out, wanted)
    assert torch.equal(out, setting.h) == (path in ("unsteered", "inactive"))


def test_every_kernel(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["every_kernel", "--backends", *LAUNCHES, "--rows", "1"])
    assert every_kernel.main() == 0
    *left_out, last = capsys.readouterr().out.splitlines()
    assert last == "every kernel: 63 of 63 as the reference"
    assert len(left_out) == 11 * len(LAUNCHES)
    assert all("torch.float32" in line or "with strengths" in line for line in left_out)


def test_one_step_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    marks: list[str] = []

    class Marks:
        def __enter__(self) -> None:
            marks.append("start")

        def __exit__(self, *_: object) -> None:
            marks.append("stop")

    step = Setting.steer
    monkeypatch.setattr(
        Setting, "steer", lambda self, *args, **options: (marks.append("step"), step(self, *args, **options))
    )
    monkeypatch.setattr("torch.cuda.profiler.profile", Marks)
    one_step.one_step(TINY, "reference")
    assert marks == ["step", "start", "step", "stop"]
