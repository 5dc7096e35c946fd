"""Places to write: files and folders that appear whole or not at all, and those that one process writes at a time.

New content is made in a workspace, a folder next to its target, which holds the name and a lock of its process. The
kernel releases the lock when the process ends, however it ends. A workspace whose lock is free is therefore a leftover,
and removed by the next process that writes there. Nothing else is ever removed, whatever its name.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import stat
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from tempfile import gettempdir, mkdtemp
from typing import TextIO

from dspa.errors import refusal
from dspa.schemas import parse_json

WORKSPACE = ".dspa-partial-"
# The file with the name of the process, in a workspace, and in a folder that is written over time.
OWNER, LOCK = ".dspa-owner", ".dspa.lock"
FORMAT = "dspa.writer.1"
FILE = "a file in a folder that exists"
# Errors of file systems that have no locks.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


# Files


def output_file(path: Path, what: str = "The output", kind: type[Exception] = ValueError) -> Path | None:
    """Return the regular file that a path means, there or not yet, with links resolved.

    Args:
        path: the path.
        what: what gives the path, for a message.
        kind: class of the error.

    Returns:
        The file, which can be replaced. None for what is written through: a pipe, a device of characters such as a
        terminal and /dev/null, and whatever the standard output or error of this process goes to.

    Raises:
        kind: a folder, a path in no folder, a socket, or a device of blocks.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        target = Path(os.path.realpath(path))
        if not target.parent.is_dir():
            raise refusal(kind, what, str(path), FILE) from None
        return target
    except OSError as error:
        raise refusal(kind, what, f"{path}, which cannot be reached ({error.strerror})", FILE) from error
    if _standard_stream(path) is not None or stat.S_ISCHR(mode) or stat.S_ISFIFO(mode):
        return None
    if stat.S_ISREG(mode):
        return Path(os.path.realpath(path))
    got = f"{path}, which is " + ("a folder" if stat.S_ISDIR(mode) else "a socket or a device of blocks")
    raise refusal(kind, what, got, f"{FILE}, a pipe or a device of characters")


def try_output(path: Path, what: str, kind: type[Exception] = ValueError) -> None:
    """Raise for a file that cannot be written. It is neither made nor changed.

    Args:
        path: as for `output_file`.
        what: as for `output_file`.
        kind: as for `output_file`.

    Raises:
        kind: as for `output_file`, or no permission to write.
    """
    target = output_file(path, what, kind)
    try:
        if target is None:
            # Not opened: who reads a pipe would see its end.
            if not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return
        if target.exists():
            target.open("r+b").close()
        with workspace(target.parent):
            pass
    except OSError as error:
        raise refusal(kind, what, f"{path}, which cannot be written ({error.strerror})", FILE) from error


