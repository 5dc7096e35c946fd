"""Which implementation of an op runs: cuda, triton or reference, and why the others cannot."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dspa_kernels.checks import refuse

# In order of preference; each is a module of the op's folder.
MODULES = {"cuda": "cuda_impl", "triton": "triton_impl", "reference": "reference"}
OPS = (
    "activation_counts",
    "map_lookup",
    "steer",
    "lookup_and_steer",
    "sparse_encode",
    "sparse_decode",
)
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
    # Triton's interpreter runs kernels on the CPU: to test them, never by itself.
    interpreted = by_name and backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        return f"it runs on CUDA devices and the tensors are on {device}"
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if dtype == torch.float64:
        return "it computes in fp32 and an operand is fp64"
    return ""


def choose(op: str, device: torch.device, requested: str = "auto", dtype: torch.dtype = torch.float32) -> str:
    """The backend that runs `op` on `device`, computing in `dtype` (fp32 or fp64).

    `requested="auto"` (or the environment variable DSPA_BACKEND, read once) takes the first of cuda, triton
    and reference that has the op and can run. A backend asked for by name runs or raises `BackendError`.
    """
    requested = DEFAULT if requested == "auto" else requested
    if requested != "auto" and requested not in MODULES:
        raise refuse("backend", repr(requested), ", ".join(("auto", *MODULES)))
    by_name = requested != "auto"
    candidates = (requested,) if by_name else MODULES
    reasons = []
    for backend in candidates:
        missing = (op, backend) not in IMPLEMENTED
        reason = "this version has no such kernel" if missing else _obstacle(backend, device, dtype, by_name)
        if not reason:
            return backend
        reasons.append(f"{backend} cannot run {op}: {reason}")
    raise BackendError("; ".join(reasons) + ". Use backend='auto' or 'reference'.")


def implementation(op: str, backend: str) -> Callable[..., Any]:
    """The function that computes `op` on `backend`, a name that `choose` gave."""
    function: Callable[..., Any] = getattr(importlib.import_module(f"dspa_kernels.ops.{op}.{MODULES[backend]}"), op)
    return function


def define_op(op: str, schema: str, fake: Callable[..., Any], mutates: tuple[str, ...] = ()) -> Callable[..., Any]:
    """Register the custom op `dspa::<op>` and return it, to be called with keywords.

    `schema` is "(arguments) -> results" without the last argument, `str backend`, which names the module
    that computes. Implementations and `fake` (shapes and dtypes of the results) get the arguments by name.
    `mutates` names the arguments that the schema marks as written to.
    """
    arguments, results = schema.split(" -> ")
    names = [each.split()[-1] for each in arguments.strip("()").split(", ")]

    def run(*values: Any) -> Any:
        *inputs, backend = values
        device = next(value.device for value in inputs if isinstance(value, torch.Tensor))
        # Kernels are launched on the current device, which need not be that of the tensors.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return implementation(op, backend)(**dict(zip(names, inputs, strict=True)))

    def infer(*values: Any) -> Any:
        return fake(**dict(zip(names, values[:-1], strict=True)))

    full = f"{arguments[:-1]}, str backend) -> {results}"
    definition = torch.library.custom_op(f"dspa::{op}", run, mutates_args=mutates, schema=full)
    definition.register_fake(infer)
    return definition


def available_backends() -> dict[str, BackendStatus]:
    """Every backend by name: whether it can run on this machine, why not, and the ops that it has."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {}
    for backend in MODULES:
        ops = tuple(op for op in OPS if (op, backend) in IMPLEMENTED)
        reason = "" if ops else f"this version has no {backend} kernels"
        if not reason and _obstacle(backend, device):
            reason = "no CUDA device was found" if device.type == "cpu" else _obstacle(backend, device)
        found[backend] = BackendStatus(available=not reason, reason=reason, ops=ops)
    return found
