"""Which implementation of an op runs: cuda, triton or reference, and why the others cannot."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dspa_kernels import cuda_library
from dspa_kernels.checks import refuse
from dspa_kernels.cuda_library import EMULATED, OLDEST_CAPABILITY
from dspa_kernels.launch import capability_of

# In order of preference; each is a module of the op's folder.
MODULES = {"cuda": "cuda_impl", "triton": "triton_impl", "reference": "reference"}
OPS = (
    "activation_counts",
    "map_lookup",
    "steer",
    "lookup_and_steer",
    "sparse_encode",
    "sparse_decode",
    "fsrl_residual",
)
BACKWARD = "_backward"
DEFAULT = os.environ.get("DSPA_BACKEND", "auto")


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run; the message says why."""


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can run here; if not, why not; and which ops it has."""

    available: bool
    reason: str
    ops: tuple[str, ...]


IMPLEMENTED = frozenset(
    (op, backend)
    for op in OPS
    for backend, module in MODULES.items()
    if (Path(__file__).parent / "ops" / op / f"{module}.py").is_file()
)


def _obstacle(backend: str, device: torch.device, dtype: torch.dtype = torch.float32, by_name: bool = False) -> str:
    """Why `backend` cannot compute in `dtype` on `device`; empty if it can."""
    if backend == "reference":
        return ""
    if backend == "cuda" and cuda_library.OBSTACLE:
        return cuda_library.OBSTACLE
    # Triton's interpreter and an emulated library run kernels on the CPU: to test them, never by themselves.
    emulated = EMULATED if backend == "cuda" else os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not (by_name and emulated):
        return f"it runs on CUDA devices and the tensors are on {device}"
    if backend == "cuda" and device.type == "cuda" and capability_of(device) < OLDEST_CAPABILITY:
        return f"it needs compute capability 8.0 and {device} has {capability_of(device) / 10}"
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return "Triton is not installed: torch's CUDA builds for Linux bring it, elsewhere pip install triton"
    if dtype == torch.float64:
        return "it computes in fp32 and an operand is fp64"
    return ""


def is_unasked(requested: str) -> bool:
    """Whether neither the call nor the environment names a backend."""
    return (requested, DEFAULT) == ("auto", "auto")


def choose(op: str, device: torch.device, requested: str = "auto", dtype: torch.dtype = torch.float32) -> str:
    """The backend that runs `op` on `device`, computing in `dtype` (fp32 or fp64).

    `requested="auto"` (or the environment variable DSPA_BACKEND, read once) takes the first of triton and
    reference that has the op and can run; an op may know when cuda is faster than triton. A backend asked for by
    name runs or raises `BackendError`; that of the environment is only for the ops that it has.
    """
    argument = "backend" if requested != "auto" else "DSPA_BACKEND"
    requested = DEFAULT if requested == "auto" else requested
    if requested != "auto" and requested not in MODULES:
        raise refuse(argument, repr(requested), ", ".join(("auto", *MODULES)))
    if argument == "DSPA_BACKEND" and (op, requested) not in IMPLEMENTED:
        requested = "auto"
    by_name = requested != "auto"
    candidates = (requested,) if by_name else ("triton", "reference")
    reasons = []
    for backend in candidates:
        missing = (op, backend) not in IMPLEMENTED
        reason = "this version has no such kernel" if missing else _obstacle(backend, device, dtype, by_name)
        if not reason:
            return backend
        reasons.append(f"{backend} cannot run {op}: {reason}")
    raise BackendError("; ".join(reasons) + ". Use backend='auto' or 'reference'.")


def implementation(op: str, backend: str) -> Callable[..., Any]:
    """The function that computes `op` on `backend`, a name that `choose` gave. A backward lives beside its op."""
    module = f"dspa_kernels.ops.{op.removesuffix(BACKWARD)}.{MODULES[backend]}"
    function: Callable[..., Any] = getattr(importlib.import_module(module), op)
    return function


def _as_specified(device: torch.device) -> AbstractContextManager[object]:
    """Without autocast, which would reach the products inside of an op and compute them in less."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def define_op(
    op: str,
    schema: str,
    fake: Callable[..., Any],
    mutates: tuple[str, ...] = (),
    fastest: Callable[..., str] | None = None,
) -> Any:
    """Register the custom op `dspa::<op>` and return it, a `CustomOpDef` to be called with keywords.

    `schema` is "(arguments) -> results" without the last argument, `str backend`, which names the module
    that computes. Implementations and `fake` (shapes and dtypes of the results) get the arguments by name.
    `mutates` names the arguments that the schema marks as written to. `fastest` gets the arguments, too, and says
    which backend "auto" is for them: at each launch, since a compiled graph serves many shapes.
    """
    parameters, results = schema.split(" -> ")
    names = [each.split()[-1] for each in parameters.strip("()").split(", ")]

    def run(*values: Any) -> Any:
        *inputs, backend = values
        arguments = dict(zip(names, inputs, strict=True))
        if fastest and backend == "auto":
            backend = fastest(**arguments)
        device = next(value.device for value in inputs if isinstance(value, torch.Tensor))
        # Kernels are launched on the current device, which need not be that of the tensors.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext(), _as_specified(device):
            return implementation(op, backend)(**arguments)

    def infer(*values: Any) -> Any:
        return fake(**dict(zip(names, values[:-1], strict=True)))

    full = f"{parameters[:-1]}, str backend) -> {results}"
    definition = torch.library.custom_op(f"dspa::{op}", run, mutates_args=mutates, schema=full)
    definition.register_fake(infer)
    return definition


def _load_error() -> str:
    """Why the CUDA library does not load; empty if it does."""
    try:
        cuda_library.library()
    except cuda_library.CudaError as error:
        return str(error)
    return ""


def available_backends() -> dict[str, BackendStatus]:
    """Every backend by name: whether it can run on this machine, why not, and the ops that it has."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {}
    for backend in MODULES:
        ops = tuple(op for op in OPS if (op, backend) in IMPLEMENTED)
        reason = "" if ops else f"this version has no {backend} kernels"
        if not reason and backend == "cuda":
            reason = cuda_library.OBSTACLE or _load_error()
        if not reason and _obstacle(backend, device):
            reason = "no CUDA device was found" if device.type == "cpu" else _obstacle(backend, device)
        found[backend] = BackendStatus(available=not reason, reason=reason, ops=ops)
    return found