def open_output(path: Path) -> TextIO:
    """Open a file to write text as it comes, from the start of the file; the standard streams go on where they are."""
    if (stream := _standard_stream(path)) is None:
        return path.open("w", encoding="utf-8")
    sys.stdout.flush()
    return os.fdopen(os.dup(stream), "w", encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a file to make, which takes the place of `path` in the end, or is removed if that fails.

    Args:
        path: a regular file, there or not, which keeps its permissions. Anything else is written through.

    Raises:
        OSError: the file cannot be written.
        ValueError: as for `output_file`.
    """
    target = output_file(path)
    with workspace(Path(gettempdir()) if target is None else target.parent) as place:
        made = place / "content"
        yield made
        if target is None:
            with made.open("rb") as content, open_output(path) as sink:
                shutil.copyfileobj(content, sink.buffer)
            return
        with made.open("r+b") as file:
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, made)
        os.replace(made, target)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file, or leave the earlier one as it is where that fails, as on a full disk.

    Args:
        path: as for `replacing`.
        content: all of its bytes.

    Raises:
        OSError: the file cannot be written.
        ValueError: as for `output_file`.
    """
    try:
        with replacing(path) as made:
            made.write_bytes(content)
    except OSError as error:
        raise OSError(
            f"{path} ({len(content) / 1e6:.1f} MB) could not be written: {error.strerror}. What was written before is "
            "kept. Make room or choose another folder, then start again."
        ) from error


def _standard_stream(path: Path) -> int | None:
    """Return the descriptor of the standard output or error, if that is what `path` is."""
    for stream in (1, 2):
        with suppress(OSError):
            if os.path.samestat(path.stat(), os.fstat(stream)):
                return stream
    return None


# Folders


@contextmanager
def workspace(folder: Path) -> Iterator[Path]:
    """Yield a new folder in `folder`, which is removed in the end, and after a kill by the next to write in `folder`.

    Raises:
        OSError: `folder` cannot be written.
    """
    remove_leftovers(folder)
    while True:
        place = Path(mkdtemp(prefix=WORKSPACE, dir=folder))
        # Others take it for a leftover as long as it is empty.
        with suppress(FileNotFoundError):
            if (owner := _lock(place / OWNER)) is not None:
                break
    try:
        _sign(owner)
        yield place
    finally:
        with suppress(OSError):
            _remove(place)
        os.close(owner)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to fill, which gets the name `path` in the end, or is removed if that fails.

    Raises:
        OSError: it cannot be written, or there is something at `path` by then.
    """
    with workspace(path.parent) as place:
        made = place / "content"
        made.mkdir()
        yield made
        made.rename(path)


@contextmanager
def held(path: Path, what: str, kind: type[Exception], *, file: bool = False) -> Iterator[None]:
    """Keep other processes from writing to a folder for as long as the context lasts.

    Args:
        path: the folder, which is made if it is not there. If that and nothing else happened, it is removed again.
        what: what gives the path, for a message.
        kind: class of the error.
        file: hold the file `path` and no folder.

    Raises:
        kind: another process holds it, or it cannot be written.
    """
    lock = path.with_name(f".{path.name}{LOCK}") if file else path / LOCK
    accepted = f"a {'file' if file else 'folder'} that can be written, and that no other process writes"
    made = not file and not path.exists()
    try:
        if not file:
            path.mkdir(parents=True, exist_ok=True)
        remove_leftovers(lock.parent)
        holder = _lock(lock)
    except OSError as error:
        done = "made" if made or not lock.parent.is_dir() else "written"
        raise refusal(kind, what, f"{path}, which cannot be {done} ({error.strerror})", accepted) from error
    if holder is None:
        got = f"{path}, which {_signature(lock) or 'another process'} is writing"
        raise refusal(kind, what, got, accepted, "Wait until it has ended, or name another.")
    try:
        _sign(holder)
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(holder)
        if made:
            with suppress(OSError):
                path.rmdir()


def try_folder(path: Path, what: str, kind: type[Exception]) -> None:
    """Raise for a folder that cannot be written, or that another process writes. It is neither made nor changed.

    Args:
        path: as for `held`.
        what: as for `held`.
        kind: as for `held`.

    Raises:
        kind: as for `held`.
    """
    if path.exists():
        with held(path, what, kind):
            return
    above = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        with workspace(above):
            pass
    except OSError as error:
        got = f"{path}, which cannot be made ({error.strerror})"
        raise refusal(kind, what, got, "a folder in one that can be written") from error


def is_own(path: Path) -> bool:
    """Return True for a file or folder that this module makes and removes again."""
    return path.name == LOCK or path.name.startswith(WORKSPACE)


def remove_leftovers(folder: Path) -> None:
    """Remove the workspaces in `folder` whose processes have ended."""
    for place in folder.glob(f"{WORKSPACE}*"):
        # It is empty if its process was killed before it could sign.
        with suppress(OSError):
            place.rmdir()
        with suppress(OSError):
            _remove_abandoned(place)


def _remove_abandoned(place: Path) -> None:
    if place.is_symlink():
        return
    owner = os.open(place / OWNER, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        unsigned = not os.fstat(owner).st_size and [item.name for item in place.iterdir()] == [OWNER]
        if unsigned or _signature(place / OWNER):
            _remove(place)
    finally:
        os.close(owner)


def _remove(place: Path) -> None:
    """Remove a workspace, its owner last, so that another process can finish this."""
    for item in place.iterdir():
        if item.is_dir() and not item.is_symlink():
            shutil.rmtree(item)
        elif item.name != OWNER:
            item.unlink()
    (place / OWNER).unlink()
    place.rmdir()


# Names of processes


def _lock(path: Path) -> int | None:
    """Return a descriptor of the file `path`, made if it is not there, whose lock this process has now.

    Returns:
        None if another process has the lock.

    Raises:
        FileExistsError: a file that no process of this package signed.
        OSError: the file cannot be opened.
    """
    while True:
        descriptor, kept = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            kept = _is_at(path, descriptor)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            warnings.warn(f"{path.parent} has no locks: nothing keeps other processes from writing.", stacklevel=4)
            kept = True
        finally:
            if not kept:
                os.close(descriptor)
        # Else who had the lock before has removed the file since.
        if kept:
            return descriptor


def _is_at(path: Path, descriptor: int) -> bool:
    """Return True if an open file is the one at `path` now.

    Raises:
        FileExistsError: no process of this package signed it.
    """
    opened = os.fstat(descriptor)
    with suppress(FileNotFoundError):
        if os.path.samestat(path.stat(), opened):
            if opened.st_size and _signature(path) is None:
                raise FileExistsError(errno.EEXIST, f"{path} is a file of something else")
            return True
    return False


def _sign(descriptor: int) -> None:
    """Write the name of this process."""
    since = datetime.now(timezone.utc).isoformat(timespec="seconds")
    name = {"format": FORMAT, "host": socket.gethostname(), "pid": os.getpid(), "since": since}
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps(name).encode())


def _signature(path: Path) -> str | None:
    """Return the name of the process that signed a file, for a message, or None for another file."""
    try:
        name = parse_json(path.read_bytes()[:4096].decode(errors="replace"), ValueError, str(path))
        if name["format"] == FORMAT:
            return f"process {name['pid']} on {name['host']} (since {name['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None
