"""The build of csrc/ and of the wheels, mostly with a stand-in for nvcc; nvcc itself compiles one small kernel."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def load_build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("csrc_build", ROOT / "csrc" / "build.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


build = load_build()
VARIABLES = ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "CXX", "DSPA_BUILD_CUDA")
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")

# Answers like nvcc, accepts any source without "broken" in it, and writes its arguments as the output.
STAND_IN = f"""#!{sys.executable} -IS
import sys
arguments = sys.argv[1:]
if arguments == ["--version"]:
    print("Cuda compilation tools, release 13.0, V13.0.88")
elif arguments == ["--list-gpu-code"]:
    print("sm_80", "sm_90", sep=chr(10))
else:
    if "-c" in arguments:
        source = arguments[arguments.index("-c") + 1]
        if "broken" in open(source).read():
            sys.exit("error: " + source)
        print("ptxas info: Used 8 registers")
        open(arguments[arguments.index("-MF") + 1], "w").write("object: ")
    open(arguments[arguments.index("-o") + 1], "w").write(" ".join(arguments))
"""
EXPORT = 'extern "C" __attribute__((visibility("default")))'


@pytest.fixture(autouse=True)
def nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)


def make_toolkit(folder: Path) -> Path:
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(STAND_IN)
    nvcc.chmod(0o755)
    return folder


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of the stand-in, which is CUDA_HOME."""
    folder = make_toolkit(tmp_path / "toolkit")
    monkeypatch.setenv("CUDA_HOME", str(folder))
    return folder


@pytest.fixture
def csrc(tmp_path: Path) -> Path:
    """Create two sources and their header, in a folder whose name has to be quoted."""
    folder = tmp_path / "kernel sources"
    for name in ("device", "emulated"):
        (folder / name).mkdir(parents=True)
        (folder / name / "primitives.cuh").write_text("#pragma once\n#define ONE 1\n")
    (folder / "one.cu").write_text(f'#include "primitives.cuh"\n{EXPORT} int one() {{ return ONE; }}\n')
    (folder / "two.cu").write_text(f"{EXPORT} int two() {{ return 2; }}\n")
    return folder


