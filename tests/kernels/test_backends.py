import ctypes
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from dspa_kernels import (
    BackendError,
    CudaError,
    InputError,
    available_backends,
    backends,
    cuda_library,
    launch,
    steer,
)
from dspa_kernels.backends import MODULES, OPS, choose
from dspa_kernels.ops.steer.contract import choose_steer, fastest

from .cases import BF16, DTYPES, make_case

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def implement(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """As if `steer` had kernels for `names`, and nobody had set DSPA_BACKEND."""
    monkeypatch.setattr(backends, "IMPLEMENTED", frozenset(("steer", name) for name in names))
    monkeypatch.setattr(backends, "DEFAULT", "auto")


def test_every_op_has_a_reference() -> None:
    for op in OPS:
        assert choose(op, CPU) == "reference" and callable(backends.implementation(op, "reference"))


@pytest.fixture
def compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As outside of Triton's interpreter and of the library that emulates a GPU, which run kernels on the CPU."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backends, "EMULATED", "")


@pytest.mark.usefixtures("compiled_kernels")
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_backend_asked_for_by_name_runs_or_says_why_not(op: str, name: str) -> None:
    with pytest.raises(BackendError) as error:
        choose(op, CPU, name)
    message = str(error.value)
    reason = "CUDA devices" if (op, name) in backends.IMPLEMENTED else "no such kernel"
    assert f"{name} cannot run {op}" in message and reason in message and "'reference'" in message


@pytest.mark.usefixtures("compiled_kernels")
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_the_public_function_passes_the_reason_on(name: str) -> None:
    with pytest.raises(BackendError, match=f"{name} cannot run steer: "):
        steer(**make_case().arguments(backend=name))


def test_an_unknown_name_is_an_input_error() -> None:
    with pytest.raises(InputError, match=r"`backend` is 'tpu'; accepted: auto, cuda, triton, reference\."):
        choose("steer", CPU, "tpu")


@pytest.mark.parametrize(
    ("implemented", "device", "chosen"),
    [
        (["cuda", "triton", "reference"], CUDA, "triton"),  # whether cuda is faster, `steer` knows
        (["reference"], CUDA, "reference"),
        (["cuda", "triton", "reference"], CPU, "reference"),
    ],
)
def test_auto_goes_triton_reference(
    monkeypatch: pytest.MonkeyPatch, implemented: list[str], device: torch.device, chosen: str
) -> None:
    implement(monkeypatch, *implemented)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert choose("steer", device) == chosen
    assert choose("steer", device, "reference") == "reference"


def test_a_kernel_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    implement(monkeypatch, "reference")
    with pytest.raises(BackendError, match="cuda cannot run steer: this version has no such kernel"):
        choose("steer", CUDA, "cuda")


def test_triton_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    implement(monkeypatch, "triton", "reference")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert choose("steer", CUDA) == "reference"
    with pytest.raises(BackendError, match="pip install triton"):
        choose("steer", CUDA, "triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "torch's CUDA builds for Linux bring it" in available_backends()["triton"].reason


def test_available_backends() -> None:
    statuses = available_backends()
    assert list(statuses) == list(MODULES)
    assert statuses["reference"].available and statuses["reference"].ops == OPS
    for status in statuses.values():
        assert status.available == (not status.reason) and set(status.ops) <= set(OPS)
    if not torch.cuda.is_available():
        assert not statuses["cuda"].available and not statuses["triton"].available


def test_available_backends_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    implement(monkeypatch, "triton", "reference")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    statuses = available_backends()
    assert statuses["cuda"].reason == "this version has no cuda kernels" and statuses["cuda"].ops == ()
    assert statuses["triton"].reason == "no CUDA device was found" and statuses["triton"].ops == ("steer",)


def test_the_environment_variable_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "DEFAULT", "tpu")
    with pytest.raises(InputError, match="`DSPA_BACKEND` is 'tpu'"):
        choose("steer", CPU)
    # backend="auto" would fail in the same way.
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(backends, "DEFAULT", "triton")
    with pytest.raises(BackendError, match=r"Use DSPA_BACKEND='auto' or 'reference'\."):
        choose("steer", CPU)


def test_the_environment_variable_is_for_the_ops_that_its_backend_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "DEFAULT", "cuda")
    assert choose("map_lookup", CPU) == "reference"
    with pytest.raises(BackendError, match="cuda cannot run map_lookup: this version has no such kernel"):
        choose("map_lookup", CPU, "cuda")


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An installation without the CUDA library; returns where its record would be."""
    for name in ("LIBRARY", "RECORD"):
        monkeypatch.setattr(cuda_library, name, tmp_path / name)
    monkeypatch.setattr(cuda_library, "EMULATED", "")
    return tmp_path / "RECORD"


def test_why_there_is_no_cuda_library(no_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "run pip install . in the package's sources, where a CUDA toolkit is" in cuda_library.find_obstacle()
    no_library.write_text(json.dumps({"built": False, "reason": "no CUDA toolkit: nvcc is not on PATH"}))
    monkeypatch.setattr(cuda_library, "OBSTACLE", cuda_library.find_obstacle())
    with pytest.raises(BackendError, match="cuda cannot run steer: the CUDA kernels are not compiled: no CUDA toolkit"):
        choose("steer", CUDA, "cuda")
    assert (
        available_backends()["cuda"].reason == "the CUDA kernels are not compiled: no CUDA toolkit: nvcc is not on PATH"
    )
    no_library.write_text(json.dumps({"built": True, "reason": ""}))
    assert "LIBRARY is gone. Install the package again" in cuda_library.find_obstacle()
    for damaged in ("{", "{}", "[]"):
        no_library.write_text(damaged)
        assert "RECORD is damaged. Install the package again" in cuda_library.find_obstacle()
    no_library.with_name("LIBRARY").touch()
    assert cuda_library.find_obstacle() == ""


def test_a_library_that_is_none(no_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_library.with_name("LIBRARY").write_text("not a library")
    cuda_library.library.cache_clear()
    try:
        with pytest.raises(CudaError, match=r"LIBRARY cannot be loaded: .*Install the package again"):
            cuda_library.library()
        monkeypatch.setattr(cuda_library, "OBSTACLE", "")
        assert "LIBRARY cannot be loaded" in available_backends()["cuda"].reason
        monkeypatch.setattr(cuda_library, "EMULATED", "libm.so.6")
        with pytest.raises(CudaError, match=r"libm.so.6 does not belong to this version of dspa-kernels"):
            cuda_library.library()
    finally:
        cuda_library.library.cache_clear()


@pytest.mark.parametrize(
    ("driver", "runtime", "refused"),
    [(0, 13000, False), (12080, 13000, True), (13000, 13000, False), (13000, 13020, False), (13000, 12080, False)],
)
def test_a_driver_that_is_too_old(driver: int, runtime: int, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver runs every release of its major version and of older ones; 0 is no driver."""
    library = mock.Mock()
    library.dspa_steer_arguments_size.return_value = ctypes.sizeof(cuda_library.SteerArguments)
    library.dspa_driver_version.return_value, library.dspa_runtime_version.return_value = driver, runtime
    monkeypatch.setattr(ctypes, "CDLL", lambda path: library)
    monkeypatch.setattr(cuda_library, "OBSTACLE", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "capability_of", lambda device: 90)
    cuda_library.library.cache_clear()
    try:
        status = available_backends()["cuda"]
    finally:
        cuda_library.library.cache_clear()
    assert status.available != refused
    expected = (
        "was built with CUDA 13.0 and the driver supports CUDA up to 12.8. Update the driver, or install the package "
        "again with CUDA_HOME set to a toolkit of CUDA 12."
    )
    assert status.reason.endswith(expected) if refused else status.reason == ""


