"""Compiles csrc/ into a shared library: for GPUs with nvcc or, to be tested without one, with the C++ compiler.

    python csrc/build.py --out FOLDER [--emulated]

ninja compiles only what has changed since the last build in the same folder. Environment variables: CUDA_HOME or
CUDA_PATH (the toolkit's folder), TORCH_CUDA_ARCH_LIST (as torch reads it), MAX_JOBS, and CXX for `--emulated`.
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

# In nvcc's names: machine code is sm_*, PTX, which drivers compile for later GPUs, is compute_*.
DEFAULT_ARCHITECTURES = ("sm_80", "sm_90a", "compute_90")
OLDEST = 80
# What torch.utils.cpp_extension understands by these names.
GENERATIONS = {
    "Ampere": "8.0;8.6+PTX",
    "Ampere+Tegra": "8.7",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
    "Blackwell+Tegra": "11.0",
}

# nvcc's own warnings are errors. Those of ptxas (spilled registers) and of the host's compiler are not: they depend on
# architectures and versions that whoever installs this may choose.
NVCC_FLAGS = (
    "-std=c++17 -O3 --fmad=false -lineinfo -Xcompiler -fPIC,-fvisibility=hidden -Xcudafe --promote_warnings "
    "-Xptxas -v,-warn-spills,-warn-lmem-usage"
)
EMULATED_FLAGS = "-x c++ -std=c++17 -O1 -g -fPIC -ffp-contract=off -U_FORTIFY_SOURCE"


class BuildError(RuntimeError):
    """The library was not built; the message says why and what to do."""


class ToolkitMissing(BuildError):
    """There is no CUDA toolkit to build with."""


@dataclass(frozen=True)
class CudaLibrary:
    """A library that was built, what it holds code for (nvcc's names) and the version of nvcc."""

    path: Path
    architectures: tuple[str, ...]
    nvcc: str


def build_cuda(out: Path, csrc: Path = CSRC) -> CudaLibrary:
    """Compile `csrc`/*.cu for GPUs in the folder `out`, with the ptxas report of each object beside it.

    Raises `ToolkitMissing` without nvcc, and `BuildError` for whatever else is missing, wrong or fails.
    """
    nvcc = find_nvcc()
    version = nvcc_version(nvcc)
    wanted = architectures()
    check_known(nvcc, version, wanted)
    path = run_ninja(out, cuda_ninja_file(csrc, nvcc, wanted), LIBRARY)
    return CudaLibrary(path, wanted, version)


def build_emulated(out: Path, csrc: Path = CSRC) -> Path:
    """Compile `csrc`/*.cu with the host's compiler, on the CPU versions of the device primitives in `csrc`/emulated."""
    return run_ninja(out, emulated_ninja_file(csrc, os.environ.get("CXX") or "g++"), EMULATED_LIBRARY)


def find_nvcc() -> Path:
    """The nvcc of CUDA_HOME, of CUDA_PATH, on PATH or in /usr/local/cuda."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if folder := os.environ.get(variable):
            if found := nvcc_in(Path(folder, "bin")):
                return found
            raise ToolkitMissing(
                f"no CUDA toolkit: {variable} is {folder!r}, which has no bin/nvcc; "
                "set it to the folder of a CUDA toolkit, or unset it"
            )
    if found := nvcc_in(None) or nvcc_in(DEFAULT_TOOLKIT / "bin"):
        return found
    raise ToolkitMissing(
        f"no CUDA toolkit: CUDA_HOME and CUDA_PATH are not set, and nvcc is neither on PATH nor in {DEFAULT_TOOLKIT}; "
        "install a CUDA toolkit, or set CUDA_HOME to its folder"
    )


def nvcc_in(folder: Path | None) -> Path | None:
    """The nvcc in a folder, or on PATH."""
    found = shutil.which("nvcc", path=folder)
    # /usr/local/cuda is a link to a version: by its real name, another version is another command and compiles anew.
    return Path(found).parent.resolve() / "nvcc" if found else None


def ask(nvcc: Path, option: str) -> str:
    """What nvcc prints about itself."""
    return subprocess.run([nvcc, option], capture_output=True, text=True, check=False).stdout


def nvcc_version(nvcc: Path) -> str:
    """The toolkit's version, such as 13.0."""
    found = re.search(r"release (\d+\.\d+)", ask(nvcc, "--version"))
    if not found:
        raise BuildError(f"{nvcc} --version tells no release; set CUDA_HOME to the folder of a working CUDA toolkit")
    return found[1]


def find_ninja() -> str:
    """ninja on PATH, or that of the Python package, whose folder need not be on PATH."""
    if found := shutil.which("ninja"):
        return found
    try:
        from ninja import BIN_DIR
    except ImportError:
        raise BuildError("ninja was not found; pip install ninja") from None
    return str(Path(BIN_DIR, "ninja"))


def architectures() -> tuple[str, ...]:
    """What to compile for: TORCH_CUDA_ARCH_LIST, such as "8.0;9.0a+PTX" or "Hopper", or the default.

    Lists that are made for many packages name older devices, too, which are left out; one of nothing else is refused.
    """
    asked = [name for name in re.split(r"[;\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "")) if name]
    capabilities = [each for name in asked for each in GENERATIONS.get(name, name).split(";")]
    new_enough = [each for each in capabilities if not is_older(each)]
    found = [code for capability in new_enough or capabilities for code in codes(capability)]
    return tuple(dict.fromkeys(found)) or DEFAULT_ARCHITECTURES


def is_older(capability: str) -> bool:
    """Whether it is a compute capability that the kernels do not run on."""
    match = re.fullmatch(r"(\d+)\.(\d)(\+PTX)?", capability)
    return match is not None and int(match[1] + match[2]) < OLDEST


def codes(capability: str) -> list[str]:
    """nvcc's names for a compute capability of torch's list: "9.0a+PTX" is sm_90a and compute_90a."""
    match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", capability)
    if not match or int(match[1] + match[2]) < OLDEST:
        raise BuildError(
            f"TORCH_CUDA_ARCH_LIST has {capability!r}; accepted: compute capabilities from {OLDEST / 10} on, "
            f"such as 8.0, 9.0a or 9.0+PTX, and {', '.join(GENERATIONS)}. Without the variable: "
            f"{', '.join(DEFAULT_ARCHITECTURES)}"
        )
    number = match[1] + match[2] + match[3]
    return [f"sm_{number}", *([f"compute_{number}"] if match[4] else [])]


def check_known(nvcc: Path, version: str, wanted: Sequence[str]) -> None:
    """Raise `BuildError` for an architecture that this nvcc has not heard of."""
    known = ask(nvcc, "--list-gpu-code").split()
    for name in wanted:
        # The list leaves out the variants, sm_90a and the like.
        if name.replace("compute", "sm").rstrip("af") not in known:
            raise BuildError(
                f"nvcc {version} does not compile for {name}, but for {', '.join(known)}; "
                "set TORCH_CUDA_ARCH_LIST to what it compiles for, or use another CUDA toolkit"
            )


def jobs() -> int:
    """How many compilers run at once: MAX_JOBS, or as many as cores and free memory allow."""
    if asked := os.environ.get("MAX_JOBS"):
        if not asked.isdecimal() or int(asked) < 1:
            raise BuildError(f"MAX_JOBS is {asked!r}; accepted: a whole number from 1 on")
        return int(asked)
    return max(1, min(len(os.sched_getaffinity(0)), available_memory() // JOB_BYTES))


def available_memory() -> int:
    """Bytes that can be used without swapping."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return int(found[1]) * 1024 if found else 0


def cuda_ninja_file(csrc: Path, nvcc: Path, architectures: Sequence[str]) -> str:
    """The build.ninja of the library for GPUs."""
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
    """The build.ninja of the library for this machine's CPU; `cxx` is a command line."""
    emulated, compiler = csrc.resolve() / "emulated", cxx.replace("$", "$$")
    return ninja_file(
        [*kernels(csrc), *sorted(emulated.glob("*.cpp"))],
        f"{compiler} {EMULATED_FLAGS} -I {word(emulated)} -MD -MF $out.d -c $in -o $out",
        f"{compiler} -shared -Wl,--no-undefined $in -o $out",
        EMULATED_LIBRARY,
    )


def kernels(csrc: Path) -> list[Path]:
    """The .cu files, in an order that does not change."""
    found = sorted(csrc.resolve().glob("*.cu"))
    if not found:
        raise BuildError(f"there is no .cu file in {csrc}; build from the whole source tree")
    return found


def ninja_file(sources: Sequence[Path], compile_command: str, link_command: str, library: str) -> str:
    """A build.ninja: each source to an object, with the headers that the compiler reports, and all into `library`."""
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
    """A path as one word of a shell command in a ninja file."""
    return shlex.quote(str(path)).replace("$", "$$")


def escape(path: str) -> str:
    """A path as ninja reads it in a build line."""
    return re.sub(r"[$ :]", r"$\g<0>", path)


def run_ninja(out: Path, ninja_file: str, library: str) -> Path:
    """Build in the folder `out`, one process at a time; returns the library's path."""
    import fcntl  # POSIX alone; setup.py imports this module everywhere

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
    """Run as a program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for objects and the library")
    parser.add_argument("--emulated", action="store_true", help="for the CPU, to test kernels without a GPU")
    arguments = parser.parse_args()
    try:
        (build_emulated if arguments.emulated else build_cuda)(arguments.out)
    except (BuildError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
