"""Folders of trainings: what is taken for one, what is removed from it, and who may train in it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dspa.errors import TrainingError
from dspa.outputs import held
from dspa.training_folder import RECORD, TrainingFolder

BEGUN = {"settings": {"data": "digest", "template_date": None}}


@pytest.mark.parametrize("content", ['{"settings": {"theme": "dark"}}', '{"epochs": 3}', "[1]", "notes"])
def test_a_record_of_something_else_is_refused_and_kept(tmp_path: Path, content: str) -> None:
    (tmp_path / RECORD).write_text(content)
    folder = TrainingFolder(tmp_path)
    for attempt in (folder.check, folder.check_free, lambda: folder.claim({"data": "digest"})):
        with pytest.raises(TrainingError, match=f"{RECORD} is not what a training wrote"):
            attempt()
    with pytest.raises(TrainingError, match=f"{RECORD} is not what a training wrote"):
        folder.first_date("2026-11-20")
    assert (tmp_path / RECORD).read_text() == content


@pytest.mark.parametrize("name", ["notes.partial", "checkpoint.partial", "checkpoint-000000004", "data.csv"])
def test_a_folder_with_other_files_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(TrainingError, match=rf"holds \['{name}'\]"):
        TrainingFolder(tmp_path).check()


def test_only_checkpoints_are_removed(tmp_path: Path) -> None:
    folder = TrainingFolder(tmp_path)
    folder.claim(BEGUN["settings"])
    kept = {"checkpoint.partial", "checkpoint-mine", "checkpoint-4", "checkpoint-best"}
    for name in (*kept, "checkpoint-000000004", "written"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state").write_text("")
    (tmp_path / "checkpoint-000000001").write_text("a file")
    folder.keep(tmp_path / "written", 8)
    assert folder.checkpoints() == [tmp_path / "checkpoint-000000008"]
    folder.finish({"history": []})
    assert {path.name for path in tmp_path.iterdir()} == {RECORD, "checkpoint-000000001", *kept}


def test_one_training_at_a_time(tmp_path: Path) -> None:
    folder = TrainingFolder(tmp_path / "sae")
    with folder.held():
        # What it holds for its own sake is not what it holds for a training.
        folder.check()
        folder.claim(BEGUN["settings"])
        for attempt in (folder.check_free, lambda: folder.held().__enter__()):
            with pytest.raises(
                TrainingError, match=rf"The output folder is .*, which process {os.getpid()} on .* writ"
            ):
                attempt()
    assert json.loads((tmp_path / "sae" / RECORD).read_text()) == BEGUN
    folder.finish({"history": []})
    # What a killed process left is removed under the lock.
    (tmp_path / "sae" / "checkpoint-000000004").mkdir()
    with held(folder.path, "x", ValueError), pytest.raises(TrainingError, match=r"which process .* is writing"):
        folder.held().__enter__()
    folder.claim(BEGUN["settings"])
    before = {path.name for path in (tmp_path / "sae").iterdir()}
    with folder.held(), folder.held():
        folder.check_free()
        assert {path.name for path in (tmp_path / "sae").iterdir()} == before == {RECORD}
