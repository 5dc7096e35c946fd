"""Stages as they run on a GPU, with tiny inputs, kernels in the interpreter and the emulator, and planted faults."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import report
from bench.device import plan, stages
from bench.device.__main__ import Call
from bench.harness import results
from bench.harness.cases import Case, Setting, activity_of, timed
from bench.harness.measure import Stopwatch
from bench.ops import stress

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the calls themselves are run")
# The program of a stage with few cases, of which some hang, crash or give wrong rows.
PLANTED = """
import dataclasses, os, signal, sys, time
from bench.device import stages
from bench.harness.cases import Setting
from bench.ops import steer

def hang(case, backend): time.sleep(1000)
def crash(case, backend): os.kill(os.getpid(), signal.SIGSEGV)
def fail(case, backend): raise RuntimeError("planted")

faults = {
    ("inactive", "cuda", 1): hang,
    ("settled", "cuda-ahead", 1): crash,
    ("unsteered", "cuda-ahead", 1): fail,
}
stages.CASES["stream"] = lambda: (
    dataclasses.replace(case, prepare=faults.get((case.name, case.backend, case.rows), case.prepare))
    for case in steer.cases(["stream", *steer.FIXED], ["cuda", "cuda-ahead"], stages.FIRST, [1, 4])
)
right = Setting.steer
def wrong(self, h, rows, **options):
    out = right(self, h, rows, **options)
    return out + (options["backend"] == "cuda" and self.alpha == 1.0)
Setting.steer = wrong
sys.exit(stages.main())
"""


def test_planted_faults_cost_only_themselves(tmp_path: Path) -> None:
    """A case that hangs at one row is left out at four; one that crashes or fails is not."""
    call = Call("A", tmp_path, 300, commit="abc", rehearse=True)
    program = plan.command(plan.STREAM, "", "A", call.results, "abc", True)
    assert program[:3] == [sys.executable, "-m", "bench.device.stages"]
    planted = replace(
        plan.STREAM, needs=0, limit=200, silence=20, command=lambda _job: [sys.executable, "-c", PLANTED, *program[3:]]
    )
    assert not call.run([plan.MACHINE, planted, replace(plan.COUNTS, needs=0, limit=100)])

    (run,) = results.runs(call.results)
    lines = run["lines"]
    of = {(line["case"], line["backend"], line["rows"]): line for line in lines if "case" in line}
    assert run["device"] == "cpu" and run["commit"]
    timed = {name for name, line in of.items() if report.is_timed(line)}
    assert timed == {
        *((name, kernel, 4) for name in ("stream", "unsteered") for kernel in ("cuda", "cuda-ahead")),
        *(("stream", kernel, 1) for kernel in ("cuda", "cuda-ahead")),
        *(("inactive", "cuda-ahead", rows) for rows in (1, 4)),
        ("unsteered", "cuda", 1),
        ("counts", "triton", 16),
        ("sums", "triton", 16),
        ("dense PyTorch, eager", "torch", 16),
    }
    for kernel, rows in (("cuda", 1), ("cuda", 4), ("cuda-ahead", 4)):
        assert of["settled", kernel, rows]["wrong"] == f"AssertionError: {4 * rows} of {4 * rows} rows are wrong"
    assert of["unsteered", "cuda-ahead", 1]["failed"] == "RuntimeError: planted"
    assert [(line["outcome"], line["lost"]) for line in lines if "lost" in line] == [
        ("hung", "steer 64x512, 1 rows, inactive, cuda"),
        ("crashed", "steer 64x512, 1 rows, settled, cuda-ahead"),
    ]
    ended = {line["stage"]: line for line in lines if "outcome" in line and "lost" not in line}
    assert {name: line["outcome"] for name, line in ended.items()} == {
        "machine": "ok",
        "stream": "hung",
        "counts": "ok",
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "results.jsonl"]


def test_nothing_of_a_rehearsal_is_reported(tmp_path: Path) -> None:
    call = Call("A", tmp_path, 60, rehearse=True)
    call.run([plan.MACHINE])
    results.append(call.results, {"stage": "smoke", "backend": "triton", "checked": True})
    assert report.adopt(call.results, tmp_path / "kept") == [] and not (tmp_path / "kept").exists()


def few(cases: list[Case]) -> list[Case]:
    """The first case of each kind."""
    return list({(case.op, case.name, case.backend, case.launch): case for case in reversed(cases)}.values())


@pytest.mark.parametrize("stage", ["stream", "mean", "counts", "dense", "sae", "generate", "tune"])
def test_the_cases_of_a_stage_can_be_timed(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    monkeypatch.setattr("torch.compile", lambda function, **_: function)
    for case in few(list(stages.CASES[stage]())):
        result = timed(case, Stopwatch(rounds=1))
        assert report.is_timed(result) and result.items() >= case.labels().items()


@pytest.mark.parametrize("kernel", plan.KERNELS)
def test_the_cases_of_a_stage_can_be_checked(kernel: str) -> None:
    cases = [case for case in stages.bits() if case.backend == kernel]
    for case in cases[: 2 if kernel == "triton" else 6]:
        assert stages.check(case)["checked"]


@pytest.mark.parametrize(
    ("check", "wrong"),
    [
        (stress.batches, lambda h, rows: h + (len(h) == 3)),
        (stress.run_to_run, lambda h, rows: h + torch.rand_like(h)),
    ],
)
def test_checks_of_bits_can_fail(check: Any, wrong: Any) -> None:
    setting = Setting.of(activity_of(stages.FIRST), "hard", 4)
    check(setting, lambda h, rows: h, 4, 3)
    with pytest.raises(AssertionError, match="differ"):
        check(setting, wrong, 4, 3)


def test_every_launch_of_a_call_is_compiled_first() -> None:
    for call, (_, of_call) in plan.CALLS.items():
        chosen = stages.parsed(["compile", "--results", "unused", "--call", call, "--job", "0"])
        compiled = {(case.op, case.name, case.rows, case.launch) for case in stages.compiled(chosen)}
        for stage in of_call:
            for case in stages.CASES[stage.name]() if stage.name in stages.CASES else ():
                if case.backend == "triton":
                    assert (case.op, case.name, case.rows, case.launch) in compiled, case
