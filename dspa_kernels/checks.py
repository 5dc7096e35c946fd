"""Input errors, all of one form: which argument, what came, what is accepted, what to do."""

from collections.abc import Sequence

from torch import Tensor, dtype


class InputError(ValueError):
    """An argument that an op cannot take; the message names it and says what would be accepted."""


def refuse(argument: str, got: object, accepted: str, advice: str = "") -> InputError:
    """The error for one bad argument, to be raised by the caller."""
    message = f"`{argument}` is {got}; accepted: {accepted}."
    return InputError(f"{message} {advice}" if advice else message)


def check_shape(argument: str, tensor: Tensor, shape: Sequence[int | str], advice: str = "") -> None:
    """Raise unless `tensor` has `shape`, in which a string names a free dimension."""
    fits = tensor.dim() == len(shape) and all(
        isinstance(want, str) or have == want for have, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        wanted = "[" + ", ".join(str(size) for size in shape) + "]"
        raise refuse(argument, f"of shape {list(tensor.shape)}", f"shape {wanted}", advice)


def check_dtype(argument: str, tensor: Tensor, accepted: Sequence[dtype]) -> None:
    """Raise unless `tensor` has one of the dtypes `accepted`."""
    if tensor.dtype not in accepted:
        names = ", ".join(str(each) for each in accepted)
        raise refuse(argument, f"of dtype {tensor.dtype}", names, f"Convert it: {argument}.to({accepted[0]}).")


def check_device(argument: str, tensor: Tensor, like: Tensor, like_name: str) -> None:
    """Raise unless `tensor` is on the device of `like`."""
    if tensor.device != like.device:
        raise refuse(
            argument,
            f"on {tensor.device}",
            f"{like.device}, where `{like_name}` is",
            f"Move one of the two: {argument}.to({str(like.device)!r}).",
        )


def check_at_least(argument: str, value: float, least: float) -> None:
    """Raise unless `value` is a finite number that is not below `least`."""
    if not least <= value < float("inf"):
        raise refuse(argument, value, f"a finite number >= {least}")
