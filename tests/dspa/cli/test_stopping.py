"""`dspa.cli.stopping`: what a stopped command says, and its exit code."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from dspa.cli import app, main
from dspa.cli.stopping import KEPT, farewell

# A job in the background of a shell starts with SIGINT ignored, and so would the command that tests of it start.
WAITS = """
import signal, time
from dspa.cli import app, main

signal.signal(signal.SIGINT, signal.default_int_handler)

@app.command()
def wait():
    print("waits", flush=True)
    time.sleep(60)

main()
"""


@pytest.fixture
def stopped(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """Run a command that is stopped as it begins; returns its exit code and what it says."""

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr("dspa.cli.stopping.TyperGroup.invoke", stop)
        monkeypatch.setattr("sys.argv", ["/home/me/.venv/bin/dspa", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0), capsys.readouterr().err

    return run


PAIR = ["--model", "m", "--sae-in", "a", "--sae-out", "b"]
ONE = ["--model", "m", "--sae", "a", "--out"]


@pytest.mark.parametrize(
    "command",
    [
        ["map", "collect", "my prefs.jsonl", *PAIR],
        ["map", "build", "prefs.jsonl", *PAIR, "--work-dir", "counts", "--out"],
        ["--debug", "fsrl", "train", "it's.jsonl", *ONE],
        ["fsrl", "analyse", "layers", "prefs.jsonl", "--held-out", "t.jsonl", *ONE],
        ["sae", "train", "a$b.txt", "--layer", "1", "--model", "m", "--out"],
        ["sae", "finetune", "text.txt", *ONE],
        ["demo", "smollm2"],
        ["demo", "smollm2", "--prompts", "5"],
        ["demo", "--preference", "warmth", "smollm2"],
    ],
    ids=lambda command: "-".join(command[:3]),
)
def test_commands_that_continue_say_so(
    stopped: Callable[..., tuple[int, str]], tmp_path: Path, command: list[str]
) -> None:
    arguments = [*command, tmp_path / "out"] if command[-1] == "--out" else command
    code, text = stopped(*arguments)
    assert code == 130
    assert text.strip().startswith("Stopped. ") and "the same command continues from there:\n" in text
    # A shell reads the line as the command that was typed.
    assert shlex.split(text.splitlines()[-1]) == ["dspa", *map(str, arguments)]


@pytest.mark.parametrize("command", [["demo"], ["demo", "tiny"], ["demo", "--json", "smollm2.json"]])
def test_the_tiny_demo_begins_anew(stopped: Callable[..., tuple[int, str]], command: list[str]) -> None:
    assert stopped(*command)[1].strip() == "Stopped. The same command would begin from the start."


def test_commands_that_lose_their_work_say_so(stopped: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    code, text = stopped("map", "build", "prefs.jsonl", *PAIR, "--out", tmp_path / "m")
    assert code == 130 and "No counts are kept" in text and "--work-dir FOLDER keeps them" in text
    code, text = stopped("fsrl", "analyse", "usage", "t.jsonl", *ONE, tmp_path / "out", "--adapter", "a")
    assert code == 130 and text.strip() == "Stopped. The same command would begin from the start."


def test_the_command_of_a_launcher_is_not_made_up() -> None:
    text = farewell(["map", "collect", "prefs.jsonl"], alone=False)
    assert text == "Stopped. The counts so far are kept, and the same command continues from there."


def test_every_command_that_says_it_continues_is_one() -> None:
    """Their help says it too."""
    for name in KEPT:
        command = typer.main.get_command(app)
        for word in name.removesuffix(" smollm2").split():
            command = command.commands[word]  # type: ignore[attr-defined]
        helps = " ".join(getattr(parameter, "help", None) or "" for parameter in command.params)
        assert "the same command continues a stopped" in helps, name


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals(number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS, "wait"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "waits\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert errors.strip() == "Stopped. The same command would begin from the start."