def test_a_device_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_library, "OBSTACLE", "")
    monkeypatch.setattr(backends, "capability_of", lambda device: 75)
    with pytest.raises(BackendError, match=r"cuda cannot run steer: it needs compute capability 8.0 and cuda has 7.5"):
        choose("steer", CUDA, "cuda")


@pytest.mark.parametrize(("rows", "chosen"), [(8, "cuda"), (9, "triton")])
def test_steer_is_cuda_where_that_was_measured_to_be_faster(
    monkeypatch: pytest.MonkeyPatch, rows: int, chosen: str
) -> None:
    entry = launch.CudaEntry("steer", launch.NATIVE, 90, 8, 19, 67, programmatic=False, ahead=False)
    monkeypatch.setattr(launch, "cuda_table", lambda: (entry,))
    monkeypatch.setattr(launch, "capability_of", lambda device: 90)
    launch.cuda_entry.cache_clear()
    case = make_case(dtypes=(torch.bfloat16, torch.bfloat16))
    launched = {"k": 0, "normalize": "none", "screen_rows": None, "encoder_rows": case.sae.encoder_rows}
    try:
        assert fastest(h=torch.zeros(rows, 19, dtype=torch.bfloat16), **launched) == chosen
        assert fastest(h=torch.zeros(rows, 19), **launched) == "triton"
    finally:
        launch.cuda_entry.cache_clear()


