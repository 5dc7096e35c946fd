"""Processes that work together: those of torchrun or accelerate, or this one alone."""

from __future__ import annotations

import itertools
import os
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

from dspa.errors import refusal

# Longest wait for another process to finish a piece of work.
PATIENCE = timedelta(hours=1)
# Seconds between two looks at the store.
POLL = 0.2
_teams = itertools.count()
T = TypeVar("T")


class Team:
    """Ranks that share numbered pieces of work: a rank that is free takes the next one.

    They communicate through the store that the launcher's environment names (RANK, WORLD_SIZE, MASTER_ADDR,
    MASTER_PORT), and only to count. There is no collective operation, so a rank that dies does not block one that still
    has work.
    """

    def __init__(self) -> None:
        # Imported here, because torch takes seconds and the command line asks for its rank first.
        from torch.distributed import HashStore, PrefixStore  # type: ignore[attr-defined]

        self.rank, self.size = rank(), int(os.environ.get("WORLD_SIZE", "1"))
        if self.size > 1:
            self._store: Any = PrefixStore(f"dspa/{next(_teams)}", _launcher_store())
            return
        self._store = HashStore()
        warn_if_alone(stacklevel=4)

    def claim(self) -> int:
        """Return the number, from 0, of a piece that no other rank has or will have."""
        return int(self._store.add("claimed", 1)) - 1

    def add_finished(self, pieces: int = 0, triples: int = 0) -> int:
        """Count pieces, and the triples in them, as finished, and return the finished triples of all ranks."""
        # Triples first, so that they are counted once the last piece is.
        n_triples = int(self._store.add("triples", triples))
        self._store.add("pieces", pieces)
        return n_triples

    def in_turn(self, name: str, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 before it runs on any other rank, and return its result on this one.

        Args:
            name: name of the turn, used once per team.
            work: function to call.
        """
        if self.rank > 0:
            self._store.wait([name], PATIENCE)
        result = work()
        if self.rank == 0:
            self._store.set(name, "")
        return result

    def wait(self, pieces: int, show: Callable[[int], None]) -> None:
        """Wait until all pieces are finished.

        Args:
            pieces: number of pieces of all ranks together.
            show: called with the number of triples that are finished so far.

        Raises:
            RuntimeError: no rank finished a piece for PATIENCE.
        """
        n_before, since = -1, time.monotonic()
        while (n_finished := self._store.add("pieces", 0)) < pieces:
            show(self.add_finished())
            if n_finished > n_before:
                n_before, since = n_finished, time.monotonic()
            if time.monotonic() - since > PATIENCE.total_seconds():
                raise RuntimeError(
                    f"Another process has stopped: {pieces - n_finished} of {pieces} pieces are not finished, and none "
                    f"was finished for {PATIENCE}. Finished pieces are kept. Start again to do the rest."
                )
            time.sleep(POLL)
        show(self.add_finished())

    def leave(self) -> None:
        """Leave the team. Rank 0 leaves last, because the store may live in it."""
        n_left, since = self._store.add("left", 1), time.monotonic()
        while self.rank == 0 and n_left < self.size and time.monotonic() - since < PATIENCE.total_seconds():
            time.sleep(POLL)
            n_left = self._store.add("left", 0)


def warn_if_alone(*, stacklevel: int = 3) -> None:
    """Warn if a launcher was asked for several processes and started only this one.

    Args:
        stacklevel: as for `warnings.warn`.
    """
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        warnings.warn(
            "The launcher was asked for several processes and started only this one, as accelerate launch does on "
            "CPUs. It continues alone. For K processes: torchrun --nproc-per-node K -m dspa ...",
            stacklevel=stacklevel,
        )


def rank() -> int:
    """Return the rank of this process, 0 where it is alone."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Return the rank of this process on its machine, which is also the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def device_named(name: str) -> str:
    """Return the device that a name means; each of several processes has the GPU of its own number."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda", "mps"):
        raise refusal(ValueError, "`device`", repr(name), "auto, cuda, cuda:1, cpu, mps")
    if kind == "cuda" and not torch.cuda.is_available():
        raise refusal(ValueError, "`device`", f"{name!r}, and this machine has no CUDA device", "cpu, auto")
    if name != "cuda":
        return name
    if local_rank() >= torch.cuda.device_count():
        raise ValueError(
            f"This is process {local_rank()} on a machine of {torch.cuda.device_count()} GPUs; accepted: at most one "
            "process per GPU. Start fewer, or pass cpu as `device`."
        )
    return f"cuda:{local_rank()}"


@lru_cache(maxsize=1)
def _launcher_store() -> Any:
    """Return the launcher's store, one per process because it may listen at a port."""
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(iter(rendezvous("env://")))
    return store
