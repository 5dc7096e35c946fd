"""Predict the time of a step that streams the whole encoder, from bytes and latencies: nothing is run or measured.

    python -m bench.offline.predict

prints the table of docs/kernels.md. The phases are those of the kernels, from a cold cache; the numbers of the hardware
are public figures of an H200, and a prediction is not meant to be nearer than a quarter.
"""

from __future__ import annotations

from math import ceil

from dspa_kernels.launch import NATIVE, Launch, table
from dspa_kernels.ops.steer.triton_select import BLOCK_S
from dspa_kernels.ops.steer.triton_tail import BLOCK_D

MULTIPROCESSORS = 132
# Bytes per microsecond: of the memory, the share that a steady stream reaches, and from the L2 cache.
MEMORY, STEADY, L2 = 4.3e6, 0.92, 5.6e6
# Microseconds: a load from memory, from the L2 cache, a barrier of all programs, the start of a launch.
LOAD, CACHED, BARRIER, START = 0.65, 0.25, 1.3, 1.0
SLOTS, LARGE = 16, 64
SHAPES = ((2304, 16384), (3584, 16384), (4096, 65536))
# Shared memory that the CUDA backend fills ahead, per multiprocessor.
AHEAD = 176 * 1024


def launch_of(rows: int) -> Launch:
    """Return the launch of `steer` for bf16 on Hopper."""
    return next(entry.launch for entry in table() if entry.fits("steer", rows, 0, 0, NATIVE, 90))


def select(rows: int, d_in: int, stages: int, step: int) -> float:
    """Rounds of items, each with the loads of its plan and then those of a product, `stages` steps at a time."""
    items = rows * (1 + ceil(SLOTS / BLOCK_S)) + ceil(LARGE / BLOCK_S)
    return ceil(items / MULTIPROCESSORS) * (3 * CACHED + ceil(d_in / step / stages) * LOAD)


def tail(rows: int, d_in: int) -> float:
    """Rounds of items, each with its summary, its slots and their decoder rows, which were prefetched."""
    return ceil(rows * ceil(d_in / BLOCK_D) / MULTIPROCESSORS) * 4 * CACHED


def triton(rows: int, d_in: int, d_sae: int) -> float:
    """All phases one after the other; residual rows come from the L2 cache once per tile of latents."""
    launch = launch_of(rows)
    weights = 2 * d_in * d_sae
    from_L2 = weights * (1 + min(rows, launch.BLOCK_N) / launch.BLOCK_L)
    stream = LOAD + max(weights / MEMORY / STEADY, from_L2 / L2)
    before = START + select(rows, d_in, launch.num_stages, launch.BLOCK_K) + BARRIER + 2 * CACHED
    return before + stream + BARRIER + tail(rows, d_in)


def cuda(rows: int, d_in: int, d_sae: int) -> float:
    """The stages are filled ahead, while rows are selected; residual rows stay in shared memory."""
    before = START + select(rows, d_in, 9, 64) + BARRIER + 2 * CACHED
    ahead = min(before - START, AHEAD * MULTIPROCESSORS / MEMORY / STEADY)
    return before + 2 * d_in * d_sae / MEMORY / STEADY - ahead + BARRIER + tail(rows, d_in)


def main() -> None:
    """Print the table, with an empty column for what a GPU measures."""
    print("| SAE, bf16 | rows | backend | read of the encoder, us | predicted, us | measured, us |")
    print("| --- | --- | --- | --- | --- | --- |")
    for d_in, d_sae in SHAPES:
        for rows, name, predict in ((1, "triton", triton), (1, "cuda", cuda), (64, "triton", triton)):
            floor = 2 * d_in * d_sae / MEMORY
            print(f"| {d_in} x {d_sae} | {rows} | {name} | {floor:.1f} | {predict(rows, d_in, d_sae):.0f} | |")


if __name__ == "__main__":
    main()