@pytest.mark.parametrize(
    ("arch_list", "names"),
    [
        (None, "sm_80 sm_90 compute_90 sm_100 sm_120"),
        ("", "sm_80 sm_90 compute_90 sm_100 sm_120"),
        ("8.0", "sm_80"),
        ("8.0;9.0a", "sm_80 sm_90a"),
        (" 9.0+PTX  8.6 ", "sm_90 compute_90 sm_86"),
        ("9.0a+PTX", "sm_90a compute_90a"),
        ("10.0;12.0f", "sm_100 sm_120f"),
        ("Ampere Hopper", "sm_80 sm_86 compute_86 sm_90 compute_90"),
        ("8.0;8.0+PTX;8.0", "sm_80 compute_80"),
        ("7.0 7.5+PTX 8.0 9.0", "sm_80 sm_90"),
    ],
)
def test_architectures(arch_list: str | None, names: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if arch_list is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", arch_list)
    assert build.architectures(["sm_80", "sm_90", "sm_100", "sm_103", "sm_120"]) == tuple(names.split())


def test_older_toolkits_leave_out_newer_gpus() -> None:
    assert build.architectures(["sm_80", "sm_90"]) == ("sm_80", "sm_90", "compute_90")


@pytest.mark.parametrize("bad", ["9", "90", "9.0b", "9.0+ptx", "8.0,9.0", "Turing", "native"])
def test_an_architecture_that_is_refused(bad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", f"8.0;{bad}")
    with pytest.raises(build.BuildError) as error:
        build.architectures([])
    assert f"TORCH_CUDA_ARCH_LIST has {bad!r}; accepted: " in str(error.value) and "9.0+PTX" in str(error.value)


def test_older_architectures_alone_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0;7.5+PTX")
    with pytest.raises(
        build.BuildError, match=r"TORCH_CUDA_ARCH_LIST has '7.0'; accepted: compute capabilities from 8.0"
    ):
        build.architectures([])


@pytest.mark.usefixtures("toolkit")
def test_an_architecture_that_nvcc_does_not_know(csrc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;12.0+PTX")
    with pytest.raises(build.BuildError, match=r"nvcc 13.0 does not compile for sm_120, but for sm_80, sm_90; set TOR"):
        build.build_cuda(tmp_path / "out", csrc)


@pytest.mark.parametrize(
    ("cores", "gigabytes", "expected"), [(16, 1000, 16), (16, 17, 4), (2, 3, 1), (1, 1000, 1), (16, 0, 1)]
)
def test_jobs_fit_cores_and_memory(cores: int, gigabytes: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.setattr(build, "available_memory", lambda: gigabytes * 2**30)
    assert build.jobs() == expected
    monkeypatch.setenv("MAX_JOBS", "7")
    assert build.jobs() == 7


def test_available_memory_is_read() -> None:
    assert 2**20 < build.available_memory() < 2**50


@pytest.mark.parametrize("bad", ["0", "-1", "2.5", "all"])
def test_max_jobs_that_is_refused(bad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_JOBS", bad)
    with pytest.raises(build.BuildError, match=f"MAX_JOBS is '{bad}'; accepted: a whole number from 1 on"):
        build.jobs()


def test_nvcc_is_looked_for_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, path, on_path, default = (make_toolkit(tmp_path / name) for name in ("home", "path", "on_path", "default"))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(build, "DEFAULT_TOOLKIT", tmp_path / "nowhere")
    with pytest.raises(build.ToolkitMissing, match=r"neither on PATH nor in .*nowhere; install a CUDA toolkit, or set"):
        build.find_nvcc()
    monkeypatch.setattr(build, "DEFAULT_TOOLKIT", default)
    assert build.find_nvcc() == default / "bin" / "nvcc"
    monkeypatch.setenv("PATH", str(on_path / "bin"))
    assert build.find_nvcc() == on_path / "bin" / "nvcc"
    monkeypatch.setenv("CUDA_PATH", str(path))
    assert build.find_nvcc() == path / "bin" / "nvcc"
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert build.find_nvcc() == home / "bin" / "nvcc"
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    with pytest.raises(build.ToolkitMissing, match="CUDA_HOME is '/nowhere', which has no bin/nvcc"):
        build.find_nvcc()


def test_a_toolkit_is_called_by_its_real_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = make_toolkit(tmp_path / "toolkit-13.0")
    (tmp_path / "toolkit").symlink_to(real)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    assert build.find_nvcc() == real / "bin" / "nvcc"


def test_ninja_file_for_gpus(csrc: Path) -> None:
    lines = build.cuda_ninja_file(csrc, Path("/opt/a $b/nvcc"), ["sm_90a", "compute_90"]).splitlines()
    (compiling,) = (line for line in lines if line.startswith("  command = if "))
    for flag in (
        "'/opt/a $$b/nvcc'",
        "-gencode=arch=compute_90a,code=sm_90a -gencode=arch=compute_90,code=compute_90 ",
        "-std=c++17 -O3 --fmad=false -lineinfo",
        "-fvisibility=hidden",
        "-MD -MF $out.d",
    ):
        assert flag in compiling
    assert f"-I '{csrc}/device'" in compiling and "fast_math" not in compiling
    assert [line.split(": ")[0] for line in lines if ": compile " in line] == ["build one.cu.o", "build two.cu.o"]
    assert lines[-1] == "build libdspa_kernels.so: link one.cu.o two.cu.o"


def test_ninja_file_for_this_machine(csrc: Path) -> None:
    (csrc / "emulated" / "threads.cpp").touch()
    text = build.emulated_ninja_file(csrc, "ccache clang++")
    assert "  command = ccache clang++ -x c++ -std=c++17 -O1 -g -fPIC -ffp-contract=off -U_FORTIFY_SOURCE " in text
    assert "emulated' -MD" in text and "/device" not in text
    assert text.endswith("build libdspa_emulated.so: link one.cu.o two.cu.o threads.cpp.o\n")


@pytest.mark.usefixtures("toolkit")
def test_a_build_says_what_it_made(csrc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0a")
    out = tmp_path / "out"
    assert build.build_cuda(out, csrc) == build.CudaLibrary(out / "libdspa_kernels.so", ("sm_80", "sm_90a"), "13.0")
    assert "-shared -cudart static" in (out / "libdspa_kernels.so").read_text()
    assert (out / "one.cu.o.ptxas").read_text() == "ptxas info: Used 8 registers\n"


@pytest.mark.usefixtures("toolkit")
def test_what_fails_to_compile_is_shown(csrc: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (csrc / "two.cu").write_text("broken")
    with pytest.raises(build.BuildError, match=r"compiling libdspa_kernels\.so failed"):
        build.build_cuda(tmp_path / "out", csrc)
    assert f"error: {csrc / 'two.cu'}" in capfd.readouterr().out


def test_a_folder_without_kernels(tmp_path: Path) -> None:
    with pytest.raises(build.BuildError, match=r"there is no \.cu file in "):
        build.build_emulated(tmp_path / "out", tmp_path)


def build_thrice(emulated: bool, csrc: Path, out: Path, capfd: pytest.CaptureFixture[str]) -> ctypes.CDLL:
    """Build, build again, and build once more with a changed header; return the last library."""
    compiled = []
    for one in (1, 1, 11):
        header = csrc / ("emulated" if emulated else "device") / "primitives.cuh"
        if one != 1:
            header.write_text(f"#pragma once\n#define ONE {one}\n")
        library = build.build_emulated(out, csrc) if emulated else build.build_cuda(out, csrc).path
        lines = capfd.readouterr().out.splitlines()
        compiled.append({Path(line.strip("'")).name for line in lines if "] compile " in line})
    assert compiled == [{source.name for source in csrc.rglob("*.c*") if source.suffix != ".cuh"}, set(), {"one.cu"}]
    return ctypes.CDLL(str(library))


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_the_emulated_library_needs_no_toolkit(
    csrc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    (csrc / "two.cu").write_text('extern "C" int three();\nextern "C" int two() { return three() - 1; }\n')
    (csrc / "emulated" / "three.cpp").write_text('extern "C" int three() { return 3; }\n')
    library = build_thrice(True, csrc, tmp_path / "the output", capfd)
    assert (library.one(), library.two()) == (11, 2)


KERNEL = f"""#include <cuda_runtime.h>
__global__ void twice(float* x) {{ x[threadIdx.x] *= 2.0f; }}
{EXPORT} int two(float* x) {{ twice<<<1, 2>>>(x); return cudaGetLastError() == cudaSuccess ? 1 : 2; }}
"""


@pytest.mark.skipif(not NVCC, reason="needs nvcc")
def test_nvcc(csrc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")
    (csrc / "two.cu").write_text(KERNEL)
    out = tmp_path / "the output"
    library = build_thrice(False, csrc, out, capfd)
    assert library.one() == 11 and library.two(None) in (1, 2)
    report = (out / "two.cu.o.ptxas").read_text()
    assert "for 'sm_90a'" in report and "0 bytes spill stores" in report

    (csrc / "two.cu").write_text(KERNEL.replace("{ x", "{ int unused; x"))
    with pytest.raises(build.BuildError):
        build.build_cuda(out, csrc)
    assert 'error #177-D: variable "unused"' in capfd.readouterr().out


@pytest.fixture
def project(csrc: Path, tmp_path: Path) -> Path:
    """Create a small source tree with this project's build."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path / "project"
    shutil.copytree(csrc, folder / "csrc")
    shutil.copy(ROOT / "csrc" / "build.py", folder / "csrc")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for package in (folder / "dspa_kernels", folder / "python" / "dspa"):
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
    return folder


def call_backend(project: Path, hook: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Build a wheel, an editable wheel or a source distribution in the folder dist, as pip does."""
    code = f"from setuptools.build_meta import {hook} as hook; print(hook('dist'))"
    environment = os.environ | variables
    (project / "dist").mkdir(exist_ok=True)
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)


def make_wheel(project: Path, **variables: str) -> tuple[str, set[str], dict[str, object]]:
    """Build a wheel; return its tag, its libraries and records, and the contents of the record."""
    done = call_backend(project, "build_wheel", **variables)
    assert done.returncode == 0, done.stderr
    name = done.stdout.splitlines()[-1]
    with zipfile.ZipFile(project / "dist" / name) as wheel:
        files = {file for file in wheel.namelist() if file.endswith((".so", ".json"))}
        record = json.loads(wheel.read("dspa_kernels/cuda_build.json"))
        (about,) = (file for file in wheel.namelist() if file.endswith(".dist-info/WHEEL"))
        tag = name.removeprefix("dspa_kernels-0.1.0-").removesuffix(".whl")
        assert f"Tag: {tag}\n" in wheel.read(about).decode()
    return tag, files, record


LIBRARY, RECORD = "dspa_kernels/libdspa_kernels.so", "dspa_kernels/cuda_build.json"
PLATFORM = sysconfig.get_platform().replace("-", "_").replace(".", "_")


@pytest.mark.usefixtures("toolkit")
def test_wheels_with_and_without_the_library(project: Path) -> None:
    tag, files, record = make_wheel(project)
    assert tag == f"py3-none-{PLATFORM}" and files == {LIBRARY, RECORD}
    assert record == {"built": True, "reason": "", "architectures": ["sm_80", "sm_90", "compute_90"], "nvcc": "13.0"}

    tag, files, record = make_wheel(project, DSPA_BUILD_CUDA="0")
    assert tag == "py3-none-any" and files == {RECORD}
    reason = "DSPA_BUILD_CUDA was 0 when the package was built"
    assert record == {"built": False, "reason": reason, "architectures": [], "nvcc": ""}


def test_without_a_toolkit(project: Path) -> None:
    tag, files, record = make_wheel(project, CUDA_HOME="/nowhere")
    assert tag == "py3-none-any" and files == {RECORD}
    assert not record["built"] and "CUDA_HOME is '/nowhere'" in str(record["reason"])

    done = call_backend(project, "build_wheel", CUDA_HOME="/nowhere", DSPA_BUILD_CUDA="1")
    assert done.returncode and "error: no CUDA toolkit: CUDA_HOME is '/nowhere'" in done.stderr
    assert "0 installs without CUDA kernels" in done.stderr


@pytest.mark.usefixtures("toolkit")
def test_kernels_that_do_not_compile(project: Path) -> None:
    (project / "csrc" / "two.cu").write_text("broken")
    done = call_backend(project, "build_editable")
    record = json.loads((project / RECORD).read_text())
    assert done.returncode == 0 and not record["built"] and "failed" in record["reason"]
    assert f"Building without CUDA kernels: {record['reason']}" in done.stderr

    done = call_backend(project, "build_editable", DSPA_BUILD_CUDA="1")
    assert done.returncode and "error: compiling libdspa_kernels.so failed" in done.stderr
    assert not (project / LIBRARY).exists() and not (project / RECORD).exists()


def test_a_value_that_is_refused(project: Path) -> None:
    done = call_backend(project, "build_wheel", DSPA_BUILD_CUDA="yes")
    assert done.returncode and "error: DSPA_BUILD_CUDA is 'yes'; accepted: auto (" in done.stderr


@pytest.mark.usefixtures("toolkit")
def test_editable_installations_and_source_distributions(project: Path) -> None:
    assert call_backend(project, "build_editable", DSPA_BUILD_CUDA="1").returncode == 0
    assert (project / LIBRARY).exists() and json.loads((project / RECORD).read_text())["built"]

    done = call_backend(project, "build_sdist")
    with tarfile.open(project / "dist" / done.stdout.splitlines()[-1]) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    assert {"csrc/build.py", "csrc/one.cu", "csrc/device/primitives.cuh"} <= files
    assert not {LIBRARY, RECORD} & files and not [name for name in files if name.startswith("build")]

    assert call_backend(project, "build_editable", DSPA_BUILD_CUDA="0").returncode == 0
    assert not (project / LIBRARY).exists() and not json.loads((project / RECORD).read_text())["built"]


def test_the_installation_that_is_tested() -> None:
    """With a toolkit, kernels that do not compile fail here rather than in a user's installation."""
    if not (ROOT / RECORD).exists():
        pytest.skip("dspa_kernels was not installed from this source tree")
    record = json.loads((ROOT / RECORD).read_text())
    assert record["built"] == (ROOT / LIBRARY).exists()
    assert "failed" not in record["reason"]
