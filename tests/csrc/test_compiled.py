"""The library that nvcc compiles from csrc/: its machine code, its behaviour without a GPU, and its C interface."""

from __future__ import annotations

import ctypes
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import triton

from dspa_kernels.cuda_library import DTYPES, SteerArguments

ROOT = Path(__file__).parents[2]
HEADER = ROOT / "csrc" / "c_api.h"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# steer_kernel with the dtype of rows and weights, and whether it screens.
KERNELS = {f"steer_kernel<{T}, {screens}>" for T in ("__half", "__nv_bfloat16") for screens in ("false", "true")}
# Each of the four partitions of a multiprocessor runs every fourth warp of a block. Registers are allocated by eights.
PARTITIONS, PARTITION_REGISTERS = 4, 16384


@dataclass(frozen=True)
class Kernel:
    """A kernel's machine code: its name in `KERNELS`, its symbol, resources per thread, and instructions."""

    name: str
    symbol: str
    resources: dict[str, int]
    instructions: list[str] = field(repr=False)

    def count(self, pattern: str) -> int:
        """Count the instructions that start with `pattern`, with or without a predicate."""
        return sum(bool(re.match(pattern, instruction)) for instruction in self.instructions)


@pytest.fixture(scope="session")
def library() -> Path:
    """Compile in the same folder as setup.py, so that only what has changed is compiled."""
    folder = ROOT / "build" / "csrc"
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_CUDA_ARCH_LIST"}
    command = [sys.executable, str(ROOT / "csrc" / "build.py"), "--out", str(folder)]
    built = subprocess.run(command, env=environment, capture_output=True, text=True)
    if built.returncode and "no CUDA toolkit" in built.stderr:
        pytest.skip(built.stderr.strip().removeprefix("error: "))
    assert built.returncode == 0, built.stdout + built.stderr
    return folder / "libdspa_kernels.so"


def dump(library: Path, *options: str) -> str:
    return subprocess.run([str(CUOBJDUMP), *options, str(library)], capture_output=True, text=True, check=True).stdout


def name_of(symbol: str) -> str:
    """Return the name of a kernel without namespaces, or its full name if it is another."""
    full = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout
    product = re.search(r"steer_kernel<(\w+), \(bool\)([01])>|steer_kernel<(\w+), (true|false)>", full)
    if not product:
        return full
    dtype, screens = product[1] or product[3], product[4] or ("false", "true")[int(product[2])]
    return f"steer_kernel<{dtype}, {screens}>"


def read_kernels(library: Path, architecture: str) -> list[Kernel]:
    resources, code = (
        dump(library, "--gpu-architecture", architecture, option) for option in ("--dump-resource-usage", "--dump-sass")
    )
    kernels = []
    for text in code.split("Function : ")[1:]:
        symbol = text.split(maxsplit=1)[0]
        usage = re.search(rf"Function {symbol}:\n(.*)", resources)
        assert usage
        instructions = re.findall(r"/\*[0-9a-f]{4,}\*/ +(?:@!?U?P\w+ )?([A-Z].*?) *;", text)
        numbers = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", usage[1])}
        kernels.append(Kernel(name_of(symbol), symbol, numbers, instructions))
    return kernels


@pytest.fixture(scope="session")
def sm_80(library: Path) -> list[Kernel]:
    return read_kernels(library, "sm_80")


@pytest.fixture(scope="session")
def sm_90(library: Path) -> list[Kernel]:
    return read_kernels(library, "sm_90")


@pytest.fixture(scope="session", params=["sm_80", "sm_90", "sm_100", "sm_120"])
def kernels(library: Path, request: pytest.FixtureRequest) -> list[Kernel]:
    return read_kernels(library, request.param)


