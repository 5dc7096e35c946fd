"""Launch parameters of the kernels, from a fixed table; nothing is tuned at run time.

`launch_table.json` holds one entry a line: kernel, how its tiles multiply (0 operands of one 16-bit dtype, 1
fp32 rows with bf16 weights, 2 fp32), the compute capability from which on and the number of rows up to which
it serves (null: any), the shape for which it was measured (null: any), and the parameters. The first entry
that fits is taken. `bench/tune.py` measures and writes it.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).parent / "launch_table.json"


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
        # Fused where a product is meant, never where a comparison depends on the rounding.
        return options | {"enable_fp_fusion": False}


@dataclass(frozen=True)
class Entry:
    """A line of the table."""

    kernel: str
    precision: int
    capability: int
    rows: int | None
    d_in: int | None
    d_sae: int | None
    launch: Launch

    def fits(self, kernel: str, rows: int, d_in: int, d_sae: int, precision: int, capability: int) -> bool:
        """Whether this entry serves such a launch."""
        return (
            (self.kernel, self.precision) == (kernel, precision)
            and capability >= self.capability
            and (self.rows is None or rows <= self.rows)
            and self.d_in in (None, d_in)
            and self.d_sae in (None, d_sae)
        )


@functools.cache
def table() -> tuple[Entry, ...]:
    """All entries, in their order."""
    lines = json.loads(TABLE.read_text())
    return tuple(Entry(**{**line, "launch": Launch(**line["launch"])}) for line in lines)


@functools.cache
def capability_of(device: torch.device) -> int:
    """Compute capability, 90 for Hopper; that of the oldest supported, 80, where there is no GPU."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def launch_parameters(
    kernel: str, n_rows: int, d_in: int, d_sae: int, precision: int, device: torch.device
) -> Launch:
    """The parameters of a kernel's launch on `device`."""
    capability = capability_of(device)
    return next(e.launch for e in table() if e.fits(kernel, n_rows, d_in, d_sae, precision, capability))
