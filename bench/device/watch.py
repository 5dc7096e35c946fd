"""One process under a watch: its output to the log, and an end to it, with all its children, once it takes too long."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What a stage prints before each of its cases: the number of the case, and what it is.
CASE = re.compile(r"case (\d+) of \d+: (.*)")
OK, FAILED, CRASHED, HUNG, LATE = "ok", "failed", "crashed", "hung", "over its time"
# The status of a stage in which a result was wrong or a case failed, and of one that cannot go on after a case. They
# differ from those of a program that Python ends.
SOME_FAILED, LOST = 10, 11
# A larger file would not come back from some machines.
MOST_LOGGED = 8 << 20
# Seconds to end after SIGTERM, and after SIGKILL.
GRACE = 3.0


@dataclass(frozen=True)
class Ending:
    """How a process ended.

    Attributes:
        outcome: OK, FAILED (some of its cases), CRASHED, HUNG or LATE.
        status: its exit status, negative for a signal.
        number: the number of the case that it had begun last, 0 if there was none.
        case: that case.
        last: the last line of its output.
    """

    outcome: str
    status: int | None
    number: int
    case: str
    last: str


class Log:
    """The file that takes the output of all processes, up to MOST_LOGGED characters."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a")
        self._lock = threading.Lock()

    def write(self, name: str, line: str) -> None:
        with self._lock:
            if self._file.tell() < MOST_LOGGED:
                self._file.write(f"[{name}] {line.rstrip()}\n")
                self._file.flush()


class Watched:
    """A process in a process group of its own."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Log) -> None:
        self.name, self.log = name, log
        self.number, self.case, self.last, self.heard = 0, "", "", time.monotonic()
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.heard, self.last = time.monotonic(), line.strip() or self.last
            if match := CASE.match(line):
                self.number, self.case = int(match[1]), match[2]
            self.log.write(self.name, line)

    def wait(self, silence: float, until: float, stop: threading.Event) -> Ending:
        """Wait for the end, which comes at the latest `silence` seconds after the last output, and at `until`."""
        outcome = ""
        while self.process.poll() is None and not outcome:
            stop.wait(0.05)
            if time.monotonic() - self.heard > silence:
                outcome = HUNG
            elif time.monotonic() > until or stop.is_set():
                outcome = LATE
        self.end()
        self.reader.join(1)
        status = self.process.poll()
        ended = CRASHED if status is None else {0: OK, SOME_FAILED: FAILED}.get(status, CRASHED)
        return Ending(outcome or ended, status, self.number, self.case, self.last)

    def end(self) -> None:
        """End the process if it runs, and whatever it has started. What cannot be ended is left behind."""
        children = descendants(self.process.pid)
        for how in (signal.SIGTERM, signal.SIGKILL):
            if self.process.poll() is None or how == signal.SIGKILL:
                send(how, self.process.pid, children)
            try:
                self.process.wait(GRACE)
            except subprocess.TimeoutExpired:
                self.log.write(self.name, f"still running {GRACE:.0f} s after {how.name}")


def send(how: signal.Signals, leader: int, others: Sequence[int]) -> None:
    """Signal a process group, and other processes."""
    calls: list[tuple[Any, int]] = [(os.killpg, leader), *((os.kill, pid) for pid in others)]
    for call, pid in calls:
        try:
            call(pid, how)
        except (ProcessLookupError, PermissionError):
            continue


def descendants(pid: int) -> list[int]:
    """Return the processes that a process and its children have started, in other process groups, too."""
    parents: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The command, in brackets, may contain anything.
            _, _, fields = status.read_text().rpartition(")")
        except OSError:
            continue
        parents.setdefault(int(fields.split()[1]), []).append(int(status.parent.name))
    waiting, below = [pid], []
    while waiting:
        children = parents.get(waiting.pop(), [])
        waiting += children
        below += children
    return below
