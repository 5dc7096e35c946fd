"""The processes that collect together: those of torchrun or accelerate, or this one alone."""

from __future__ import annotations

import itertools
import os
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

# How long a process waits for another to finish one piece of work.
PATIENCE = timedelta(hours=1)
POLL = 0.2
_teams = itertools.count()
T = TypeVar("T")


class Team:
    """Ranks that share out numbered pieces of work, whoever is free taking the next.

    They talk through the store that the launcher's environment names (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT),
    and only to count: nothing has to be taken part in, so a rank that dies holds up nobody who still has work.
    """

    def __init__(self) -> None:
        # Here, because torch takes seconds and a command line asks for its rank first.
        from torch.distributed import HashStore, PrefixStore  # type: ignore[attr-defined]

        self.rank, self.size = rank(), int(os.environ.get("WORLD_SIZE", "1"))
        if self.size > 1:
            self._store: Any = PrefixStore(f"dspa/{next(_teams)}", _launched())
            return
        self._store = HashStore()
        warn_if_alone(stacklevel=4)

    def claim(self) -> int:
        """The number, from 0, of a piece that no other rank has or will have."""
        return int(self._store.add("claimed", 1)) - 1

    def finished(self, pieces: int = 0, triples: int = 0) -> int:
        """Count pieces as finished, and the triples in them; how many triples are, of all ranks."""
        # Triples first, so that they are there when the last piece is.
        done = int(self._store.add("triples", triples))
        self._store.add("pieces", pieces)
        return done

    def in_turn(self, name: str, work: Callable[[], T]) -> T:
        """Let rank 0 do something before any other rank does it; `name` is of one use in a team."""
        if self.rank > 0:
            self._store.wait([name], PATIENCE)
        result = work()
        if self.rank == 0:
            self._store.set(name, "")
        return result

    def wait(self, pieces: int, show: Callable[[int], None]) -> None:
        """Until so many pieces are finished; `show` is told the triples finished so far.

        Raises:
            RuntimeError: no rank finished any for a long time.
        """
        last, since = -1, time.monotonic()
        while (done := self._store.add("pieces", 0)) < pieces:
            show(self.finished())
            if done > last:
                last, since = done, time.monotonic()
            if time.monotonic() - since > PATIENCE.total_seconds():
                raise RuntimeError(
                    f"Another process has stopped: {pieces - done} of {pieces} pieces are not finished, and none was "
                    f"for {PATIENCE}. What is finished is kept: start again, and the rest is done."
                )
            time.sleep(POLL)
        show(self.finished())

    def leave(self) -> None:
        """The store may live in rank 0, which therefore leaves last."""
        left, since = self._store.add("left", 1), time.monotonic()
        while self.rank == 0 and left < self.size and time.monotonic() - since < PATIENCE.total_seconds():
            time.sleep(POLL)
            left = self._store.add("left", 0)


def warn_if_alone(*, stacklevel: int = 3) -> None:
    """Say so if a launcher was asked for several processes, and started this one as if it were the only one."""
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        warnings.warn(
            "The launcher was asked for several processes and started one, as accelerate launch does on CPUs. It goes "
            "on alone. For K processes: torchrun --nproc-per-node K -m dspa ...",
            stacklevel=stacklevel,
        )


def rank() -> int:
    """Of this process, 0 where it is alone."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Of this process on its machine, which is also the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@lru_cache(maxsize=1)
def _launched() -> Any:
    """The store of the launcher; one a process, since it may listen at a port."""
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(iter(rendezvous("env://")))
    return store
