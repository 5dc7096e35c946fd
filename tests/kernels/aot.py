"""Compiling the kernels for GPUs that are not here, through their own launchers.

A stand-in for Triton's driver names the target; a launch then compiles and returns instead of running. So what
is compiled is what the launcher would launch: the same specialisation, constants and options.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Driver:
    """What Triton asks its driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@dataclass(frozen=True)
class Compiled:
    """A kernel as it was launched, and what the compiler made of it."""

    name: str
    options: dict[str, Any]
    grid: tuple[int, ...]
    asm: dict[str, Any]
    shared: int

    def dump(self, option: str) -> str:
        """The answer of cuobjdump about the machine code."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.asm["cubin"])
            file.flush()
            command = [str(CUOBJDUMP), option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def resources(self) -> dict[str, int]:
        """Registers, stack and local memory of a thread in bytes, from the machine code."""
        line = next(line for line in self.dump("--dump-resource-usage").splitlines() if "REG:" in line)
        return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", line)}


@contextmanager
def compiling(capability: int) -> Iterator[list[Compiled]]:
    """Launches of Triton kernels compile for `capability` and are listed, in order."""
    compiled: list[Compiled] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(Compiled(self.fn.__name__, kwargs, tuple(grid), kernel.asm, kernel.metadata.shared))
        return kernel

    properties = mock.Mock(multi_processor_count=132)
    with (
        mock.patch.object(driver, "_active", Driver(capability)),
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(torch.cuda, "get_device_properties", lambda _device: properties),
        mock.patch.object(torch.cuda, "current_stream", lambda _device: mock.Mock(cuda_stream=0)),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: False),
        mock.patch("dspa_kernels.launch.capability_of", lambda _device: capability),
    ):
        yield compiled
