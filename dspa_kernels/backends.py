"""Choice of the implementation that runs an op: cuda, triton or reference."""

from __future__ import annotations

import importlib
import importlib.util
import operator
import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version
from torch.nn import Parameter

from dspa_kernels import cuda_library
from dspa_kernels.checks import refuse
from dspa_kernels.cuda_library import EMULATED, OLDEST_CAPABILITY
from dspa_kernels.formulas import without_autocast
from dspa_kernels.launch import capability_of

# In order of preference, with the module in the op's folder.
MODULES = {"cuda": "cuda_impl", "triton": "triton_impl", "reference": "reference"}
OPS = (
    "activation_counts",
    "activation_sums",
    "activation_bits",
    "bit_counts",
    "map_lookup",
    "steer",
    "lookup_and_steer",
    "sparse_encode",
    "sparse_decode",
    "fsrl_residual",
    "place_tokens",
)
# Suffixes of ops that are in the modules of another: its backward, and its form that writes to its arguments.
BACKWARD, IN_PLACE = "_backward", "_"
DEFAULT = os.environ.get("DSPA_BACKEND") or "auto"
# Keys that PyTorch's dispatcher includes in a thread while a mode, a transformation of torch.func or functionalisation
# intercepts the calls of operators.
INTERCEPTORS = tuple(
    getattr(torch._C.DispatchKey, name)
    for name in ("Python", "PreDispatch", "FuncTorchDynamicLayerFrontMode", "Functionalize")
)
_is_included = torch._C._dispatch_tls_is_dispatch_key_included
# How the dispatcher converts what is passed for a number. Triton would compile another kernel for an int in place of a
# float, and refuse a number of NumPy's.
NUMBERS: dict[str, Callable[[Any], object]] = {"int": operator.index, "float": float, "bool": bool}
# The classes of tensors without a behaviour of their own.
PLAIN = (Tensor, Parameter)


class BackendError(RuntimeError):
    """A backend that was named and cannot run; the message says why."""


@dataclass(frozen=True)
class BackendStatus:
    """Availability of a backend on this machine.

    Attributes:
        available: True if it can run.
        reason: why it cannot run, empty if it can.
        ops: the ops that it has.
    """

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
    """Return why `backend` cannot compute in `dtype` on `device`, empty if it can."""
    if backend == "reference":
        return ""
    if backend == "cuda" and cuda_library.OBSTACLE:
        return cuda_library.OBSTACLE
    # Triton's interpreter and an emulated library run kernels on the CPU, for tests, and only if named.
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


def is_auto(requested: str) -> bool:
    """Return True if neither the call nor the environment names a backend."""
    return (requested, DEFAULT) == ("auto", "auto")


def is_plain(requested: str) -> bool:
    """Return True if plain PyTorch computes all ops on a CPU, as nothing else was named."""
    return (DEFAULT if requested == "auto" else requested) in ("auto", "reference")


def check_backend(argument: str, name: object) -> None:
    """Raise `InputError` unless `name` is that of a backend, or "auto"."""
    if name not in ("auto", *MODULES):
        raise refuse(argument, repr(name), ", ".join(("auto", *MODULES)))


def choose(
    op: str,
    device: torch.device,
    requested: str = "auto",
    dtype: torch.dtype = torch.float32,
    unfit: Callable[[], str] = str,
) -> str:
    """Return the backend that runs an op.

    "auto" takes the first of triton and reference that has the op and can run. An op may know when cuda is faster than
    triton. The environment variable DSPA_BACKEND, read once, replaces "auto" where its backend has the op and takes the
    arguments.

    Args:
        op: name of the op.
        device: device of the tensors.
        requested: "auto", or the name of a backend.
        dtype: dtype to compute in, fp32 or fp64.
        unfit: function that returns why the op's CUDA kernel does not take the arguments, empty if it does. It is
            called only if that is requested.

    Raises:
        InputError: an unknown name.
        BackendError: the named backend cannot run.
    """
    argument = "backend" if requested != "auto" else "DSPA_BACKEND"
    requested = DEFAULT if requested == "auto" else requested
    check_backend(argument, requested)
    if argument == "DSPA_BACKEND" and ((op, requested) not in IMPLEMENTED or (requested == "cuda" and unfit())):
        requested = "auto"
    by_name = requested != "auto"
    candidates = (requested,) if by_name else ("triton", "reference")
    reasons = []
    for backend in candidates:
        missing = (op, backend) not in IMPLEMENTED
        reason = "this version has no such kernel" if missing else _obstacle(backend, device, dtype, by_name)
        reason = reason or (unfit() if backend == "cuda" else "")
        if not reason:
            return backend
        reasons.append(f"{backend} cannot run {op}: {reason}")
    raise BackendError("; ".join(reasons) + f". Use {argument}='auto' or 'reference'.")


def owner(op: str) -> str:
    """Return the op of `OPS` in whose modules `op` is."""
    return op.removesuffix(BACKWARD).removesuffix(IN_PLACE)


