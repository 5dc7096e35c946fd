"""Errors of the package, and the one form of a message about bad input."""

import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec
from typing import TypeVar


class ModelError(RuntimeError):
    """A model, or a call of it, that cannot be steered or read."""


class MapError(ValueError):
    """A conditional-difference map that is damaged, or does not belong to what it is used with."""


class AdapterError(ValueError):
    """An FSRL adapter that is damaged, or does not belong to what it is used with."""


class VectorError(ValueError):
    """A steering vector that is damaged, or has numbers or settings that cannot be used."""


class PersonaError(ValueError):
    """Effects of latents, or a persona, that are damaged or do not belong to what they are used with."""


class PreferenceError(ValueError):
    """A source of triples, or one triple, that cannot be used. The message names it and says what to do."""


class TextError(ValueError):
    """A file of text that cannot be used. The message names the line and says what to do."""


class ChatTemplateError(ValueError):
    """A chat template that fails on messages, or does not come to an end with them."""


class TrainingError(ValueError):
    """A training that cannot begin or continue."""


class LabelError(ValueError):
    """Labels or rules that cannot be used. The message names the file and the latents."""


class JudgeError(RuntimeError):
    """A judge that cannot be asked, or replies of one that cannot be used. The message says what to do."""


class TraceError(ValueError):
    """A file of edits that is damaged, or does not belong to what it is read with."""


class SAEError(ValueError):
    """An SAE, or a file of one, that cannot be used. The message says why, and what is accepted."""


E = TypeVar("E", bound=Exception)


def refusal(kind: type[E], what: str, got: object, accepted: str, advice: str = "") -> E:
    """Return the error for one bad argument or file, to be raised by the caller.

    Args:
        kind: class of the error.
        what: the argument in backticks, the option or the file.
        got: its value. Pass `repr(value)` for an arbitrary one.
        accepted: values that are accepted.
        advice: what to do, as a whole sentence.
    """
    return kind(f"{what} is {got}; accepted: {accepted}. {advice}".rstrip())


def listed(values: Iterable[object], most: int = 10) -> str:
    """Return values for a message, "1, 2, 3 and 40 more", at most `most` of them by themselves."""
    texts = [str(value) for value in values]
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


def require_package(package: str, what: str, advice: str = "") -> None:
    """Raise `RuntimeError`, with the command that installs it, unless an optional package is installed.

    Args:
        package: its name in the package index.
        what: what needs it, as the subject of a sentence.
        advice: another way out, as a whole sentence.
    """
    if find_spec(package.replace("-", "_")) is None:
        command = install_command(package)
        raise RuntimeError(f"{what} needs the package {package}, which is not installed: {command}. {advice}".rstrip())


def install_command(package: str) -> str:
    """Return the command that installs a package in the versions that this one takes."""
    try:
        wanted = [line.partition(";")[0].strip() for line in requires("dspa-kernels") or []]
    except PackageNotFoundError:
        # Run from a folder that is on the path and not installed.
        wanted = []
    requirement = next((line for line in wanted if re.split(r"[^\w.-]", line)[0] == package), package)
    return f'pip install "{requirement}"'