def test_auto_is_left_to_steer_unless_a_backend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case()
    inputs = torch.zeros(1, 19), case.sae, case.plan
    monkeypatch.setattr(backends, "DEFAULT", "auto")
    assert choose_steer(*inputs, "auto") == "reference"
    monkeypatch.setattr("dspa_kernels.ops.steer.contract.choose", lambda *_: "triton")
    assert choose_steer(*inputs, "auto") == "auto" and choose_steer(*inputs, "triton") == "triton"
    monkeypatch.setattr(backends, "DEFAULT", "triton")
    assert choose_steer(*inputs, "auto") == "triton"


@pytest.mark.parametrize(
    ("case", "parts"),
    [
        ({"n": 9}, ("got 9 rows", "weights of torch.bfloat16")),
        ({"dtypes": DTYPES[0]}, ("rows of torch.float32", "weights of torch.float32")),
        ({"dtypes": DTYPES[4]}, ("rows of torch.float32", "weights of torch.bfloat16")),
        ({"normalize": "layer_norm"}, ("normalize='layer_norm'",)),
    ],
)
def test_cuda_says_what_it_takes(case: dict[str, Any], parts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "EMULATED", "a library")
    monkeypatch.setattr(cuda_library, "OBSTACLE", "")
    arguments = make_case(**{"dtypes": BF16, **case}).arguments()
    with pytest.raises(BackendError) as error:
        steer(**arguments, backend="cuda")
    message = str(error.value)
    wanted = ("cuda cannot run steer: it takes up to 8 rows of bf16 or fp16, weights of the same dtype", *parts)
    assert all(part in message for part in wanted) and "Use backend='auto'" in message, message
    # Named by the environment variable it runs where it can.
    monkeypatch.setattr(backends, "DEFAULT", "cuda")
    assert choose_steer(*(arguments[name] for name in ("h", "sae", "plan")), "auto") == "reference"


SCRIPT = """
import os, torch
from dspa_kernels import BackendError, backends
print(torch.cuda.is_initialized())
os.environ["DSPA_BACKEND"] = "reference"  # too late: it is read once
cpu = torch.device("cpu")
print(backends.choose("steer", cpu, "reference"))
try:
    backends.choose("steer", cpu)
except BackendError as error:
    print(error)
"""


def test_an_empty_environment_variable_is_none() -> None:
    script = "from dspa_kernels import backends; print(backends.DEFAULT)"
    environment = os.environ | {"DSPA_BACKEND": ""}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout == "auto\n"


def test_environment_variable_replaces_auto_and_is_read_once() -> None:
    environment = os.environ | {"DSPA_BACKEND": "triton", "TRITON_INTERPRET": "0"}
    result = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    touched_a_device, explicit, auto = result.stdout.splitlines()
    assert (touched_a_device, explicit) == ("False", "reference")
    assert auto.startswith("triton cannot run steer")


def test_fp64_is_the_reference_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    implement(monkeypatch, "triton", "reference")
    assert choose("steer", CUDA, dtype=torch.float64) == "reference"
    with pytest.raises(BackendError, match="triton cannot run steer: it computes in fp32 and an operand is fp64"):
        choose("steer", CUDA, "triton", torch.float64)


def test_the_interpreter_runs_when_asked_for_by_name_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    implement(monkeypatch, "triton", "reference")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose("steer", CPU) == "reference" and choose("steer", CPU, "triton") == "triton"
