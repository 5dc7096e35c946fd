"""The boundary of the command line: an error is one message, a bug is another, and text of users is no markup."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest

from dspa.cli import main
from dspa.cli.tables import console, print_table, print_warning
from dspa.evaluate.compare.table import TextTable

from ..support.files import save_model_and_saes

Run: TypeAlias = Callable[..., tuple[int, str]]
MARKUP = ["[x]", "[/x]", "a [/x] b", "[red]a[/red]", "[link=x]", "[[/]]", r"\[x]", ":smile:", "[/x].st"]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return the exit code of a command and all that it printed, its white space folded; streams are the real ones."""

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["dspa", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        printed = capfd.readouterr()
        return int(stop.value.code or 0), " ".join((printed.out + printed.err).split())

    return run


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    save_model_and_saes(folder)
    return folder


def fail(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Let `dspa info` raise an error."""

    def raised() -> None:
        raise error

    monkeypatch.setattr("dspa_kernels.available_backends", raised)


@pytest.mark.parametrize("name", ["stdin", "stdout", "stderr"])
def test_a_closed_stream_is_an_empty_one(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    used: list[object] = []

    def use() -> dict[str, object]:
        used.append(sys.stdin.isatty() if name == "stdin" else getattr(sys, name).write("x"))
        return {}

    monkeypatch.setattr("dspa_kernels.available_backends", use)
    monkeypatch.setattr(sys, name, None)
    monkeypatch.setattr("sys.argv", ["dspa", "info"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code and used == [False if name == "stdin" else 1]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("not [x] [/x] :smile:"), "Error: not [x] [/x] :smile:"),
        (RuntimeError("half of a pair: \ud83d"), r"Error: half of a pair: \ud83d"),
        (RecursionError("maximum recursion depth exceeded"), "Error: A file or an option is nested too deeply"),
        (OverflowError("int too large to convert to float"), "Error: int too large to convert to float"),
        (MemoryError(), "Error: There is not enough memory."),
        (NotImplementedError(), "Error: NotImplementedError"),
        (UnicodeEncodeError("utf-8", "\ud83d", 0, 1, "surrogates not allowed"), "can't encode character"),
        (FileNotFoundError(2, "No such file", "[/x]"), "No such file: '[/x]'"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_expected_error_is_its_message(run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception, text: str):
    fail(monkeypatch, error)
    code, printed = run("info")
    assert code == 2 and text in printed and "Traceback" not in printed and "bug" not in printed


@pytest.mark.parametrize(
    "error", [TypeError("unhashable: [x]"), KeyError("[/x]"), AssertionError(), ZeroDivisionError("\udcff")]
)
def test_any_other_error_is_a_bug(run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception):
    fail(monkeypatch, error)
    code, printed = run("info")
    assert code == 1 and f"Error: This is a bug in dspa: {type(error).__name__} in {__file__}, line" in printed
    assert str(error).encode(errors="backslashreplace").decode() in printed
    assert printed.endswith("issue tracker, with what this shows: dspa --debug info") and "Traceback" not in printed


@pytest.mark.parametrize("error", [ValueError("wrong"), TypeError("bug")])
def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, error: Exception):
    fail(monkeypatch, error)
    monkeypatch.setattr("sys.argv", ["dspa", "--debug", "info"])
    with pytest.raises(type(error), match=str(error)):
        main()


def test_a_value_that_looks_like_debug_is_a_value(run: Run, tmp_path: Path):
    code, printed = run("generate", "--map", tmp_path / "none", "--prompt", "--debug")
    assert code == 2 and "There is no map file" in printed


@pytest.mark.parametrize("text", MARKUP)
def test_text_of_users_is_printed_as_it_is(
    run: Run, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, text: str
):
    monkeypatch.setenv("COLUMNS", "200")
    for given in (("map", "show", text), ("map", text), ("generate", "--map", text)):
        code, printed = run(*given)
        assert code == 2 and text in printed and "Traceback" not in printed
    print_table(text, {text: text})
    print_warning(text)
    console.print(TextTable(text, [text, text], [[text, text]]).rich())
    assert capfd.readouterr().out.count(text) == 9


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"--prompt": "the \udcff cat"}, "--prompt"),
        ({"--file": '{"prompt": "the \\ud800 cat"}'}, "prompts.jsonl line 1"),
    ],
)
def test_half_of_a_surrogate_pair_in_a_prompt(run: Run, tmp_path: Path, given: dict[str, str], what: str):
    if "--file" in given:
        path = tmp_path / "prompts.jsonl"
        path.write_text(given["--file"])
        given = {"--file": str(path)}
    code, printed = run("generate", "--map", "none", *next(iter(given.items())))
    assert code == 2 and f"{what} is " in printed and "surrogate" in printed and "Traceback" not in printed


def test_an_option_that_is_nested_too_deeply(run: Run):
    nested = "[" * (sys.getrecursionlimit() * 100)
    code, printed = run("generate", "--map", "none", "--prompt", "a", "--chat-template-kwargs", nested)
    assert code == 2 and "bug" not in printed and "Traceback" not in printed


@pytest.mark.parametrize("command", [["info"], ["sae", "show", "none"]])
def test_commands_load_no_library_of_the_tests(tmp_path: Path, command: list[str]):
    environment = os.environ | {"DSPA_TESTS_EMULATED_CUDA": str(tmp_path / "x.so")}
    words = [sys.executable, "-m", "dspa", *command]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 2) and "x.so" not in done.stdout + done.stderr


@pytest.mark.parametrize("name", ["d/x", "./x", "x.safetensors", "../x:y", "d/x:y"])
def test_a_value_that_looks_like_a_path_is_one(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    """Nothing asks the Hub, which would say so in other words."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    monkeypatch.setattr("dspa.models.places.HF_HUB_OFFLINE", False)
    for asks in ("sae_lens.SAE.from_pretrained", "datasets.load_dataset", "transformers.AutoConfig.from_pretrained"):
        monkeypatch.setattr(asks, lambda *_, **__: pytest.fail("The Hub was asked."))
    for command, text in (
        (["sae", "show", name], "is not there"),
        (["map", "cost", "--model", name, "--sae-in", "a", "--sae-out", "b"], "where there is nothing"),
        (["map", "collect", name, "--model", "m", "--sae-in", "a", "--sae-out", "b", "--out", "c"], "does not exist"),
    ):
        code, printed = run(*command)
        assert code == 2 and text in printed and name.removeprefix("./") in printed


@pytest.mark.parametrize("option", ["--alpha", "--temperature", "--top-p", "--seed", "--layer-in"])
@pytest.mark.parametrize("value", ["1" + "0" * 400, "9" * 5000], ids=["10**400", "5000 digits"])
def test_numbers_that_no_float_holds(run: Run, user: Path, option: str, value: str):
    saes = ("--sae-in", user / "sae_in", "--sae-out", user / "sae_out")
    code, printed = run("generate", "--map", "none", "--prompt", "a", *saes, option, value)
    assert code == 2 and "Traceback" not in printed and "bug" not in printed
