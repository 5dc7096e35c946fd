"""Files and folders that appear whole or not at all, next to users' own; and who may write them."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from dspa.outputs import held, is_own, new_folder, output_file, replacing, try_folder, try_output, workspace
from dspa.outputs import write_atomically as write

OURS = '{"format": "dspa.writer.1", "host": "h", "pid": 1, "since": "then"}'


class Busy(Exception):
    """Stands for the error of a caller."""


def in_a_child(work: Callable[[], Any]) -> multiprocessing.Process:
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    return child


def killed(work: Callable[[], Any]) -> None:
    """Run `work`, which ends with SIGKILL, in a copy of this process."""
    child = in_a_child(work)
    child.join()
    assert child.exitcode == -signal.SIGKILL


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# Files


def test_a_file_is_replaced_and_keeps_its_permissions(tmp_path: Path) -> None:
    path, usual = tmp_path / "map", tmp_path / "usual"
    usual.touch()
    write(path, b"one")
    assert path.stat().st_mode == usual.stat().st_mode
    path.chmod(0o640)
    write(path, b"two")
    assert path.read_bytes() == b"two" and path.stat().st_mode & 0o777 == 0o640
    assert names(tmp_path) == {"map", "usual"}


@pytest.mark.parametrize("there", [True, False])
def test_links_are_resolved(tmp_path: Path, there: bool) -> None:
    (tmp_path / "far").mkdir()
    target, link, chain = tmp_path / "far" / "map", tmp_path / "link", tmp_path / "chain"
    if there:
        target.write_bytes(b"one")
    link.symlink_to("far/map")
    chain.symlink_to("link")
    try_output(chain, "--out")
    assert target.exists() == there
    write(chain, b"two")
    assert chain.is_symlink() and link.is_symlink() and target.read_bytes() == b"two"
    assert names(tmp_path / "far") == {"map"}


def test_a_device_is_written_through(tmp_path: Path) -> None:
    null = tmp_path / "null"
    try:
        os.mknod(null, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        null.write_bytes(b"")
    except PermissionError:
        pytest.skip("Devices cannot be made here.")
    try_output(null, "--out")
    write(null, b"nothing")
    assert stat.S_ISCHR(null.stat().st_mode) and names(tmp_path) == {"null"}


def test_a_full_device_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"/dev/full \(0\.0 MB\) could not be written: No space left on device"):
        write(Path("/dev/full"), b"content")
    assert stat.S_ISCHR(Path("/dev/full").stat().st_mode)


def test_a_pipe_is_written_through_and_not_opened_before(tmp_path: Path) -> None:
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    # It would wait for a reader for ever.
    try_output(pipe, "--out")
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()), daemon=True)
    reader.start()
    write(pipe, b"content" * 50_000)
    reader.join(10)
    assert read == [b"content" * 50_000] and stat.S_ISFIFO(pipe.stat().st_mode)


CODE = """
from pathlib import Path
from dspa.outputs import try_output, write_atomically
print("before")
try_output(Path({path!r}), "--out")
write_atomically(Path({path!r}), b"content\\n")
print("after")
"""


@pytest.mark.parametrize("path", ["/dev/stdout", "/proc/self/fd/1", "named", "linked"])
def test_the_standard_output_goes_on_where_it_is(tmp_path: Path, path: str) -> None:
    """Also where it is a file, which is given by its own name as well."""
    log = tmp_path / "named"
    (tmp_path / "linked").symlink_to("named")
    code = [sys.executable, "-c", CODE.format(path=path if path.startswith("/") else str(tmp_path / path))]
    with log.open("w") as file:
        subprocess.run(code, stdout=file, check=True)
    assert log.read_text() == "before\ncontent\nafter\n"
    if path.startswith("/"):
        assert subprocess.run(code, capture_output=True, text=True, check=True).stdout == log.read_text()


def test_what_can_be_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        (tmp_path / "folder").mkdir()
        (tmp_path / "file").write_text("kept")
        (tmp_path / "loop").symlink_to("loop")
        before = names(tmp_path)
        for path, got in {
            "socket": "socket, which is a socket or a device of blocks",
            "folder": "folder, which is a folder",
            "missing/map": "missing/map",
            "file/map": "file/map",
            "loop": r"loop, which cannot be reached \(Too many levels of symbolic links\)",
            "x" * 300: r"x+, which cannot be reached \(File name too long\)",
        }.items():
            for refuse in (output_file, try_output):
                with pytest.raises(Busy, match=rf"^--out is {got}; accepted: a file in a folder that exists"):
                    refuse(Path(path), "--out", Busy)
        assert names(tmp_path) == before and (tmp_path / "file").read_text() == "kept"


def as_user(work: Callable[[], Any]) -> str:
    """Return the message of the error that `work` raises as a user who may not do everything."""
    ours, theirs = multiprocessing.Pipe(duplex=False)

    def run() -> None:
        if os.geteuid() == 0:
            os.seteuid(65534)
        try:
            work()
            theirs.send("")
        except Exception as error:
            theirs.send(f"{type(error).__name__}: {error}")

    child = in_a_child(run)
    child.join()
    return str(ours.recv())


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that all users can read, with a file."""
    # Those of pytest are below a private one.
    with TemporaryDirectory() as folder:
        (Path(folder) / "file").write_text("kept")
        yield Path(folder)


