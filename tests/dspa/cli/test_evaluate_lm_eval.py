"""`dspa evaluate lm-eval`: its table and file, how it goes on, and what is refused."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from dspa.cli import main
from dspa.testing import ENGLISH

from ..evaluate.lm_eval.tasks import write_tasks
from ..support.files import save_map_and_adapter

pytest.importorskip("lm_eval", reason='needs lm-eval: pip install "dspa-kernels[eval]"')

from lm_eval.tasks import TaskManager


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A map and an adapter that know their model and SAEs, and tasks."""
    folder = tmp_path_factory.mktemp("user")
    save_map_and_adapter(folder, ENGLISH[:3])
    write_tasks(folder)
    return folder


@pytest.fixture
def run(capsys, monkeypatch, folder, tmp_path):
    """Run `dspa evaluate lm-eval`; returns its exit code, standard output, and standard error on one line.

    The harness' own tasks, and what is installed on this machine, are not read: that takes seconds.
    """
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    monkeypatch.setattr("dspa.evaluate.lm_eval.run.TaskManager", partial(TaskManager, include_defaults=False))

    def go(*arguments: object) -> tuple[int, str, str]:
        given = ["--include-path", folder / "tasks", "--device", "cpu", "--out", tmp_path / "out.json", *arguments]
        monkeypatch.setattr("sys.argv", ["dspa", "evaluate", "lm-eval", *map(str, given)])
        monkeypatch.setenv("COLUMNS", "120")
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, " ".join(captured.err.split())

    return go


def test_methods_in_a_table_and_a_file(run, folder, tmp_path):
    common = ("--tasks", "choosing", "--map", folder / "map", "--alpha", 1, "--mode", "both", "--limit", 5)
    code, out, err = run(*common, "--controls", "--adapter", folder / "adapter", "--prefix", "my own", "--seed", 3)
    assert code == 0, err
    record = json.loads((tmp_path / "out.json").read_text())
    names = ["base", "DSPA both 1", "DSPA both 1: shuffled map", "DSPA both 1: wrong layer", "FSRL adapter"]
    assert [method["name"] for method in record["methods"]] == [*names, 'prefix "my own"']
    for method in record["methods"]:
        figures = method["results"]["choosing"]
        shown = ("acc", *(f"{figures[name]:.4f}" for name in ("acc,none", "acc_stderr,none")))
        label = method["name"].replace("DSPA both 1: ", "  ")
        assert " ".join((label.strip(), "choosing", *shown)) in [" ".join(line.split()) for line in out.splitlines()]
    assert record["settings"]["limit"] == 5 and record["settings"]["seed"] == 3
    assert "Controls were not run" not in out and str(tmp_path / "out.json") in out.replace("\n", "")
    code, out, err = run(*common, "--seed", 3)
    assert code == 0 and "Controls were not run" in out and "Running loglikelihood" not in err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--tasks", "chosing"), "--tasks is 'chosing'; accepted: names of tasks, groups or tags, such as choosing"),
        (("--tasks", "choosing", "--include-path", "nowhere"), "--include-path is nowhere; accepted: a folder"),
        (("--tasks", "choosing", "--out", "."), "--out is ., which is a folder"),
        (("--tasks", "whole"), "A method for whole, which scores whole texts without prompts, is one that acts from"),
        (("--tasks", "choosing", "--limit", 0), "--limit"),
        ((), "--tasks"),
    ],
)
def test_bad_input(run, folder, given, message):
    code, _, err = run("--map", folder / "map", *given)
    assert code == 2 and message in err


def test_without_the_package(run, folder, monkeypatch):
    monkeypatch.setattr("dspa.errors.find_spec", lambda name: None)
    code, _, err = run("--tasks", "choosing", "--map", folder / "map")
    assert code != 0 and "needs the package lm-eval, which is not installed: pip install" in err
