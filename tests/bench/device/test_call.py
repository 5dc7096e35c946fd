"""Calls with stand-ins for their stages: what hangs, crashes or takes too long costs only itself."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench.device import plan
from bench.device.__main__ import SUMMARY, Call, main
from bench.device.plan import Stage
from bench.harness import results
from bench.harness.cases import KERNELS

# A program of three cases, which appends a line after each, and in one of them does something else.
PROGRAM = """
import json, os, signal, subprocess, sys, time
path, case, act, *options = sys.argv[1:]
after = int(options[options.index("--after") + 1]) if "--after" in options else 0
without = [option for option, word in zip(options[1:], options) if word == "--without"]
for number in (1, 2, 3):
    name = f"case {number} of 3: steer 64x512, {number} rows, stream, kernel {number}"
    if number <= after or f"stream, kernel {number}" in without:
        continue
    print(name, flush=True)
    if number == int(case):
        exec(act)
    with open(path, "a") as file:
        file.write(json.dumps({"stage": "stand-in", "done": number}) + "\\n")
"""
HANG = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
# A child in a session of its own, too.
child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
open(path + ".pids", "w").write(f"{os.getpid()} {child.pid}")
time.sleep(1000)
"""
TALK = "while True: print('still here', flush=True); time.sleep(0.05)"


def stage(name: str, call: Call, act: str = "pass", case: int = 2, **settings: Any) -> Stage:
    command = [sys.executable, "-c", PROGRAM, str(call.results), str(case), act]
    return Stage(name, **{"needs": 0, "limit": 30, "silence": 10, "command": lambda _job: list(command)} | settings)


def lines(call: Call) -> list[dict[str, Any]]:
    return results.read(call.results)


def done(call: Call) -> list[int]:
    return [line["done"] for line in lines(call) if "done" in line]


def outcomes(call: Call) -> dict[str, str]:
    return {line["stage"]: line["outcome"] for line in lines(call) if "outcome" in line and "lost" not in line}


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_hang_costs_its_case_and_its_children_end(tmp_path: Path) -> None:
    call = Call("A", tmp_path, 60)
    assert not call.run([stage("hangs", call, HANG, silence=1.5), stage("next", call)])
    # The next stage leaves out what hung.
    assert done(call) == [1, 3, 1, 3] and outcomes(call) == {"hangs": "hung", "next": "ok"}
    lost = [line for line in lines(call) if "lost" in line]
    assert [(line["lost"], line["outcome"]) for line in lost] == [
        ("steer 64x512, 2 rows, stream, kernel 2", "hung"),
    ]
    assert not any(map(is_running, map(int, Path(f"{call.results}.pids").read_text().split())))


def test_what_hung_once_is_left_out_at_other_sizes(tmp_path: Path) -> None:
    call = Call("A", tmp_path, 60)
    call.hung.add("stream, kernel 3")
    call.run([stage("goes on", call), stage("crashes", call, "os._exit(1)")])
    assert done(call) == [1, 2, 1]


@pytest.mark.parametrize(("act", "status"), [("os.kill(os.getpid(), signal.SIGSEGV)", -11), ("1 / 0", 1)])
def test_a_crash_costs_its_case(act: str, status: int, tmp_path: Path) -> None:
    call = Call("A", tmp_path, 60)
    assert not call.run([stage("crashes", call, act), stage("next", call)])
    assert done(call) == [1, 3, 1, 2, 3] and outcomes(call) == {"crashes": "crashed", "next": "ok"}
    assert "ZeroDivisionError" in call.summary() or status < 0


def test_a_stage_that_never_begins_is_not_repeated(tmp_path: Path) -> None:
    call = Call("A", tmp_path, 60)
    call.run([stage("broken", call, command=lambda _job: [sys.executable, "-c", "import nothing_of_this_name"])])
    assert outcomes(call) == {"broken": "crashed"}
    assert "nothing_of_this_name" in call.summary() and (tmp_path / "log.txt").read_text().count("Traceback") == 1


def test_time_limits(tmp_path: Path) -> None:
    """A stage ends at its own limit or that of the call, though it prints; the next one has to fit."""
    call = Call("A", tmp_path, 4)
    start = time.monotonic()
    talks = stage("talks", call, TALK, limit=1)
    assert not call.run([talks, stage("long", call, TALK, limit=100), stage("fits not", call, needs=1)])
    assert time.monotonic() - start < 8
    assert outcomes(call) == {"talks": "over its time", "long": "over its time", "fits not": "not reached"}
    assert done(call) == [1, 1]