def test_what_may_not_be_written_is_refused_at_once(public: Path) -> None:
    public.chmod(0o755)
    new, old, folder = public / "new", public / "file", public / "counts"
    denied = "which cannot be written (Permission denied); accepted: a file in a folder that exists."
    assert as_user(lambda: try_output(new, "--out")) == f"ValueError: --out is {new}, {denied}"
    assert f"{folder}, which cannot be made (Permission denied)" in as_user(lambda: try_folder(folder, "--out", Busy))
    assert f"{public}, which cannot be written (Perm" in as_user(lambda: try_folder(public, "--out", Busy))
    public.chmod(0o777)
    old.chmod(0o644)
    # Replacing it would be possible.
    assert as_user(lambda: try_output(old, "--out")) == f"ValueError: --out is {old}, {denied}"
    assert as_user(lambda: try_output(new, "--out")) == as_user(lambda: try_folder(folder, "--out", Busy)) == ""
    assert names(public) == {"file"} and old.read_text() == "kept"


# Kills


@pytest.mark.parametrize("step", ["mkdtemp", "flock", "ftruncate", "fsync", "replace", "rmdir"])
def test_what_a_kill_left_is_removed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    import dspa.outputs as outputs

    owner = {"mkdtemp": outputs, "flock": outputs.fcntl}.get(step, os)
    real = getattr(owner, step)
    path = tmp_path / "map"
    write(path, b"one")

    def stop(*arguments: Any, **options: Any) -> None:
        if step != "rmdir" or (arguments and ".dspa-partial-" in str(arguments[0])):
            # Before the step, or after it where the step begins everything.
            if step in ("mkdtemp", "flock"):
                real(*arguments, **options)
            kill()
        real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, step, stop)
        killed(lambda: write(path, b"two"))
    assert names(tmp_path) > {"map"} and all(is_own(p) for p in tmp_path.iterdir() if p != path)
    assert path.read_bytes() == (b"two" if step == "rmdir" else b"one")
    write(path, b"three")
    assert names(tmp_path) == {"map"} and path.read_bytes() == b"three"


def test_random_kills(tmp_path: Path) -> None:
    path, draw = tmp_path / "map", random.Random(0)
    whole = {bytes([n]) * 300_000 for n in range(3)}

    def work() -> None:
        while True:
            for content in sorted(whole):
                write(path, content)
                with new_folder(tmp_path / f"folder-{time.time_ns()}") as made:
                    (made / "content").write_bytes(content)

    for _ in range(25):
        child = in_a_child(work)
        while not path.exists() and child.is_alive():
            time.sleep(0.001)
        time.sleep(draw.random() * 0.05)
        child.kill()
        child.join()
        assert path.read_bytes() in whole
    with workspace(tmp_path):
        pass
    for item in set(tmp_path.iterdir()) - {path}:
        assert item.name.startswith("folder-") and (item / "content").read_bytes() in whole


def test_a_workspace_that_is_in_use_is_left(tmp_path: Path) -> None:
    with workspace(tmp_path) as place:
        (place / "content").write_text("kept")
        in_a_child(lambda: write(tmp_path / "other", b"x")).join()
        assert (place / "content").read_text() == "kept" and (tmp_path / "other").exists()
    assert names(tmp_path) == {"other"}


def test_files_of_users_that_merely_have_such_names_are_kept(tmp_path: Path) -> None:
    kept = {
        "all.partial/notes.txt": "",
        "checkpoint.partial/notes.txt": "",
        "map.0a1b2c3d.partial": "",
        ".dspa-partial-abcdefgh/notes.txt": "",
        ".dspa-partial-noformat/.dspa-owner": '{"format": "mine"}',
        ".dspa-partial-no-owner/.dspa-owner": "my dspa",
        ".dspa-partial-unsigned/.dspa-owner": "",
        ".dspa-partial-unsigned/notes.txt": "",
        "elsewhere/.dspa-owner": OURS,
        "elsewhere/notes.txt": "",
    }
    for name, content in kept.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / ".dspa-partial-file").write_text("a file")
    (tmp_path / ".dspa-partial-link").symlink_to("elsewhere")
    before = names(tmp_path)
    left = tmp_path / ".dspa-partial-left"
    (left / "content" / "below").mkdir(parents=True)
    (left / "link").symlink_to(tmp_path / "elsewhere")
    (left / ".dspa-owner").write_text(OURS)
    write(tmp_path / "map", b"content")
    assert names(tmp_path) == before | {"map"}
    assert {name: (tmp_path / name).read_text() for name in kept} == kept


