"""Every kernel with every entry of the launch table, compiled ahead of time for sm_80 and sm_90.

What it shows holds for the Triton that is installed; `make test-triton36` runs it with Triton 3.6.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dspa_kernels.launch import REGISTERS, STEER_WARPS, table

ROOT = Path(__file__).parents[2]
# Shared memory of a multiprocessor, and what of it every program has reserved, in bytes.
SHARED, RESERVED = {80: 164 * 1024, 90: 228 * 1024}, 1024
Facts = dict[str, Any]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Facts]]:
    """The facts of `aot.py`, from processes of their own that run beside each other."""
    folder = tmp_path_factory.mktemp("compiled")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    running = {
        capability: subprocess.Popen(
            [sys.executable, "-m", "tests.kernels.aot", str(capability), str(folder / f"{capability}.json")],
            cwd=ROOT,
            env=environment,
        )
        for capability in SHARED
    }
    assert [process.wait() for process in running.values()] == [0] * len(running), "a kernel does not compile"
    return {capability: json.loads((folder / f"{capability}.json").read_text()) for capability in SHARED}


@pytest.fixture(params=list(SHARED))
def capability(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def launches(compiled: dict[int, list[Facts]], capability: int) -> Iterator[Facts]:
    for call in compiled[capability]:
        yield from call["launches"]


def precisions(each: Facts) -> list[int]:
    """How the products of a kernel multiply; none where it has no product."""
    names = ("PRECISION", "ADAPTER", "ENCODER", "DECODER")
    return [each["launch"][name] for name in names if name in each["launch"]]


def test_a_step_is_one_launch(compiled: dict[int, list[Facts]], capability: int) -> None:
    for call in compiled[capability]:
        few = call["op"] == "fsrl_residual" and "BLOCK_D" in call["launches"][-1]["launch"] and not call["ranked"]
        if few or call["op"] in ("steer", "lookup_and_steer", "map_lookup", "sparse_decode"):
            assert len(call["launches"]) == 1, call["op"]


def test_no_spills_and_no_local_memory(compiled: dict[int, list[Facts]], capability: int) -> None:
    for each in launches(compiled, capability):
        assert (each["STACK"], each["LOCAL"], each["local_accesses"]) == (0, 0, 0), each


def test_the_programs_of_a_multiprocessor_fit_on_it(compiled: dict[int, list[Facts]], capability: int) -> None:
    """A cooperative launch of more programs than run at one time would fail."""
    for each in launches(compiled, capability):
        programs = each["programs"] if each["launch"].get("launch_cooperative_grid") else 1
        threads = 32 * each["launch"]["num_warps"]
        assert programs * threads * each["REG"] <= REGISTERS, each
        assert programs * (each["shared"] + RESERVED) <= SHARED[capability], each


def test_sixteen_bits_multiply_on_tensor_cores(compiled: dict[int, list[Facts]], capability: int) -> None:
    multiplying = [each for each in launches(compiled, capability) if precisions(each)]
    assert multiplying
    for each in multiplying:
        assert (each["tensor_cores"] > 0) == (min(precisions(each)) < 2), each


def test_tiles_are_copied_sixteen_bytes_at_a_time(compiled: dict[int, list[Facts]], capability: int) -> None:
    for each in launches(compiled, capability):
        if precisions(each):
            assert each["wide_copies"] > 0, each


def test_a_block_barrier_before_every_ticket(compiled: dict[int, list[Facts]], capability: int) -> None:
    cooperative = [each for each in launches(compiled, capability) if each["launch"].get("launch_cooperative_grid")]
    assert cooperative
    for each in cooperative:
        barriers = 1 if each["name"] == "step_kernel" else 2
        assert each["tickets"] >= barriers and each["unguarded_tickets"] == 0, each
        assert each["waits"] >= barriers and each["unfinished_waits"] == 0, each


def test_all_entries_of_steer_have_as_many_warps() -> None:
    """Sums over a block follow its layout, so that the bits of a row would else depend on its batch."""
    entries = [entry for entry in table() if entry.kernel.startswith("steer")]
    assert {entry.launch.num_warps for entry in entries} == {STEER_WARPS}
