"""Launch parameters of the kernels, from a fixed table; nothing is tuned at run time.

`launch_table.json` holds one entry a line: kernel, how its tiles multiply (0 operands of one 16-bit dtype, 1
fp32 rows with bf16 weights, 2 fp32), compute capability (null: any), the number of rows up to which it serves
(null: any), the shape for which it was measured (null: any), and the parameters. The first entry that fits is
taken. Those for any capability fit into 96 KB of shared memory a multiprocessor. `cuda_table.json` holds, in the
same way, where the CUDA backend was measured to be faster than Triton: there, and nowhere else, it is chosen
unasked. `bench/tuning/triton.py` and `bench/tuning/cuda.py` measure and write entries.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# How a tile multiplies: operands of one 16-bit dtype as they are; fp32 rows with bf16 weights, each row split
# into three bf16 parts, which lose nothing; everything else in fp32.
NATIVE, SPLIT, FULL = 0, 1, 2
# The sums of `steer` that are not products follow the layout of a block, so that all of its entries have as many
# warps: else the bits of a row would depend on which entry served it.
STEER_WARPS = 8
# Of a multiprocessor, on every supported GPU.
REGISTERS = 65536
TABLE = Path(__file__).parent / "launch_table.json"
CUDA_TABLE = Path(__file__).parent / "cuda_table.json"


def precision(h: Tensor, W: Tensor, normalize: str) -> int:
    """How `h W^T` is multiplied, a value for `PRECISION`."""
    if h.dtype == W.dtype and W.dtype != torch.float32 and normalize == "none":
        return NATIVE
    return SPLIT if W.dtype == torch.bfloat16 else FULL


def steer_variant(k: int, screen_rows: Tensor | None) -> str:
    """The name under which the tables know a launch of `steer`."""
    return "steer" + ("_topk" if k else "") + ("" if screen_rows is None else "_int8")


@dataclass(frozen=True)
class Launch:
    """One launch: tile sizes in rows, latents and d_in, warps a program, pipeline stages, programs a multiprocessor."""

    BLOCK_N: int
    BLOCK_L: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    programs: int

    def kernel_options(self) -> dict[str, Any]:
        """What a kernel is launched with."""
        options = {name: value for name, value in vars(self).items() if name != "programs"}
        # All registers that the programs of a multiprocessor can share; so they do fit on it together.
        registers = min(255, REGISTERS // (32 * self.num_warps * self.programs) // 8 * 8)
        # Fused where a product is meant, never where a comparison depends on the rounding.
        return options | {"maxnreg": registers, "enable_fp_fusion": False}


@dataclass(frozen=True)
class Served:
    """The launches that a line of a table is for."""

    kernel: str
    precision: int
    capability: int | None
    rows: int | None
    d_in: int | None
    d_sae: int | None

    def fits(self, kernel: str, rows: int, d_in: int, d_sae: int, precision: int, capability: int) -> bool:
        """Whether such a launch is among them."""
        return (
            (self.kernel, self.precision) == (kernel, precision)
            and self.capability in (None, capability)
            and (self.rows is None or rows <= self.rows)
            and self.d_in in (None, d_in)
            and self.d_sae in (None, d_sae)
        )


@dataclass(frozen=True)
class Entry(Served):
    """A line of the launch table."""

    launch: Launch


@dataclass(frozen=True)
class CudaEntry(Served):
    """A line of the CUDA table: launches that are faster than Triton's, and how.

    programmatic: they may begin before the launch ahead of them on the stream has ended. ahead: they read the first
    of the encoder before it is known whether a row needs it.
    """

    programmatic: bool
    ahead: bool


@functools.cache
def table() -> tuple[Entry, ...]:
    """All entries, in their order."""
    lines = json.loads(TABLE.read_text())
    return tuple(Entry(**{**line, "launch": Launch(**line["launch"])}) for line in lines)


@functools.cache
def capability_of(device: torch.device) -> int:
    """Compute capability, 90 for Hopper; 0 where there is no GPU."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def launch_parameters(kernel: str, n_rows: int, d_in: int, d_sae: int, precision: int, device: torch.device) -> Launch:
    """The parameters of a kernel's launch on `device`."""
    capability = capability_of(device)
    return next(e.launch for e in table() if e.fits(kernel, n_rows, d_in, d_sae, precision, capability))


@functools.cache
def cuda_table() -> tuple[CudaEntry, ...]:
    """All entries, in their order."""
    return tuple(CudaEntry(**line) for line in json.loads(CUDA_TABLE.read_text()))


@functools.cache
def cuda_entry(
    kernel: str, n_rows: int, d_in: int, d_sae: int, precision: int, device: torch.device
) -> CudaEntry | None:
    """Where the CUDA backend is faster than Triton on `device`; None where it is not, or was not measured."""
    capability = capability_of(device)
    return next((e for e in cuda_table() if e.fits(kernel, n_rows, d_in, d_sae, precision, capability)), None)
