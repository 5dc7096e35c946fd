"""Input errors in one form: the argument, its value, what is accepted, what to do."""

from collections.abc import Mapping, Sequence

from torch import Tensor, dtype


class InputError(ValueError):
    """An invalid argument of an op. The message names it and says what is accepted."""


def refuse(argument: str, got: object, accepted: str, advice: str = "") -> InputError:
    """Return the error for an invalid argument, for the caller to raise."""
    message = f"`{argument}` is {got}; accepted: {accepted}."
    return InputError(f"{message} {advice}" if advice else message)


def check_shape(argument: str, tensor: Tensor, shape: Sequence[int | str], advice: str = "") -> None:
    """Raise `InputError` unless `tensor` is one and has `shape`, in which a string names a free dimension."""
    try:
        sizes = tensor.shape
    except AttributeError:
        raise _not_a_tensor(argument, tensor, advice) from None
    if sizes == shape or (len(sizes) == len(shape) and all(map(_is_accepted, sizes, shape))):
        return
    accepted = "[" + ", ".join(str(size) for size in shape) + "]"
    raise refuse(argument, f"of shape {list(sizes)}", f"shape {accepted}", advice)


def _not_a_tensor(argument: str, value: object, advice: str = "") -> InputError:
    kind = type(value).__name__
    converters = {"ndarray": "torch.from_numpy", "list": "torch.tensor", "tuple": "torch.tensor"}
    convert = f"Convert it: {converters[kind]}({argument})." if kind in converters else ""
    return refuse(argument, f"a {kind}", "a tensor", convert or advice)


def _is_accepted(size: int, accepted: int | str) -> bool:
    return size == accepted or isinstance(accepted, str)


def check_dtype(argument: str, tensor: Tensor, accepted: Sequence[dtype]) -> None:
    """Raise `InputError` unless `tensor` is one and has one of the `accepted` dtypes."""
    if not isinstance(tensor, Tensor):
        raise _not_a_tensor(argument, tensor)
    if tensor.dtype not in accepted:
        names = ", ".join(map(str, accepted))
        raise refuse(argument, f"of dtype {tensor.dtype}", names, f"Convert it: {argument}.to({accepted[0]}).")


def check_device(argument: str, tensor: Tensor, like: Tensor, like_name: str) -> None:
    """Raise `InputError` unless `tensor` is on the device of `like`."""
    if tensor.device != like.device:
        raise refuse(
            argument,
            f"on {tensor.device}",
            f"{like.device}, where `{like_name}` is",
            f"Move one of the two: {argument}.to({str(like.device)!r}).",
        )


def check_contiguous(argument: str, tensor: Tensor, advice: str) -> None:
    """Raise `InputError` unless `tensor` is contiguous, as kernels read and write it."""
    if not tensor.is_contiguous():
        raise refuse(argument, f"not contiguous, of strides {list(tensor.stride())}", "a contiguous tensor", advice)


def check_buffers(
    buffers: Mapping[str, tuple[Tensor, dtype, Sequence[int | str]]], like: Tensor, like_name: str
) -> None:
    """Raise `InputError` unless each tensor has its dtype and shape, is contiguous, and on the device of `like`."""
    for name, (tensor, accepted, shape) in buffers.items():
        check_shape(name, tensor, shape)
        check_dtype(name, tensor, (accepted,))
        check_device(name, tensor, like, like_name)
        check_contiguous(name, tensor, "Pass a tensor of its own.")


def check_at_least(argument: str, value: float, least: float) -> None:
    """Raise `InputError` unless `value` is a finite number >= `least`."""
    try:
        accepted = least <= value < float("inf")
    except TypeError:
        accepted = False
    if not accepted:
        raise refuse(argument, repr(value), f"a finite number >= {least}")


def check_whole(argument: str, value: int, least: int, most: int | None = None, meaning: str = "") -> None:
    """Raise `InputError` unless `value` is a whole number from `least` to `most`; `meaning` says what `most` is."""
    # Symbolic numbers of a compiled graph are no int, and have an index.
    is_whole = hasattr(value, "__index__") and not isinstance(value, bool)
    if not is_whole or value < least or (most is not None and value > most):
        accepted = f"a whole number >= {least}" if most is None else f"a whole number from {least} to {most}{meaning}"
        raise refuse(argument, repr(value), accepted)