def test_a_folder_appears_whole_and_over_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "all") as made:
        (made / "one").write_text("1")
        raise KeyboardInterrupt
    assert not names(tmp_path)
    with pytest.raises(OSError, match="not empty"), new_folder(tmp_path / "all") as made:
        (tmp_path / "all").mkdir()
        (tmp_path / "all" / "mine").write_text("kept")
    assert names(tmp_path) == {"all"} and (tmp_path / "all" / "mine").read_text() == "kept"


def test_what_fails_leaves_the_earlier_file(tmp_path: Path) -> None:
    write(tmp_path / "map", b"one")
    with pytest.raises(RuntimeError), replacing(tmp_path / "map") as made:
        made.write_bytes(b"half")
        raise RuntimeError
    assert names(tmp_path) == {"map"} and (tmp_path / "map").read_bytes() == b"one"


# Folders that one process writes at a time


def test_a_second_writer_is_refused_by_name(tmp_path: Path) -> None:
    folder, tried = tmp_path / "counts", []

    def second() -> None:
        for attempt in (lambda: held(folder, "--out", Busy).__enter__(), lambda: try_folder(folder, "--out", Busy)):
            with pytest.raises(Busy) as refused:
                attempt()
            tried.append(str(refused.value))

    with held(folder, "--out", Busy):
        second()
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        assert in_a_child(second).join() is None
        (folder / "shard").write_text("")
    who = f"{folder}, which process {os.getpid()} on {socket.gethostname()} (since 20"
    assert len(tried) == 4 and all(
        who in text and "Wait until it has ended, or name another." in text for text in tried
    )
    assert names(folder) == {"shard"}
    with held(folder, "--out", Busy):
        pass


def test_a_folder_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    def work() -> None:
        with held(tmp_path, "--out", Busy), workspace(tmp_path):
            kill()

    killed(work)
    name = json.loads((tmp_path / ".dspa.lock").read_text())
    assert name["host"] == socket.gethostname() and name["pid"] != os.getpid() and len(names(tmp_path)) == 2
    with held(tmp_path, "--out", Busy):
        assert json.loads((tmp_path / ".dspa.lock").read_text())["pid"] == os.getpid()
        assert names(tmp_path) == {".dspa.lock"}
    assert not names(tmp_path)


def test_one_of_many_gets_the_folder(tmp_path: Path) -> None:
    """They begin and end at the same time, so that the file of the lock comes and goes."""

    def work() -> None:
        for _ in range(100):
            try:
                with held(tmp_path / "work", "--out", Busy):
                    # Raises where another is in here.
                    (tmp_path / "work" / "alone").mkdir()
                    (tmp_path / "work" / "alone").rmdir()
            except Busy:
                pass

    children = [in_a_child(work) for _ in range(4)]
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 4
    # The folder stays where the last one did not make it.
    assert not list(tmp_path.glob("work/*"))


@pytest.mark.parametrize("content", ["my lock", '{"pid": 1}', "[]"])
def test_a_lock_of_something_else_is_refused_and_kept(tmp_path: Path, content: str) -> None:
    (tmp_path / ".dspa.lock").write_text(content)
    with pytest.raises(Busy, match="is a file of something else"), held(tmp_path, "--out", Busy):
        pass
    (tmp_path / "far").write_text(OURS)
    (tmp_path / ".dspa.lock").unlink()
    (tmp_path / ".dspa.lock").symlink_to("far")
    with pytest.raises(Busy, match="Too many levels"), held(tmp_path, "--out", Busy):
        pass
    assert (tmp_path / "far").read_text() == OURS


def test_a_folder_in_which_nothing_was_written_goes(tmp_path: Path) -> None:
    with held(tmp_path / "new" / "below", "--out", Busy):
        pass
    assert not (tmp_path / "new" / "below").exists()
    (tmp_path / "old").mkdir()
    with held(tmp_path / "old", "--out", Busy):
        pass
    try_folder(tmp_path / "a" / "b", "--out", Busy)
    assert names(tmp_path) == {"new", "old"}


def test_a_device_is_no_folder() -> None:
    for path in (Path("/dev/null"), Path("/dev/null/counts")):
        with pytest.raises(Busy, match=rf"--out is {path}, which cannot be made"):
            try_folder(path, "--out", Busy)
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
