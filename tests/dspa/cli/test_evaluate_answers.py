"""`dspa evaluate answers`: its files and what it prints, how it goes on, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dspa.cli import main
from dspa.evaluate.answers import run as running
from dspa.testing import ENGLISH

from ..support.benchmarks import question, write_lines, write_list
from ..support.files import save_map_and_adapter

PROMPTS = [" ".join(ENGLISH[n : n + 1 + n * 5 % 9]) for n in range(5)]
TEMPLATE = "{% for m in messages %}we {{ m.content }} {% endfor %}you"
QUESTIONS = [question(n, ("math", "writing")[n % 2], text, "see it run") for n, text in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A map and an adapter that know their model and SAEs, and questions in both layouts."""
    folder = tmp_path_factory.mktemp("user")
    save_map_and_adapter(folder, PROMPTS)
    (folder / "tiny" / "chat_template.jinja").write_text(TEMPLATE)
    write_lines(folder / "question.jsonl", QUESTIONS)
    write_list(folder / "alpaca_eval.json", [{"instruction": text} for text in PROMPTS])
    return folder


@pytest.fixture
def run(capsys, monkeypatch, folder, tmp_path):
    """Run `dspa evaluate answers`; returns its exit code, standard output, and standard error on one line."""

    def go(questions: object, *arguments: object) -> tuple[int, str, str]:
        given = [questions, "--max-new-tokens", 5, "--device", "cpu", "--out", "answers", *arguments]
        monkeypatch.setattr("sys.argv", ["dspa", "evaluate", "answers", *map(str, given)])
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, " ".join(captured.err.split())

    return go


def test_a_gate(run, folder, tmp_path):
    """Its complement alone: the share of a random gate would be known after the answers."""
    gate = ("--gate", "entropy", "--gate-threshold", 0.5)
    code, _, err = run(folder / "question.jsonl", "--adapter", folder / "adapter", "--controls", *gate, "--seeds", 1)
    assert code == 0, err
    record = json.loads((tmp_path / "answers" / "record.json").read_text())
    gated = "FSRL adapter, entropy >= 0.5"
    names = ["base", "FSRL adapter", "FSRL adapter: random latents", gated, f"{gated}: complement gate"]
    assert [method["name"] for method in record["methods"]] == names


def test_all_methods_in_files_and_table(run, folder, tmp_path):
    code, out, err = run(
        folder / "question.jsonl",
        *("--map", folder / "map", "--alpha", 0.5, "--controls", "--static", "--adapter", folder / "adapter"),
        *("--prefix", "my own red tree", "--seeds", 2),
    )
    assert code == 0, err
    record = json.loads((tmp_path / "answers" / "record.json").read_text())
    controls = [f"DSPA ablate 0.5: {control}" for control in ("random set", "shuffled map", "wrong layer")]
    adapter = ["FSRL adapter", "FSRL adapter: random latents"]
    names = ["base", "DSPA ablate 0.5", *controls, "Static-SAE ablate 0.5", *adapter, 'prefix "my own red tree"']
    assert [method["name"] for method in record["methods"]] == names
    files = sorted(path.name for path in (tmp_path / "answers").glob("*.jsonl"))
    assert files == sorted(file for method in record["methods"] for file in method["files"]) and len(files) == 9
    assert record["settings"]["temperatures"] == {"math": 0, "writing": 0.7}
    assert "cut: turns that 5 tokens ended" in out and "unsteered" in out and "Controls were not run" not in out
    assert "Next: dspa evaluate grade answers/base.jsonl answers/dspa-ablate-0.5.jsonl" in out
    assert "base: 0%" in err


def test_without_controls_it_is_said(run, folder, tmp_path):
    code, out, err = run(folder / "alpaca_eval.json", "--map", folder / "map", "--seeds", 1)
    assert code == 0, err
    assert "Controls were not run: without them, nothing shows that" in out
    outputs = json.loads((tmp_path / "answers" / "dspa-ablate-0.2.json").read_text())
    assert [output["instruction"] for output in outputs] == PROMPTS
    assert {output["generator"] for output in outputs} == {"dspa-ablate-0.2"}


def test_the_base_model_alone(run, folder):
    code, out, err = run(folder / "alpaca_eval.json", "--model", folder / "tiny", "--seeds", 1)
    assert code == 0, err
    assert "Controls" not in out


def test_a_stopped_command_goes_on(run, folder, tmp_path, monkeypatch):
    arguments = (folder / "question.jsonl", "--map", folder / "map", "--batch-size", 4)
    generate, calls = running.continue_prompts, []

    def stopping(*given, **options):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return generate(*given, **options)

    monkeypatch.setattr(running, "continue_prompts", stopping)
    code, _, err = run(*arguments)
    assert code == 130 and "Stopped. Finished batches are kept, and the same command continues from there: dspa" in err
    before = len(calls)
    assert run(*arguments)[0] == 0
    # Two methods, by two turns each: one greedy batch of 3, and 6 sampled ones in two batches.
    assert len(calls) - before == 2 * 2 * 3 - 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["q", "--map", "map"], "q"),
        (["prompts.txt", "--map", "map"], "prompts.txt"),
        (["question.jsonl", "--map", "map", "--alpha", 1, "--alpha", 1], "--alpha is 1.0 twice"),
        (["question.jsonl", "--model", "tiny", "--alpha", 1], "Without --map there is no use for --alpha"),
        (["question.jsonl", "--model", "tiny", "--prefix", "a", "--controls"], "there is no use for --controls"),
        (["question.jsonl", "--map", "map", "--top-p", 2], "--top-p is 2.0; accepted: a number above 0"),
        (["question.jsonl", "--map", "map", "--temperature", "inf"], "--temperature is inf; accepted: a finite number"),
        (["question.jsonl", "--map", "map", "--seeds", 0], "--seeds"),
        (["question.jsonl", "--map", "map", "--out", "map"], "--out is map; accepted: a folder"),
        (["question.jsonl", "--map", "map", "--out", "full"], "full, with other files (question.jsonl)"),
        (["question.jsonl"], "Pass --model"),
    ],
)
def test_bad_input_is_refused_before_the_model_is_loaded(run, folder, tmp_path, arguments, message):
    (tmp_path / "full").mkdir()
    for name in ("map", "prompts.txt", "question.jsonl"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "full" / "question.jsonl").write_text("")
    (tmp_path / "tiny").symlink_to(folder / "tiny")
    code, out, err = run(*arguments)
    assert code == 2 and message in err and out == "" and "Loading" not in err


def test_too_long_answers_and_other_settings(run, folder):
    arguments = (folder / "question.jsonl", "--model", folder / "tiny", "--seeds", 1)
    code, _, err = run(*arguments, "--max-new-tokens", 70)
    assert code == 2 and "Lower --max-new-tokens" in err
    assert run(*arguments)[0] == 0
    code, _, err = run(*arguments, "--max-new-tokens", 6)
    assert code == 2 and "were made with --max-new-tokens 5, and now it is 6" in err
