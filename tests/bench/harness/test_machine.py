"""What is recorded of a machine."""

from __future__ import annotations

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