def test_jobs_run_at_the_same_time_and_end_alone(tmp_path: Path) -> None:
    call = Call("A", tmp_path, 60)

    def command(job: str) -> list[str]:
        return [sys.executable, "-c", f"import time; print(1, flush=True); time.sleep({job})"]

    start = time.monotonic()
    call.run([stage("jobs", call, command=command, jobs=("1.4", "1.5", "100"), silence=3)])
    assert time.monotonic() - start < 9
    assert {line["job"]: line["outcome"] for line in lines(call)} == {"1.4": "ok", "1.5": "ok", "100": "hung"}


def test_the_log_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.device.watch.MOST_LOGGED", 5000)
    call = Call("A", tmp_path, 60)
    call.run([stage("talks", call, "[print('x' * 99) for _ in range(999)]")])
    assert 5000 <= (tmp_path / "log.txt").stat().st_size < 5200 and done(call) == [1, 2, 3]


def test_without_its_tool_a_stage_is_not_run(tmp_path: Path) -> None:
    call = Call("A", tmp_path, 60)
    call.run([stage("profile", call, tool="no-such-program")])
    assert outcomes(call) == {"profile": "not run: no-such-program is not on PATH"} and not done(call)


def test_a_machine_that_cannot_be_used_ends_the_call(tmp_path: Path) -> None:
    call = Call("A", tmp_path, 60)
    unusable = stage(plan.MACHINE.name, call, "os._exit(11)", case=1)
    call.run([unusable, stage("next", call)])
    assert outcomes(call) == {"machine": "crashed", "next": "not reached"}


def test_the_summary_comes_back_whole(tmp_path: Path) -> None:
    call = Call("A", tmp_path, 60)
    results.append(call.results, {"stage": "earlier", "job": "", "outcome": "hung", "seconds": 1.0, "last": ""})
    call = Call("A", tmp_path, 60)
    results.append(call.results, {"run": {"device": "Some GPU", "commit": "abc"}})
    labels = {"op": "steer", "shape": [2304, 16384], "rows": 1, "backend": "triton", "device_us": {"median": 1.0}}
    for n in range(300):
        results.append(call.results, {"stage": "stream", "case": f"case {n}", **labels})
    for n in range(100):
        wrong = {"case": f"wrong {n}", "wrong": f"{n} of 128 rows" + 200 * "x", **labels, "device_us": None}
        results.append(call.results, {"stage": "stream", **wrong})
    call.run([stage("stream", call, TALK, limit=1)])
    text = call.summary()
    assert text.splitlines()[-1].startswith("== call A, Some GPU, commit abc: ")
    assert len(text) < SUMMARY + 200 and "all are in results.jsonl" in text and "earlier" not in text
    assert "300 timed" in text and "100 wrong" in text and "over its time" in text and "3 of 128 rows" in text


def test_a_call_that_is_ended_still_has_a_summary(tmp_path: Path) -> None:
    """As by the time limit of the command that started it."""
    program = (
        "from bench.device import plan\nfrom bench.device.__main__ import main\nimport sys\n"
        f"plan.command = lambda *_: [sys.executable, '-c', {TALK!r}.join(['import time\\n', ''])]\nsys.exit(main())"
    )
    command = [sys.executable, "-c", program, "machine", str(tmp_path)]
    root = Path(__file__).parents[3]
    environment = os.environ | {"PYTHONPATH": str(root)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root, env=environment) as process:
        while not ((tmp_path / "log.txt").exists() and "[machine] still here" in (tmp_path / "log.txt").read_text()):
            time.sleep(0.05)
        process.terminate()
        text, _ = process.communicate(timeout=20)
    assert process.returncode == 1 and "over its time" in text and "== call machine" in text


def test_calls_fit_into_their_time() -> None:
    assert {name: sum(stage.needs for stage in stages) for name, (_, stages) in plan.CALLS.items()} == {
        "A": 240,
        "B": 430,
    }
    for seconds, stages in plan.CALLS.values():
        assert sum(stage.needs for stage in stages) <= seconds
        assert all(stage.needs <= stage.limit <= seconds for stage in stages)


def test_kernels_are_those_that_are_measured() -> None:
    assert plan.KERNELS == KERNELS


SECONDS = [["A", "out", "--seconds", seconds] for seconds in ("0", "-1", "nan", "long")]


@pytest.mark.parametrize("arguments", [["C", "out"], ["A"], *SECONDS])
def test_other_calls_are_refused(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["gpu.sh", *arguments])
    monkeypatch.setattr(Call, "run", lambda *_: True)
    with pytest.raises(SystemExit) as error:
        main()
    assert error.value.code == 2 and not list(tmp_path.iterdir())
    if "--seconds" in arguments:
        assert f"--seconds: {arguments[-1]!r} is not a number above 0" in capsys.readouterr().err


def test_results_need_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("sys.argv", ["gpu.sh", "A", str(tmp_path / "file")])
    with pytest.raises(SystemExit, match=r"error: the results cannot be written: .*exists: '.*/file'"):
        main()
