"""Scopes belong to the thread or asyncio task that opens them."""

from __future__ import annotations

import asyncio
import contextvars
import threading

from dspa.models.scopes import Scope, innermost, opened


class Other(Scope):
    """Another kind of scope."""


def test_the_innermost_of_an_owner_and_kind() -> None:
    owner, stranger = object(), object()
    with opened(Scope(owner)) as outer, opened(Other(owner)) as other, opened(Scope(owner)) as inner:
        assert innermost(owner, Scope) is inner and innermost(owner, Other) is other
        assert innermost(stranger, Scope) is None
        assert outer is not inner
    assert innermost(owner, Scope) is None


def test_blocks_that_end_in_another_order() -> None:
    owner = object()
    first, second = opened(Scope(owner)), opened(Scope(owner))
    first.__enter__()
    kept = second.__enter__()
    first.__exit__(None, None, None)
    assert innermost(owner, Scope) is kept
    second.__exit__(None, None, None)
    assert innermost(owner, Scope) is None


def test_threads_and_tasks_have_their_own() -> None:
    owner, seen = object(), list[Scope | None]()

    async def task() -> None:
        with opened(Scope(owner)) as scope:
            await asyncio.sleep(0)
            assert innermost(owner, Scope) is scope

    async def tasks() -> None:
        await asyncio.gather(task(), task())

    with opened(Scope(owner)) as scope:
        thread = threading.Thread(target=lambda: seen.append(innermost(owner, Scope)))
        thread.start()
        thread.join()
        # As asyncio.to_thread does.
        contextvars.copy_context().run(lambda: seen.append(innermost(owner, Scope)))
    asyncio.run(tasks())
    assert seen == [None, scope] and innermost(owner, Scope) is None
