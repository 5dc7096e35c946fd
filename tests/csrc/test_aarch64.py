"""csrc/ for the CPU of Grace Hopper, with Debian's cross compiler g++-aarch64-linux-gnu."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
CXX = "aarch64-linux-gnu-g++"
EM_AARCH64 = 183
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")

pytestmark = pytest.mark.skipif(not shutil.which(CXX), reason=f"there is no {CXX}")


def build(out: Path, *options: str, **variables: str) -> str:
    """Run csrc/build.py and return its output."""
    command = [sys.executable, str(CSRC / "build.py"), "--out", str(out), *options]
    environment = os.environ | variables
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.stdout


def machine(file: Path) -> int:
    """Return the machine for which an ELF file was compiled."""
    (number,) = struct.unpack_from("<H", file.read_bytes(), offset=18)
    return int(number)


@pytest.mark.skipif(not NVCC, reason="there is no nvcc")
def test_every_source_of_the_library_compiles(tmp_path: Path) -> None:
    """nvcc takes the cross compiler for the host's code. Without NVIDIA's libraries for aarch64, nothing is linked."""
    dry_run = subprocess.run([str(NVCC), "--dryrun", "any.cu"], capture_output=True, text=True, check=True).stderr
    (toolkit,) = (line.removeprefix("#$ TOP=") for line in dry_run.splitlines() if line.startswith("#$ TOP="))
    # The headers of the toolkit are those of every host. Code for GPUs, which has its own tests, is not optimised.
    flags = f"-I {toolkit}/include -Xcicc -O0 -Xptxas -O0"
    output = build(tmp_path, TORCH_CUDA_ARCH_LIST="9.0", NVCC_CCBIN=CXX, NVCC_APPEND_FLAGS=flags)
    objects = {file.name: machine(file) for file in tmp_path.glob("*.o")}
    assert objects == {f"{source.name}.o": EM_AARCH64 for source in CSRC.glob("*.cu")}, output


def test_the_emulated_library_compiles(tmp_path: Path) -> None:
    output = build(tmp_path, "--emulated", CXX=CXX)
    library = tmp_path / "libdspa_emulated.so"
    assert library.exists() and machine(library) == EM_AARCH64, output
