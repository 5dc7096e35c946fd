"""The measured cases: kinds of launches, and steps that do what their names say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench.checks import every_kernel, one_step, stress
from bench.harness.cases import LAUNCHES, Setting, activity_of, check_rows, running, steer_backends
from bench.suite.test_steer import paths_of
from dspa_kernels import launch
from dspa_kernels.testing import BACKENDS
from dspa_kernels.weights import PATHS

CPU, TINY = torch.device("cpu"), (64, 512)


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_kind_of_launch_is_chosen_and_then_forgotten(name: str) -> None:
    entries = [("steer", 1, 2304, 16384, 0, CPU), ("steer_topk_int8", 500, 64, 512, 2, CPU)]
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
    assert last == "every kernel: 24 of 24 as the reference"
    assert len(left_out) == 2 * len(LAUNCHES) and all("torch.float32" in line for line in left_out)


def test_a_row_is_the_same_in_any_batch_and_turn() -> None:
    for setting, run in stress.variants(activity_of(TINY), "cuda").values():
        setting = replace(setting, h=setting.h[:8], rows=setting.rows[:8])
        stress.batch_invariance(setting, run)
        stress.run_to_run(lambda setting=setting, run=run: run(setting.h, setting.rows), 3)


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
