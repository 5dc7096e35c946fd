"""Costs of making a method, as its record keeps them: operations, wall time and peak memory, and what they are of."""

from __future__ import annotations

import json
import platform
import resource
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from dspa.errors import refusal
from dspa.outputs import write_atomically
from dspa.schemas import Count, NonNegative, PositiveInt, Text, check, read_json, schema

CPUINFO = Path("/proc/cpuinfo")
# End of the name of the file beside a map or a vector, whose own files are the same whenever they are made.
BESIDE = ".costs.json"
# Where folders keep them: those of counts, and of trainings, whose entry it is.
COSTS, TRAINING, ENTRY = "costs.json", "training.json", "costs"


@schema
class Measured:
    """Wall time and peak memory of work, which one process or several did in one run or in several.

    Attributes:
        seconds: wall time, all runs together. What a stopped run did after its last checkpoint does not count.
        peak_rss_bytes: largest resident memory of the first process up to the end of the work, all that it had loaded
            and done before included.
        peak_gpu_bytes: largest memory that torch allocated on its GPU in the same sense, or None without a GPU.
        machine: what did the work, of every run.
        processes: number of processes.
    """

    seconds: NonNegative
    peak_rss_bytes: Count
    peak_gpu_bytes: Count | None
    machine: Text
    processes: PositiveInt = 1

    def __add__(self, other: Measured) -> Measured:
        """Return what two pieces of work took, one after the other."""
        machines = sorted({*self.machine.split("; "), *other.machine.split("; ")})
        gpus = [peak for peak in (self.peak_gpu_bytes, other.peak_gpu_bytes) if peak is not None]
        return Measured(
            seconds=self.seconds + other.seconds,
            peak_rss_bytes=max(self.peak_rss_bytes, other.peak_rss_bytes),
            peak_gpu_bytes=max(gpus, default=None),
            machine="; ".join(machines),
            processes=max(self.processes, other.processes),
        )


@schema
class Costs:
    """Costs of making a method from preference triples.

    Attributes:
        method: name of the method, or of a stage of it.
        flops: floating-point operations, as `dspa.models.operations` counts them, without those on padding.
        measured: time and memory.
        triples: digest of the triples, or of rankings, in any order.
        n_triples: number of them.
        model_name: name of the model that was used, or trained further.
        model_digest: digest of its weights before, as `dspa.models.sources.model_digest`, empty if that is not known.
        model_dtype: dtype of its weights.
        trained_digest: the same of the model that came out, where all weights were trained.
    """

    method: Text
    flops: Count
    measured: Measured
    triples: Text
    n_triples: PositiveInt
    model_name: Text
    model_digest: Text
    model_dtype: Text
    trained_digest: Text = ""


def write_costs(path: Path, costs: Costs | None) -> None:
    """Write the costs of a map or a vector beside its file, or remove what is there where they are not known.

    Args:
        path: the file of the map or vector.
        costs: its costs.
    """
    beside = path.with_name(path.name + BESIDE)
    if costs is None:
        beside.unlink(missing_ok=True)
    else:
        write_atomically(beside, (json.dumps(asdict(costs), indent=2) + "\n").encode())


def read_costs(path: Path) -> Costs:
    """Return the costs of a map, a vector, a folder of counts or the folder of a finished training.

    Raises:
        ValueError: there is no such thing, it records no costs, or they are damaged.
    """
    if not path.exists():
        raise refusal(ValueError, "The path", path, "a map, a vector, a folder of counts, or one of a training")
    counts, training = path / COSTS, path / TRAINING
    file = (training if training.exists() else counts) if path.is_dir() else path.with_name(path.name + BESIDE)
    record = read_json(file, ValueError) if file.exists() else None
    if file == training:
        record = record.get(ENTRY) if isinstance(record, dict) else None
    if record is None:
        got, accepted = "without costs", "what this version of dspa-kernels made and finished"
        raise refusal(ValueError, str(path), got, accepted, "Make it again.")
    return check(Costs, record, ValueError, str(file))


class Meter:
    """Clock and memory of work that begins when the meter is made.

    Args:
        device: device that does the work.
        processes: number of processes.
    """

    def __init__(self, device: torch.device, processes: int = 1) -> None:
        self._device, self._processes = device, processes
        self._begin, self._earlier = time.perf_counter(), list[Measured]()

    def add(self, earlier: Measured) -> None:
        """Add what an earlier run of the same work took."""
        self._earlier.append(earlier)

    def measured(self) -> Measured:
        """Return what the work took so far, with that of earlier runs."""
        on_gpu = self._device.type == "cuda"
        now = Measured(
            seconds=time.perf_counter() - self._begin,
            peak_rss_bytes=_peak_rss(),
            peak_gpu_bytes=torch.cuda.max_memory_allocated(self._device) if on_gpu else None,
            machine=torch.cuda.get_device_name(self._device) if on_gpu else _cpu(),
            processes=self._processes,
        )
        return sum(self._earlier, now)


def _peak_rss() -> int:
    """Return the largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _cpu() -> str:
    """Return the name of the processor, and the number of threads of torch."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, '') or platform.machine()}, {torch.get_num_threads()} threads"
