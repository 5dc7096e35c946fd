"""Launch parameters of the kernels, from a fixed table. Nothing is tuned at run time.

`launch_table.json` holds one entry per line: kernel, precision (0 for operands of one 16-bit dtype, 1 for fp32 rows
with bf16 weights, 2 for fp32), compute capability, largest number of rows, the shape for which it was measured, and the
parameters. What a line leaves out may be anything, and an entry of `steer` serves `steer+int5`, too. The first entry
that fits is taken. Entries for any capability need at most 96 KB of shared memory per multiprocessor. The entries of
`steer` for one precision and capability have one BLOCK_K, on which the order of sums depends.

`cuda_table.json` lists in the same way where the CUDA backend was measured to be faster than Triton. Only there is it
chosen by default. `bench/tuning.py` measures and writes entries.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# How a tile multiplies: NATIVE takes operands of one 16-bit dtype as they are. SPLIT takes fp32 rows with bf16 weights,
# and splits rows into three bf16 parts, which is exact. FULL computes everything else in fp32.
NATIVE, SPLIT, FULL = 0, 1, 2
# The sums of `steer` that are not products follow the layout of a block. With the same number of warps in all its
# entries, the bits of a row do not depend on the entry.
STEER_WARPS = 8
# Registers of a multiprocessor, on every supported GPU.
REGISTERS = 65536
TABLE = Path(__file__).parent / "launch_table.json"
CUDA_TABLE = Path(__file__).parent / "cuda_table.json"


def precision(h: Tensor, W: Tensor, normalize: str) -> int:
    """Return how `h W^T` is multiplied, a value for `PRECISION`."""
    if h.dtype == W.dtype and W.dtype != torch.float32 and normalize == "none":
        return NATIVE
    return SPLIT if W.dtype == torch.bfloat16 else FULL


def steer_variant(k: int, screen_rows: Tensor | None) -> str:
    """Return the name of a launch of `steer` in the tables."""
    return "steer" + ("" if screen_rows is None else "+int5") + ("+topk" if k else "")


@dataclass(frozen=True)
class Launch:
    """Parameters of a launch.

    Attributes:
        BLOCK_N: rows of a tile.
        BLOCK_L: latents of a tile.
        BLOCK_K: step along d_in.
        num_stages: pipeline stages.
        num_warps: warps per program.
        programs: programs per multiprocessor.
        descriptors: operands are read through tensor descriptors, where the kernel and the GPU can.
    """

    BLOCK_N: int
    BLOCK_L: int
    BLOCK_K: int
    num_stages: int
    num_warps: int = 8
    programs: int = 1
    descriptors: bool = False

    def kernel_options(self) -> dict[str, Any]:
        """Return the keyword arguments of the kernel's launch."""
        options = {name: value for name, value in vars(self).items() if name not in ("programs", "descriptors")}
        # Per thread, as many as let all programs of a multiprocessor fit on it together.
        registers = min(255, REGISTERS // (32 * self.num_warps * self.programs) // 8 * 8)
        # Only products are fused, never arithmetic on whose rounding a comparison depends.
        return options | {"maxnreg": registers, "enable_fp_fusion": False}


@dataclass(frozen=True)
class Served:
    """The launches to which a line of a table applies: those of `kernel` and of its variants. None stands for any."""

    kernel: str
    precision: int
    capability: int | None = None
    rows: int | None = None
    d_in: int | None = None
    d_sae: int | None = None

    def fits(self, kernel: str, rows: int, d_in: int, d_sae: int, precision: int, capability: int) -> bool:
        """Return True if the line applies to such a launch."""
        return (
            (kernel == self.kernel or kernel.startswith(f"{self.kernel}+"))
            and self.precision == precision
            and self.capability in (None, capability)
            and (self.rows is None or rows <= self.rows)
            and self.d_in in (None, d_in)
            and self.d_sae in (None, d_sae)
        )


@dataclass(frozen=True)
class Entry(Served):
    """A line of the launch table."""

    launch: Launch = field(kw_only=True)


@dataclass(frozen=True)
class CudaEntry(Served):
    """A line of the CUDA table: launches that are faster than those of Triton, and their options.

    Attributes:
        programmatic: the launch may begin before the previous one on the stream has ended.
        ahead: the kernel starts to read the encoder before it knows whether a row needs it.
    """

    programmatic: bool = field(kw_only=True)
    ahead: bool = field(kw_only=True)


@functools.cache
def table() -> tuple[Entry, ...]:
    """Return all entries of the launch table, in order."""
    lines = json.loads(TABLE.read_text())
    return tuple(Entry(**{**line, "launch": Launch(**line["launch"])}) for line in lines)


@functools.cache
def capability_of(device: torch.device) -> int:
    """Return the compute capability, 90 for Hopper, 0 without a GPU."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def launch_parameters(kernel: str, n_rows: int, d_in: int, d_sae: int, precision: int, device: torch.device) -> Launch:
    """Return the parameters of a kernel's launch on `device`."""
    capability = capability_of(device)
    return next(entry.launch for entry in table() if entry.fits(kernel, n_rows, d_in, d_sae, precision, capability))


@functools.cache
def cuda_table() -> tuple[CudaEntry, ...]:
    """Return all entries of the CUDA table, in order."""
    return tuple(CudaEntry(**line) for line in json.loads(CUDA_TABLE.read_text()))


@functools.cache
def cuda_entry(
    kernel: str, n_rows: int, d_in: int, d_sae: int, precision: int, device: torch.device
) -> CudaEntry | None:
    """Return the entry if the CUDA backend is faster than Triton; None if it is not, or was not measured."""
    capability = capability_of(device)
    return next(
        (entry for entry in cuda_table() if entry.fits(kernel, n_rows, d_in, d_sae, precision, capability)), None
    )
