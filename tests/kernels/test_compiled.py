"""Every Triton kernel with every entry of the launch table, compiled ahead of time for sm_80 and sm_90.

The results hold for the installed Triton. `make test-triton36` runs these tests with Triton 3.6.
"""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dspa_kernels.launch import FULL, NATIVE, REGISTERS, SPLIT, STEER_WARPS, table
from dspa_kernels.ops.steer.triton_kernel import PREPARE, TAIL

ROOT = Path(__file__).parents[2]
# Bytes of shared memory per multiprocessor, and those that every program reserves.
SHARED, RESERVED = {80: 164 * 1024, 90: 228 * 1024}, 1024
Facts = dict[str, Any]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Facts]]:
    """The facts of `aot.py` per capability, from one process each, which run at the same time."""
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


def precisions(kernel: Facts) -> list[int]:
    """The precisions in which a kernel multiplies, none for a kernel without a product."""
    names = ("PRECISION", "ADAPTER", "ENCODER", "DECODER")
    return [kernel["launch"][name] for name in names if name in kernel["launch"]]


def multiplies(kernel: Facts) -> bool:
    """Return True for a kernel with a product, which two phases of `steer` do not have."""
    return bool(precisions(kernel)) and kernel["launch"].get("PHASE") not in (PREPARE, TAIL)


def test_a_step_is_one_launch(compiled: dict[int, list[Facts]], capability: int) -> None:
    """Up to 64 rows, and up to 16 that multiply in fp32."""
    for call in compiled[capability]:
        few = call["op"] == "fsrl_residual" and "BLOCK_D" in call["launches"][-1]["launch"] and not call["ranked"]
        if call["op"] in ("steer", "steer_", "lookup_and_steer"):
            few = call["rows"] <= (64 if max(precisions(call["launches"][0])) < FULL else 16)
        if few or call["op"] in ("bit_counts", "map_lookup", "place_tokens", "sparse_decode"):
            assert len(call["launches"]) == 1, call["op"]


def test_no_spills_and_no_local_memory(compiled: dict[int, list[Facts]], capability: int) -> None:
    for kernel in launches(compiled, capability):
        assert (kernel["STACK"], kernel["LOCAL"], kernel["local_accesses"]) == (0, 0, 0), kernel


def test_the_programs_of_a_multiprocessor_fit_on_it(compiled: dict[int, list[Facts]], capability: int) -> None:
    """A cooperative launch of more programs than can run at the same time would fail."""
    for kernel in launches(compiled, capability):
        programs = kernel["programs"] if kernel["launch"].get("launch_cooperative_grid") else 1
        threads = 32 * kernel["launch"]["num_warps"]
        assert programs * threads * kernel["REG"] <= REGISTERS, kernel
        assert programs * (kernel["shared"] + RESERVED) <= SHARED[capability], kernel


def test_sixteen_bits_multiply_on_tensor_cores(compiled: dict[int, list[Facts]], capability: int) -> None:
    multiplying = [kernel for kernel in launches(compiled, capability) if multiplies(kernel)]
    assert multiplying
    for kernel in multiplying:
        assert (kernel["tensor_cores"] > 0) == (min(precisions(kernel)) < 2), kernel


def test_tiles_are_copied_sixteen_bytes_at_a_time_or_by_descriptors(
    compiled: dict[int, list[Facts]], capability: int
) -> None:
    for kernel in launches(compiled, capability):
        if multiplies(kernel):
            descriptors = kernel["launch"].get("DESCRIPTORS", False)
            assert (kernel["wide_copies"] > 0, kernel["descriptor_copies"] > 0) == (not descriptors, descriptors), (
                kernel
            )


def test_sixteen_bit_latents_are_read_through_descriptors_on_hopper(
    compiled: dict[int, list[Facts]], capability: int
) -> None:
    """A step waits for the products of the step before it, so that the tensor cores always have work.

    Sums take the registers that such tiles need.
    """
    calls = [call for call in compiled[capability] if (call["op"], call["ranked"]) != ("activation_sums", False)]
    encoding = [kernel for call in calls for kernel in call["launches"] if kernel["name"] == "encode_kernel"]
    assert encoding
    for kernel in encoding:
        on_hopper = capability == 90 and kernel["launch"]["PRECISION"] == NATIVE
        assert kernel["launch"]["DESCRIPTORS"] == on_hopper, kernel
        assert not on_hopper or kernel["products_under_way"] > 0, kernel


def test_a_screen_is_unpacked_faster_than_it_is_read(compiled: dict[int, list[Facts]]) -> None:
    """On Hopper, where a multiprocessor issues 4.9 instructions in the time in which it can read a number.

    That is 128 instructions of threads per cycle, for 4.3 TB/s over 132 multiprocessors at 1.98 GHz.
    """
    screened = [kernel for kernel in launches(compiled, 90) if kernel["unpacking_loop"]]
    assert {kernel["launch"]["PRECISION"] for kernel in screened} == {NATIVE, SPLIT}
    for kernel in screened:
        if kernel["launch"]["PRECISION"] == NATIVE:
            per_thread = kernel["launch"]["BLOCK_L"] * 256 / (32 * kernel["launch"]["num_warps"])
            assert kernel["unpacking_loop"] < 4.9 * per_thread, kernel


def test_a_block_barrier_before_every_ticket(compiled: dict[int, list[Facts]], capability: int) -> None:
    cooperative = [
        (kernel, call["streams"])
        for call in compiled[capability]
        for kernel in call["launches"]
        if kernel["launch"].get("launch_cooperative_grid")
    ]
    assert {streams for _, streams in cooperative} == {True, False}
    for kernel, streams in cooperative:
        barriers = 1 if kernel["name"] == "step_kernel" or not streams else 2
        assert kernel["tickets"] >= barriers and kernel["unguarded_tickets"] == 0, kernel
        assert kernel["waits"] >= barriers and kernel["unfinished_waits"] == 0, kernel


def test_all_entries_of_steer_have_as_many_warps() -> None:
    """Sums over a block follow its layout. With other warps, the bits of a row would depend on its batch."""
    entries = [entry for entry in table() if entry.kernel.startswith("steer")]
    assert {entry.launch.num_warps for entry in entries} == {STEER_WARPS}


def test_all_entries_of_steer_for_one_way_to_multiply_have_one_order_of_sums() -> None:
    """Products are summed part by part in steps of BLOCK_K. With another, a row would depend on its batch."""
    steps = collections.defaultdict(set)
    for entry in table():
        if entry.kernel.startswith("steer"):
            steps[entry.precision, entry.capability].add(entry.launch.BLOCK_K)
    assert len(steps) == 5 and all(len(blocks) == 1 for blocks in steps.values())
