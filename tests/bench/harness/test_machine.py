"""The record of a machine."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from bench.harness import machine


def test_what_is_emulated_did_not_run_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Some GPU")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    for interpreted, emulated, device in (("1", "", "cpu"), ("0", "a library", "cpu"), ("0", "", "Some GPU")):
        monkeypatch.setenv("TRITON_INTERPRET", interpreted)
        monkeypatch.setattr(machine, "EMULATED", emulated)
        assert machine.describe("abc")["device"] == device


def test_the_commit_is_named_where_git_does_not_know_it(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"rev-parse": "0123456789ab", "status": " M file"}
    monkeypatch.setattr(machine, "output_of", lambda *command: known.get(command[1], ""))
    assert [machine.describe("abc")[name] for name in ("commit", "dirty")] == ["0123456789ab", True]
    monkeypatch.setattr(machine, "output_of", lambda *_: "")
    assert [machine.describe("abc")[name] for name in ("commit", "dirty")] == ["abc", None]
    assert machine.describe("")["commit"] == "unknown"


def test_results_inside_the_tree_leave_it_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "kernel.py"
    source.write_text("x = 1")
    author = ("-c", "user.name=a", "-c", "user.email=a@b")
    for command in (("init", "-q"), ("add", "."), (*author, "commit", "-qm", "first")):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    (tmp_path / "log.txt").touch()
    assert machine.describe("")["dirty"] is False
    source.write_text("x = 2")
    assert machine.describe("")["dirty"] is True