@pytest.fixture(scope="session")
def ptx(library: Path) -> dict[str, str]:
    """Return the PTX for later GPUs, by the symbols of the kernels."""
    text = dump(library, "--dump-ptx")
    assert set(re.findall(r"\.target (\w+)", text)) == {"sm_90"}
    return {entry.split("(")[0]: entry for entry in text.split(".visible .entry ")[1:]}


def test_every_kernel_for_every_architecture(kernels: list[Kernel], ptx: dict[str, str]) -> None:
    assert {kernel.name for kernel in kernels} == KERNELS and len(kernels) == len(KERNELS)
    assert {kernel.symbol for kernel in kernels} == set(ptx)


def test_no_spills_and_no_local_memory(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        assert (kernel.resources["STACK"], kernel.resources["LOCAL"], kernel.count("LDL|STL")) == (0, 0, 0), kernel.name


def test_the_registers_of_a_block_fit(kernels: list[Kernel], ptx: dict[str, str]) -> None:
    for kernel in kernels:
        bounds = re.search(r"\.maxntid (\d+), 1, 1", ptx[kernel.symbol])
        assert bounds, kernel.name
        warps = -(-int(bounds[1]) // 32 // PARTITIONS)
        registers = -(-kernel.resources["REG"] // 8) * 8
        assert 32 * warps * registers <= PARTITION_REGISTERS, (kernel.name, bounds[1], registers)


def screens(kernel: Kernel) -> bool:
    return "true" in kernel.name


def test_products_are_on_tensor_cores(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        assert kernel.count("HMMA") > 0 and kernel.count("LDSM") > 0, kernel.name


def test_codes_become_numbers_in_few_instructions(kernels: list[Kernel]) -> None:
    """Two codes take a subtraction, and no conversion from integers."""
    for kernel in kernels:
        pairs = kernel.count(r"HADD2\.BF16_V2|HFMA2\.(BF16_V2|MMA)|HADD2 ")
        assert (pairs >= 16) == screens(kernel), (kernel.name, pairs)
        # From the first product of codes to the last, sums and branches of the loop included.
        if screens(kernel):
            codes = [i for i, code in enumerate(kernel.instructions) if re.match(r"LDS\.64", code)]
            body = kernel.instructions[codes[0] : codes[-1]]
            assert not any(code.startswith("I2F") for code in body), kernel.name


def test_sm_80_copies_sixteen_bytes_at_a_time(sm_80: list[Kernel]) -> None:
    """The copies bypass the L1 cache, and an mbarrier tracks their completion."""
    for kernel in sm_80:
        copies = kernel.count("LDGSTS")
        assert copies and copies == kernel.count(r"LDGSTS\.E\.BYPASS\.(LTC128B\.)?128\b"), kernel.name
        assert kernel.count(r"ARRIVES\.LDGSTSBAR") and kernel.count("UBLKCP") == 0, kernel.name


def test_sm_90_copies_rows_in_bulk(sm_90: list[Kernel]) -> None:
    """An mbarrier counts their bytes, and warps wait for it with an instruction that suspends them. One thread issues
    the copies, because a loop over the threads of a warp would be slower than memory."""
    for kernel in sm_90:
        assert not kernel.count(r"BRA\.U\.ANY"), kernel.name
        assert kernel.count(r"UBLKCP\.S\.G") and not kernel.count("LDGSTS"), kernel.name
        assert kernel.count(r"SYNCS\.ARRIVE\.TRANS64\.RED"), kernel.name
        assert kernel.count(r"SYNCS\.PHASECHK\.TRANS64\.TRYWAIT"), kernel.name


def test_nothing_but_weights_is_read_before_the_launch_ahead_has_ended(sm_90: list[Kernel]) -> None:
    for kernel in sm_90:
        waits = [i for i, code in enumerate(kernel.instructions) if code.startswith("ACQBULK")]
        assert len(waits) == 1, kernel.name
        early = [code for code in kernel.instructions[: waits[0]] if re.match(r"LDG|LD\.|STG?\b|RED|ATOM", code)]
        assert not early, (kernel.name, early)


# A grid barrier: all warps of a block arrive (B), what they wrote is released (M), one thread adds to the word (T) and
# polls it (W) until all blocks have arrived, then all warps continue (B). Other loads (x) are in between only where
# decoder rows are prefetched, whose addresses an earlier barrier published.
MEANING = {
    "B": r"BAR\.SYNC\.DEFER_BLOCKING 0x0",
    "M": r"MEMBAR\.\w+\.GPU",
    "T": r"ATOMG\.E\.ADD\.S32\.STRONG\.GPU",
    "W": r"LDG\.E\.STRONG\.GPU",
    "x": r"LDG|LD\.|STG?\b|RED|ATOM",
}
ROUND = "BMTx*W+B"


def letters(instructions: list[str]) -> Iterator[str]:
    for instruction in instructions:
        yield next((letter for letter, pattern in MEANING.items() if re.match(pattern, instruction)), "")


def test_blocks_wait_for_each_other_as_a_whole(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        word = "".join(letters(kernel.instructions))
        assert word.count("T") == len(re.findall(ROUND, word)) == (3 if screens(kernel) else 2), kernel.name


def test_the_text_for_later_gpus_is_that_for_sm_90(ptx: dict[str, str]) -> None:
    for symbol, text in ptx.items():
        for instruction in (
            "griddepcontrol.wait;",
            "cp.async.bulk.shared",
            "mbarrier.try_wait",
        ):
            assert instruction in text, (symbol, instruction)
        assert "tcgen05" not in text and "wgmma" not in text, symbol


def names_of_functions() -> set[str]:
    return set(re.findall(r"\b(dspa_\w+)\(", HEADER.read_text()))


def test_exports_what_the_header_declares_and_nothing_else(library: Path) -> None:
    command = ["nm", "-D", "--defined-only", "--format=just-symbols", str(library)]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert set(symbols) == names_of_functions()


def run_python(library: Path, code: str, **variables: str) -> str:
    """Run a program without a GPU, with the path of the library as its argument; return what it prints."""
    environment = os.environ | {"DSPA_TESTS_EMULATED_CUDA": "", "CUDA_VISIBLE_DEVICES": "", **variables}
    command = [sys.executable, "-c", code, str(library)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


LOAD = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
library.dspa_error_name.restype = library.dspa_error_text.restype = ctypes.c_char_p
def report(code):
    print(code, library.dspa_error_name(code).decode(), library.dspa_error_text(code).decode(), sep="|")
"""


def test_an_empty_launch_is_refused(library: Path) -> None:
    code = LOAD + "report(library.dspa_steer(bytes(library.dspa_steer_arguments_size()), None))"
    assert run_python(library, code) == "10001|DSPA_BAD_SIZE|a size is out of range or does not fit the others"


def test_every_error_has_a_name_and_a_text(library: Path) -> None:
    own = {int(code): name for name, code in re.findall(r"(DSPA_\w+) = (1\d{4})", HEADER.read_text())}
    assert len(own) == 4
    lines = run_python(library, f"{LOAD}for code in (0, 100, *{list(own)}, 12345): report(code)").splitlines()
    for code, name, text in (line.split("|") for line in lines):
        assert name == (own | {0: "cudaSuccess", 100: "cudaErrorNoDevice"}).get(int(code), "unrecognized error code")
        assert text, name


LAUNCH = """
import sys
from pathlib import Path
import torch
from dspa_kernels import CudaError, cuda_library
cuda_library.LIBRARY = Path(sys.argv[1])
try:
    cuda_library.launch_steer(
        cuda_library.SteerArguments(n_rows=3, d_in=256, d_sae=512, n_slots=4, dtype=1), torch.device("cpu")
    )
except CudaError as error:
    print(error)
"""


def test_a_launch_that_fails_says_what_and_why(library: Path) -> None:
    # There is no driver, or it has no device.
    why = r"steer with n_rows 3, d_in 256, d_sae 512, n_slots 4 cannot be launched: cudaError(\w+) \([\w ,-]{10,}\)"
    message = run_python(library, LAUNCH)
    match = re.fullmatch(why, message)
    assert match and match[1] in ("InsufficientDriver", "NoDevice"), message


STATUS = """
import sys
from pathlib import Path
from dspa_kernels import available_backends, cuda_library
cuda_library.LIBRARY, cuda_library.OBSTACLE = Path(sys.argv[1]), ""
print(available_backends()["cuda"].reason)
"""


def test_a_driver_that_is_too_old(library: Path, tmp_path: Path) -> None:
    """The runtime in the library asks a driver, here one with a version alone, what it supports."""
    (tmp_path / "driver.c").write_text("int cuDriverGetVersion(int *version) { *version = 11080; return 0; }\n")
    command = ["cc", "-shared", "-fPIC", "driver.c", "-Wl,-soname,libcuda.so.1", "-o", "libcuda.so.1"]
    subprocess.run(command, cwd=tmp_path, check=True)
    reason = run_python(library, STATUS, LD_LIBRARY_PATH=str(tmp_path))
    assert re.search(r"was built with CUDA 1\d\.\d and the driver supports CUDA up to 11\.8\. Update", reason), reason
    assert run_python(library, STATUS) == "no CUDA device was found"


def run_c(folder: Path, source: str) -> list[list[str]]:
    """Compile a C program with strict flags and run it; return the words of each line that it prints."""
    (folder / "program.c").write_text(source)
    command = ["cc", *shlex.split("-std=c99 -pedantic -Wall -Wextra -Werror"), "-I", str(HEADER.parent), "program.c"]
    done = subprocess.run([*command, "-o", "program"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([str(folder / "program")], capture_output=True, text=True, check=True)
    return [line.split() for line in done.stdout.splitlines()]


def test_numbers_in_python_are_those_of_the_header(tmp_path: Path) -> None:
    expected = {{torch.bfloat16: "BF16", torch.float16: "FP16"}[t]: code for t, code in DTYPES.items()}
    prints = "".join(f'printf("{name} %d\\n", DSPA_{name});' for name in expected)
    lines = run_c(tmp_path, f'#include "c_api.h"\n#include <stdio.h>\nint main(void) {{ {prints} return 0; }}\n')
    assert {name: int(code) for name, code in lines} == expected


def fields_of_header() -> list[tuple[str, type]]:
    """Return the names and types of the fields of dspa_steer_arguments, in order."""
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
    structure = re.search(r"typedef struct {(.*?)} dspa_steer_arguments;", text, flags=re.DOTALL)
    assert structure
    types = {"int32_t": ctypes.c_int32, "float": ctypes.c_float}
    fields: list[tuple[str, type]] = []
    for declaration in filter(None, map(str.strip, structure[1].split(";"))):
        if "*" in declaration:
            fields.append((declaration.rpartition("*")[2], ctypes.c_void_p))
        else:
            type_name, names = declaration.split(maxsplit=1)
            fields.extend((name, types[type_name]) for name in names.split(", "))
    return fields


def test_the_arguments_in_python_are_those_of_the_header(tmp_path: Path) -> None:
    fields = fields_of_header()
    assert list(SteerArguments._fields_) == fields
    at = "".join(f'printf("%zu\\n", offsetof(dspa_steer_arguments, {name}));' for name, _ in fields)
    end = 'printf("%zu\\n", sizeof(dspa_steer_arguments));'
    lines = run_c(
        tmp_path,
        f'#include "c_api.h"\n#include <stddef.h>\n#include <stdio.h>\nint main(void) {{ {at} {end} return 0; }}\n',
    )
    offsets = [getattr(SteerArguments, name).offset for name, _ in fields]
    assert [int(number) for (number,) in lines] == [*offsets, ctypes.sizeof(SteerArguments)]
