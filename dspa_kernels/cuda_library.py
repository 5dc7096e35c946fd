"""The compiled library of `csrc/`, loaded and called through ctypes. `csrc/c_api.h` describes its interface."""

from __future__ import annotations

import ctypes
import functools
import json
import os
from ctypes import c_char_p, c_float, c_int, c_int32, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER = Path(__file__).parent
LIBRARY, RECORD = FOLDER / "libdspa_kernels.so", FOLDER / "cuda_build.json"
# For tests, a library in which csrc/ runs on the CPU. The CUDA backend then takes CPU tensors if requested by name.
EMULATED = os.environ.get("DSPA_TESTS_EMULATED_CUDA", "")
OLDEST_CAPABILITY = 80
DTYPES = {torch.bfloat16: 1, torch.float16: 2}
# Residual rows of a launch at most.
MAX_ROWS = 8


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


POINTERS = _words(
    "h residual out encoder_rows b_enc threshold order screen_rows screen_latents screen_mean"
    " columns columns_encoder_rows columns_b_enc columns_threshold columns_W_dec slots signs rows positions start"
    " alphas paths before after maximum slot_values summaries running_max rank screen_bound n_candidates candidates"
    " upper barrier"
)
INTEGERS = _words("d_in d_sae n_rows n_columns n_slots n_large k dtype record programmatic ahead")


class CudaError(RuntimeError):
    """A CUDA kernel could not be launched. The message names the kernel, its shape and the error."""


class SteerArguments(ctypes.Structure):
    """The C struct `dspa_steer_arguments`: device pointers, then sizes."""

    _fields_ = (
        *((name, c_void_p) for name in POINTERS),
        *((name, c_int32) for name in INTEGERS),
        ("alpha", c_float),
    )


def find_obstacle() -> str:
    """Return the reason why there is no library to load, or an empty string if there is one."""
    if EMULATED or LIBRARY.is_file():
        return ""
    if not RECORD.is_file():
        return "the CUDA kernels are not compiled: run pip install . in the package's sources, where a CUDA toolkit is"
    try:
        reason = json.loads(RECORD.read_text())["reason"]
    except (ValueError, LookupError, TypeError):
        return f"{RECORD} is damaged. Install the package again."
    return (
        f"the CUDA kernels are not compiled: {reason}" if reason else f"{LIBRARY} is gone. Install the package again."
    )


# Computed once, because compiled models read it, too, and cannot access files.
OBSTACLE = find_obstacle()


@functools.cache
def library() -> ctypes.CDLL:
    """Load the library once and return it. Loading needs neither a device nor a driver.

    Raises:
        CudaError: there is no library, or it is another version's.
        CudaError: the driver is older than the library's CUDA runtime, which every launch would fail with.
    """
    path = EMULATED or str(LIBRARY)
    try:
        loaded = ctypes.CDLL(path)
    except OSError as error:
        advice = "DSPA_TESTS_EMULATED_CUDA names it." if EMULATED else "Install the package again on this machine."
        raise CudaError(f"{path} cannot be loaded: {error}. {advice}") from error
    if not hasattr(loaded, "dspa_driver_version") or loaded.dspa_steer_arguments_size() != ctypes.sizeof(
        SteerArguments
    ):
        raise CudaError(f"{path} does not belong to this version of dspa-kernels. Install the package again.")
    driver, runtime = loaded.dspa_driver_version(), loaded.dspa_runtime_version()
    # Without a driver its version is 0. A driver runs what any release of its major version has built.
    if 0 < driver // 1000 < runtime // 1000:
        raise CudaError(
            f"{path} was built with CUDA {_release(runtime)} and the driver supports CUDA up to {_release(driver)}. "
            f"Update the driver, or install the package again with CUDA_HOME set to a toolkit of CUDA {driver // 1000}."
        )
    for name in ("dspa_error_name", "dspa_error_text"):
        getattr(loaded, name).restype = c_char_p
        getattr(loaded, name).argtypes = [c_int]
    loaded.dspa_steer.argtypes = [ctypes.POINTER(SteerArguments), c_void_p]
    return loaded


def _release(version: int) -> str:
    """Return the name of a CUDA version: 13.0 for 13000."""
    return f"{version // 1000}.{version % 1000 // 10}"


def fill(arguments: SteerArguments, **values: Any) -> None:
    """Set fields of the arguments: tensors to their address, None to null."""
    for name, value in values.items():
        setattr(arguments, name, value.data_ptr() if isinstance(value, Tensor) else value)


def launch_steer(arguments: SteerArguments, device: torch.device) -> None:
    """Launch the kernel on the current stream of `device`, or raise `CudaError`."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    code = library().dspa_steer(ctypes.byref(arguments), stream)
    if code:
        shape = ", ".join(f"{name} {getattr(arguments, name)}" for name in ("n_rows", "d_in", "d_sae", "n_slots"))
        raise CudaError(f"steer with {shape} cannot be launched: {error_of(code)}")


def error_of(code: int) -> str:
    """Return the name and the description of an error code."""
    name, text = library().dspa_error_name(code), library().dspa_error_text(code)
    return f"{name.decode()} ({text.decode()})"
