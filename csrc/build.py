"""Compile csrc/ into a shared library: with nvcc for GPUs, or with the C++ compiler for tests without a GPU.

    python csrc/build.py --out FOLDER [--emulated]

ninja compiles only what has changed since the last build in the same folder. Environment variables: CUDA_HOME or
CUDA_PATH (the toolkit's folder), TORCH_CUDA_ARCH_LIST (in torch's format), MAX_JOBS, and CXX for `--emulated`.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).resolve().parent
LIBRARY = "libdspa_kernels.so"
EMULATED_LIBRARY = "libdspa_emulated.so"
DEFAULT_TOOLKIT = Path("/usr/local/cuda")
JOB_BYTES = 4 * 2**30

# nvcc's names: sm_* is machine code, and compute_* is PTX, which drivers compile for later GPUs.
# The PTX is of the first generation that has every instruction of the kernels. PTX of a later one would contain the
# same instructions and run on fewer GPUs: not on those of compute capability 11.0.
DEFAULT_ARCHITECTURES = ("sm_80", "sm_90", "compute_90")
# Also by default where nvcc knows them, from 12.8 on.
BLACKWELL = ("sm_100", "sm_120")
OLDEST = 80
# The meaning of these names in torch.utils.cpp_extension.
GENERATIONS = {
    "Ampere": "8.0;8.6+PTX",
    "Ampere+Tegra": "8.7",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
    "Blackwell+Tegra": "11.0",
}

# nvcc's own warnings are errors. Those of ptxas (spilled registers) and of the host's compiler are not, because they
# depend on the architectures and versions that a user chooses.
NVCC_FLAGS = (
    "-std=c++17 -O3 --fmad=false -lineinfo -Xcompiler -fPIC,-fvisibility=hidden -Xcudafe --promote_warnings "
    "-Xptxas -v,-warn-spills,-warn-lmem-usage"
)
EMULATED_FLAGS = "-x c++ -std=c++17 -O1 -g -fPIC -ffp-contract=off -U_FORTIFY_SOURCE"


class BuildError(RuntimeError):
    """The library was not built. The message says why and what to do."""


class ToolkitMissing(BuildError):
    """No CUDA toolkit was found."""


@dataclass(frozen=True)
class CudaLibrary:
    """A compiled library, the architectures it has code for (in nvcc's names) and the version of nvcc."""

    path: Path
    architectures: tuple[str, ...]
    nvcc: str


def build_cuda(out: Path, csrc: Path = CSRC) -> CudaLibrary:
    """Compile `csrc`/*.cu for GPUs in the folder `out`, with a ptxas report next to each object.

    Raises:
        ToolkitMissing: if nvcc is not found.
        BuildError: if anything else is missing or fails.
    """
    nvcc = find_nvcc()
    version = nvcc_version(nvcc)
    known = nvcc_output(nvcc, "--list-gpu-code").split()
    targets = architectures(known)
    check_known(known, version, targets)
    path = run_ninja(out, cuda_ninja_file(csrc, nvcc, targets), LIBRARY)
    return CudaLibrary(path, targets, version)


def build_emulated(out: Path, csrc: Path = CSRC) -> Path:
    """Compile `csrc`/*.cu with the host's compiler and the CPU primitives of `csrc`/emulated in the folder `out`."""
    return run_ninja(out, emulated_ninja_file(csrc, os.environ.get("CXX") or "g++"), EMULATED_LIBRARY)


def find_nvcc() -> Path:
    """Return the nvcc of CUDA_HOME, of CUDA_PATH, on PATH or in /usr/local/cuda, in this order."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if folder := os.environ.get(variable):
            if nvcc := nvcc_in(Path(folder, "bin")):
                return nvcc
            raise ToolkitMissing(
                f"no CUDA toolkit: {variable} is {folder!r}, which has no bin/nvcc; "
                "set it to the folder of a CUDA toolkit, or unset it"
            )
    if nvcc := nvcc_in(None) or nvcc_in(DEFAULT_TOOLKIT / "bin"):
        return nvcc
    raise ToolkitMissing(
        f"no CUDA toolkit: CUDA_HOME and CUDA_PATH are not set, and nvcc is neither on PATH nor in {DEFAULT_TOOLKIT}; "
        "install a CUDA toolkit, or set CUDA_HOME to its folder"
    )


def nvcc_in(folder: Path | None) -> Path | None:
    """Return the nvcc in a folder or, for None, on PATH."""
    nvcc = shutil.which("nvcc", path=folder)
    # /usr/local/cuda links to a version. With the real path, another version is another command for ninja, which then
    # compiles again.
    return Path(nvcc).parent.resolve() / "nvcc" if nvcc else None


def nvcc_output(nvcc: Path, option: str) -> str:
    """Return what nvcc prints for an option."""
    return subprocess.run([nvcc, option], capture_output=True, text=True, check=False).stdout


def nvcc_version(nvcc: Path) -> str:
    """Return the toolkit's version, such as 13.0."""
    release = re.search(r"release (\d+\.\d+)", nvcc_output(nvcc, "--version"))
    if not release:
        raise BuildError(f"{nvcc} --version shows no release; set CUDA_HOME to the folder of a working CUDA toolkit")
    return release[1]


def find_ninja() -> str:
    """Return ninja on PATH or in the Python package, whose folder need not be on PATH."""
    if ninja := shutil.which("ninja"):
        return ninja
    try:
        from ninja import BIN_DIR
    except ImportError:
        raise BuildError("ninja was not found; pip install ninja") from None
    return str(Path(BIN_DIR, "ninja"))


def architectures(known: Sequence[str]) -> tuple[str, ...]:
    """Return nvcc's names of TORCH_CUDA_ARCH_LIST, such as "8.0;9.0a+PTX" or "Hopper", or the default.

    `known` are the sm_* names for which nvcc compiles.

    Older devices are left out, because some lists are made for many packages. A list of older devices only is an error.
    """
    names = [name for name in re.split(r"[;\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "")) if name]
    capabilities = [capability for name in names for capability in GENERATIONS.get(name, name).split(";")]
    supported = [capability for capability in capabilities if not is_too_old(capability)]
    targets = [target for capability in supported or capabilities for target in targets_of(capability)]
    return tuple(dict.fromkeys(targets)) or (*DEFAULT_ARCHITECTURES, *(name for name in BLACKWELL if name in known))


def is_too_old(capability: str) -> bool:
    """Return True for a compute capability that the kernels do not run on."""
    match = re.fullmatch(r"(\d+)\.(\d)(\+PTX)?", capability)
    return match is not None and int(match[1] + match[2]) < OLDEST


def targets_of(capability: str) -> list[str]:
    """Return nvcc's names for a compute capability of torch's list: "9.0a+PTX" is sm_90a and compute_90a."""
    match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", capability)
    if not match or int(match[1] + match[2]) < OLDEST:
        raise BuildError(
            f"TORCH_CUDA_ARCH_LIST has {capability!r}; accepted: compute capabilities from {OLDEST / 10} on, "
            f"such as 8.0, 9.0a or 9.0+PTX, and {', '.join(GENERATIONS)}. Without the variable: "
            f"{', '.join((*DEFAULT_ARCHITECTURES, *BLACKWELL))}"
        )
    number = match[1] + match[2] + match[3]
    return [f"sm_{number}", *([f"compute_{number}"] if match[4] else [])]


def check_known(known: Sequence[str], version: str, targets: Sequence[str]) -> None:
    """Raise `BuildError` for an architecture that nvcc does not know."""
    for name in targets:
        # The list does not contain variants such as sm_90a.
        if name.replace("compute", "sm").rstrip("af") not in known:
            raise BuildError(
                f"nvcc {version} does not compile for {name}, but for {', '.join(known)}; "
                "set TORCH_CUDA_ARCH_LIST to some of these, or use another CUDA toolkit"
            )


def jobs() -> int:
    """Return the number of compilers to run at once: MAX_JOBS, or as many as cores and free memory allow."""
    if max_jobs := os.environ.get("MAX_JOBS"):
        if not max_jobs.isdecimal() or int(max_jobs) < 1:
            raise BuildError(f"MAX_JOBS is {max_jobs!r}; accepted: a whole number from 1 on")
        return int(max_jobs)
    return max(1, min(len(os.sched_getaffinity(0)), available_memory() // JOB_BYTES))


def available_memory() -> int:
    """Return the number of bytes that can be used without swapping."""
    available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return int(available[1]) * 1024 if available else 0


def cuda_ninja_file(csrc: Path, nvcc: Path, architectures: Sequence[str]) -> str:
    """Return the build.ninja of the library for GPUs."""
    targets = " ".join(f"-gencode=arch={name.replace('sm', 'compute')},code={name}" for name in architectures)
    flags = f"{NVCC_FLAGS} {targets} -I {word(csrc.resolve() / 'device')}"
    command = f"{word(nvcc)} {flags} -MD -MF $out.d -c $in -o $out >$out.ptxas 2>&1"
    return ninja_file(
        kernels(csrc),
        f"if {command}; then grep warning $out.ptxas || true; else cat $out.ptxas; exit 1; fi",
        # A symbol that only the driver has would keep the library from loading where there is no driver.
        f"{word(nvcc)} -shared -cudart static -Xlinker --no-undefined $in -o $out",
        LIBRARY,
    )


def emulated_ninja_file(csrc: Path, cxx: str) -> str:
    """Return the build.ninja of the library for this machine's CPU. `cxx` is a command line."""
    emulated, compiler = csrc.resolve() / "emulated", cxx.replace("$", "$$")
    return ninja_file(
        [*kernels(csrc), *sorted(emulated.glob("*.cpp"))],
        f"{compiler} {EMULATED_FLAGS} -I {word(emulated)} -MD -MF $out.d -c $in -o $out",
        f"{compiler} -shared -Wl,--no-undefined $in -o $out",
        EMULATED_LIBRARY,
    )


def kernels(csrc: Path) -> list[Path]:
    """Return the .cu files in a fixed order."""
    sources = sorted(csrc.resolve().glob("*.cu"))
    if not sources:
        raise BuildError(f"there is no .cu file in {csrc}; build from the whole source tree")
    return sources


def ninja_file(sources: Sequence[Path], compile_command: str, link_command: str, library: str) -> str:
    """Return a build.ninja that compiles each source, tracks the headers it includes, and links all into `library`."""
    objects = {escape(f"{source.name}.o"): escape(str(source)) for source in sources}
    return "\n".join(
        [
            *("rule compile", f"  command = {compile_command}", "  description = compile $in"),
            *("  depfile = $out.d", "  deps = gcc"),
            *("rule link", f"  command = {link_command}", "  description = link $out"),
            *(f"build {name}: compile {source}" for name, source in objects.items()),
            f"build {library}: link {' '.join(objects)}",
            "",
        ]
    )


def word(path: Path) -> str:
    """Quote a path as one word of a shell command in a ninja file."""
    return shlex.quote(str(path)).replace("$", "$$")


def escape(path: str) -> str:
    """Escape a path for a build line of ninja."""
    return re.sub(r"[$ :]", r"$\g<0>", path)


def run_ninja(out: Path, ninja_file: str, library: str) -> Path:
    """Run ninja in the folder `out`, one process at a time, and return the library's path."""
    import fcntl  # only on POSIX, but setup.py imports this module everywhere

    ninja, parallel = find_ninja(), str(jobs())
    out.mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (out / "build.ninja").write_text(ninja_file)
        done = subprocess.run([ninja, "-j", parallel], cwd=out, check=False)
    if done.returncode:
        raise BuildError(f"compiling {library} failed; the output of the build has the errors (pip shows it with -v)")
    return out / library


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for objects and the library")
    parser.add_argument("--emulated", action="store_true", help="compile for the CPU, to test kernels without a GPU")
    arguments = parser.parse_args()
    try:
        (build_emulated if arguments.emulated else build_cuda)(arguments.out)
    except (BuildError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
