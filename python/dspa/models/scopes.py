"""Facts that hold within a `with` block of one thread or asyncio task, about an object that others use as well."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar


@dataclass(eq=False)
class Scope:
    """A fact about `owner` while its block is open.

    Attributes:
        owner: the object that it is about.
    """

    owner: object


S = TypeVar("S", bound=Scope)
# One variable for all owners: a context would keep one for each of them alive.
_OPEN: ContextVar[tuple[Scope, ...]] = ContextVar("dspa_scopes", default=())


@contextmanager
def opened(scope: S) -> Iterator[S]:
    """Open a scope within a `with` block."""
    _OPEN.set((*_OPEN.get(), scope))
    try:
        yield scope
    finally:
        _OPEN.set(tuple(other for other in _OPEN.get() if other is not scope))


def innermost(owner: object, kind: type[S]) -> S | None:
    """Return the scope of a kind that was opened last for `owner` and is open, or None.

    A compiled graph breaks here, since it cannot depend on the thread that runs it.
    """
    scopes = reversed(_OPEN.get())
    return next((scope for scope in scopes if scope.owner is owner and isinstance(scope, kind)), None)