def implementation(op: str, backend: str) -> Callable[..., Any]:
    """Return the function that computes `op` on `backend`."""
    module = f"dspa_kernels.ops.{owner(op)}.{MODULES[backend]}"
    function: Callable[..., Any] = getattr(importlib.import_module(module), op)
    return function


def _device_guard(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which `device` is the current one, because kernels are launched there."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def is_intercepted(values: Iterable[object]) -> bool:
    """Return True if PyTorch has to see a call with these arguments.

    It does where something traces, transforms or differentiates operators, and for tensors that are not plain.
    """
    if torch.compiler.is_compiling() or torch._C._is_tracing() or any(map(_is_included, INTERCEPTORS)):
        return True
    if forward_ad._current_level >= 0:
        return True
    records = torch.is_grad_enabled()
    for value in values:
        if isinstance(value, Tensor) and (
            type(value) not in PLAIN or value.is_meta or (records and value.requires_grad)
        ):
            return True
    return False


def _check_not_forward(op: str, values: Iterable[object]) -> None:
    """Raise `BackendError` for a tensor with a tangent (forward-mode AD), which PyTorch drops in a custom op."""
    if forward_ad._current_level >= 0:
        for value in values:
            if isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None:
                raise BackendError(f"{op} has no forward-mode derivative (jvp). Use backward, or detach its inputs.")


def define_op(
    op: str,
    schema: str,
    fake: Callable[..., Any],
    mutates: tuple[str, ...] = (),
    fastest: Callable[..., str] | None = None,
) -> Callable[..., Any]:
    """Register the custom op `dspa::<op>` and return a function that calls it with keywords.

    The dispatch of a custom op takes PyTorch longer than everything else that an eager step does on the host. Where
    nothing would intercept the call, the function calls the implementation itself.

    Args:
        op: name of the op, and of the function in each backend's module.
        schema: "(arguments) -> results" without the last argument, `str backend`.
        fake: function of the arguments, by name, that returns empty results of the right shapes and dtypes.
        mutates: the arguments that the schema marks as written to.
        fastest: function of the arguments, by name, that returns the backend of "auto". It runs at each launch,
            because a compiled graph serves many shapes.
    """
    parameters, results = schema.split(" -> ")
    types = {name: type_ for type_, name in map(str.split, parameters.strip("()").split(", "))}
    names = list(types)
    converters = [(name, NUMBERS[type_]) for name, type_ in types.items() if type_ in NUMBERS]

    def run(backend: str, arguments: dict[str, Any]) -> Any:
        if fastest and backend == "auto":
            backend = fastest(**arguments)
        device = arguments[names[0]].device
        with _device_guard(device), without_autocast(device):
            return implementation(op, backend)(**arguments)

    def kernel(*values: Any) -> Any:
        return run(values[-1], dict(zip(names, values[:-1], strict=True)))

    def infer(*values: Any) -> Any:
        return fake(**dict(zip(names, values[:-1], strict=True)))

    full = f"{parameters[:-1]}, str backend) -> {results}"
    registered = torch.library.custom_op(f"dspa::{op}", kernel, mutates_args=mutates, schema=full)
    registered.register_fake(infer)

    def call(*, backend: str, **arguments: Any) -> Any:
        _check_not_forward(op, arguments.values())
        if is_intercepted(arguments.values()):
            return registered(**arguments, backend=backend)
        for name, convert in converters:
            arguments[name] = convert(arguments[name])
        result = run(backend, arguments)
        for name in mutates:
            if arguments[name] is not None:
                increment_version(arguments[name])
        return result

    return call


def refuse_backward(op: str) -> None:
    """Let `backward` through an op of an SAE end in an error that names what has gradients."""

    def backward(ctx: Any, *grads: Tensor) -> None:
        raise BackendError(
            f"{op} has no gradient, as it is for inference, and so is FusedSAE. An SAE of SAELens keeps its gradients "
            "with dspa_kernels.fuse(sae)."
        )

    torch.library.register_autograd(f"dspa::{op}", backward)


def _load_error() -> str:
    """Return why the CUDA library does not load, empty if it does."""
    try:
        cuda_library.library()
    except cuda_library.CudaError as error:
        return str(error)
    return ""


def available_backends() -> dict[str, BackendStatus]:
    """Return every backend by name: if it can run on this machine, why not, and its ops."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    statuses = {}
    for backend in MODULES:
        ops = tuple(op for op in OPS if (op, backend) in IMPLEMENTED)
        reason = "" if ops else f"this version has no {backend} kernels"
        if not reason and backend == "cuda":
            reason = cuda_library.OBSTACLE or _load_error()
        if not reason and _obstacle(backend, device):
            reason = "no CUDA device was found" if device.type == "cpu" else _obstacle(backend, device)
        statuses[backend] = BackendStatus(available=not reason, reason=reason, ops=ops)
    return statuses
