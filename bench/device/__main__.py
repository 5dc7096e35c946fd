"""Run the stages of a call one after the other until its time is over: `python -m bench.device`, see bench/gpu.sh."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path

from bench import report
from bench.device import plan
from bench.device.plan import Stage
from bench.device.watch import FAILED, HUNG, LATE, OK, Ending, Log, Watched
from bench.harness import results

ROOT = Path(__file__).parents[2]
NOT_REACHED = "not reached"
# Characters of the summary, and of it what was not measured: some machines return the last 12,000 of an output.
SUMMARY, MISSING = 11_000, 5_000
# Limits of a rehearsal are this many times longer.
SLOWER = 4
# What a rehearsal on a CPU runs: kernels in the interpreter and the emulator, and nothing compiled.
REHEARSAL = {
    "TRITON_INTERPRET": "1",
    "DSPA_TESTS_EMULATED_CUDA": str(ROOT / "build" / "emulated" / "libdspa_emulated.so"),
    "TORCH_COMPILE_DISABLE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}


class Call:
    """A call: its stages, their deadline, and what became of them."""

    def __init__(self, name: str, out: Path, seconds: float, commit: str = "", rehearse: bool = False) -> None:
        self.name, self.commit, self.rehearse = name, commit, rehearse
        self.start = time.monotonic()
        self.deadline = self.start + seconds
        self.results, self.log = out / "results.jsonl", Log(out / "log.txt")
        self.environment: Mapping[str, str] = os.environ | {"PYTHONUNBUFFERED": "1"} | (REHEARSAL if rehearse else {})
        self.earlier = len(results.read(self.results)) if self.results.exists() else 0
        self.stop = threading.Event()
        self.hung: set[str] = set()

    def run(self, stages: Sequence[Stage]) -> bool:
        """Run stages while there is time. Return True if all ran and nothing failed."""
        outcomes = []
        for stage in stages:
            outcomes += self.stage(stage)
            if stage.name == plan.MACHINE.name and outcomes[-1] not in (OK, FAILED):
                self.stop.set()
        return all(outcome == OK for outcome in outcomes)

    def stage(self, stage: Stage) -> list[str]:
        """Run the jobs of a stage and return their outcomes."""
        obstacle = stage.obstacle()
        if obstacle or self.stop.is_set() or time.monotonic() + stage.needs > self.deadline:
            outcome = f"not run: {obstacle}" if obstacle else NOT_REACHED
            self.record(stage, "", outcome)
            return [outcome]
        until = min(time.monotonic() + stage.limit * (SLOWER if self.rehearse else 1), self.deadline)
        with ThreadPoolExecutor(len(stage.jobs)) as pool:
            futures = [pool.submit(self.job, stage, job, until) for job in stage.jobs]
            # A signal does not always wake this thread, which has to handle it, from a wait without an end.
            while wait(futures, timeout=0.1).not_done:
                continue
        return [future.result() for future in futures]

    def job(self, stage: Stage, job: str, until: float) -> str:
        """Run a job, and again from the next case on if it ends within one."""
        start, endings, done = time.monotonic(), [], 0
        while True:
            ending = self.attempt(stage, job, done, until)
            endings.append(ending)
            if ending.outcome in (OK, FAILED, LATE) or ending.number <= done:
                break
            done = ending.number
            results.append(self.results, {"stage": stage.name, "lost": ending.case, "outcome": ending.outcome})
            # A first call may be silent because it compiles.
            if ending.outcome == HUNG and stage.name != plan.COMPILE.name:
                self.hung.add(report.kind_of(ending.case))
        # A job that went on after a crash did not end well.
        worst = next((ending for ending in endings if ending.outcome not in (OK, FAILED)), endings[-1])
        self.record(stage, job, worst.outcome, time.monotonic() - start, worst.last)
        return worst.outcome

    def attempt(self, stage: Stage, job: str, done: int, until: float) -> Ending:
        command = plan.command(stage, job, self.name, self.results, self.commit, self.rehearse)
        if stage.resumes:
            command += ["--after", str(done), *(word for kind in sorted(self.hung) for word in ("--without", kind))]
        name = f"{stage.name} {job}".strip()
        self.log.write(name, f"== {' '.join(command)}")
        return Watched(name, command, self.environment, self.log).wait(stage.silence, until, self.stop)

    def record(self, stage: Stage, job: str, outcome: str, seconds: float = 0.0, last: str = "") -> None:
        line = {"stage": stage.name, "job": job, "outcome": outcome, "seconds": round(seconds, 1), "last": last}
        results.append(self.results, line)
        print(f"== {f'{stage.name} {job}':24} {outcome:24} {seconds:6.1f} s", flush=True)

    def summary(self) -> str:
        """Return the times and what is missing, as far as they fit, and what became of each stage."""
        lines = results.read(self.results)[self.earlier :]
        machine = next(
            (f", {run['device']}, commit {run['commit']}" for run in (line.get("run") for line in lines) if run), ""
        )
        last = f"{report.outcomes(lines)}\n== call {self.name}{machine}: {time.monotonic() - self.start:.0f} s"
        missing = self.fitting("\n".join(report.missing(lines)), MISSING)
        times = self.fitting(report.plain(lines), SUMMARY - len(missing) - len(last))
        return "\n".join(filter(None, (times, missing, last)))

    def fitting(self, text: str, length: int) -> str:
        """Return the beginning of a text, and where the rest is."""
        return text if len(text) <= length else f"{text[: max(0, length)]}\n... all are in {self.results.name}"


def positive_seconds(text: str) -> float:
    with suppress(ValueError):
        if (seconds := float(text)) > 0:
            return seconds
    raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/gpu.sh", description="See the head of bench/gpu.sh.")
    parser.add_argument("call", choices=(*plan.CALLS, *plan.STAGES), metavar="CALL", help="A, B or a stage")
    parser.add_argument("out", type=Path, help="folder of the results")
    parser.add_argument("--commit", default="", help="the commit that is measured, where git does not know it")
    parser.add_argument(
        "--seconds", type=positive_seconds, help="the time of the call; by default 240 for A, 430 for B"
    )
    parser.add_argument("--rehearse", action="store_true", help="try it on a CPU, at tiny sizes, with longer limits")
    return parser.parse_args(arguments)


def main() -> int:
    chosen = parsed()
    seconds, stages = plan.call(chosen.call)
    try:
        chosen.out.mkdir(parents=True, exist_ok=True)
        call = Call(chosen.call, chosen.out, chosen.seconds or seconds, chosen.commit, chosen.rehearse)
    except OSError as error:
        sys.exit(f"error: the results cannot be written: {error}")
    for how in (signal.SIGTERM, signal.SIGINT):
        signal.signal(how, lambda *_: call.stop.set())
    succeeded = call.run(stages)
    print(call.summary())
    return 0 if succeeded else 1


if __name__ == "__main__":
    sys.exit(main())
