"""A kernel that only reads. It empties the cache between measurements, and its rate is the ceiling of all others.

Given nothing to read, it shows what a launch takes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["n_blocks", "n_programs"])
def read_kernel(p_x, p_sum, n_blocks, n_programs, BLOCK: tl.constexpr):
    """sum[i] = sum of the blocks i, i + n_programs, ... of x."""
    i_program = tl.program_id(0)
    o_x = tl.arange(0, BLOCK)
    b_sum = tl.zeros([BLOCK], dtype=tl.float32)
    for i in range(i_program, n_blocks, n_programs):
        b_sum += tl.load(p_x + tl.cast(i, tl.int64) * BLOCK + o_x)
    tl.store(p_sum + i_program, tl.sum(b_sum, axis=0))


@dataclass(frozen=True)
class Reader:
    """A way to launch `read_kernel`."""

    block: int
    num_warps: int
    programs: int

    def __str__(self) -> str:
        return f"{self.programs} x {self.num_warps} warps, {self.block} numbers"

    def __call__(self, x: Tensor) -> Tensor:
        """Read all of `x` (a whole number of blocks of fp32, in any dtype); returns partial sums."""
        words = x.view(-1).view(torch.float32)
        n_blocks = len(words) // self.block
        assert n_blocks * self.block == len(words), (
            f"{len(words)} words are not a whole number of blocks of {self.block}"
        )
        count = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
        n_programs = min(n_blocks, self.programs * count)
        sums = torch.empty(n_programs, device=x.device)
        read_kernel[(n_programs,)](words, sums, n_blocks, n_programs, BLOCK=self.block, num_warps=self.num_warps)
        return sums


def launch_only(device: torch.device) -> Tensor:
    """Launch one program per multiprocessor, cooperatively, that reads nothing; returns a zero of each."""
    count = torch.cuda.get_device_properties(device).multi_processor_count
    sums = torch.empty(count, device=device)
    read_kernel[(count,)](sums, sums, 0, count, BLOCK=256, num_warps=8, launch_cooperative_grid=True)
    return sums


def readers() -> Iterator[Reader]:
    """The readers to try on several GB."""
    return itertools.starmap(Reader, itertools.product((2048, 4096, 8192), (4, 8), (2, 4, 8, 16)))


# Those to try on one encoder. The first has the grid of `steer`: one program of 8 warps per multiprocessor.
FEW_READERS = (
    Reader(16384, 8, 1),
    Reader(8192, 8, 2),
    Reader(4096, 8, 4),
    Reader(4096, 4, 8),
    Reader(2048, 4, 8),
    Reader(2048, 4, 16),
)
