"""Options of gates and of junction steering, in `dspa generate`, `dspa compare` and `dspa baseline junction`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dspa.cli import main
from dspa.testing import ENGLISH

from ..support.adapters import TRIPLES
from ..support.files import save_map_and_adapter

PROMPTS = [" ".join(ENGLISH[n : n + 1 + n * 5 % 9]) for n in range(4)]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    save_map_and_adapter(folder, PROMPTS)
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TRIPLES))
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run a command; returns its exit code, standard output, and standard error on one line."""

    def go(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["dspa", *map(str, arguments), "--device", "cpu"])
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, " ".join(captured.err.split())

    return go


def test_compare(run: Run, folder: Path, tmp_path: Path) -> None:
    """Each method with a gate next to the method without, with the gate's controls, and junction steering."""
    model = folder / "tiny"
    code, out, err = run(
        *("baseline", "junction", folder / "test.jsonl", "--model", model, "--out", "head.safetensors")
    )
    assert code == 0, err
    assert "of the rewards on" in out
    share = ("--gate", "entropy", "--gate-share", 0.6, "--gate-prompts", folder / "prompts.txt")
    methods = ("--map", folder / "map", "--adapter", folder / "adapter", "--alpha", 1, "--no-static")
    code, out, err = run(
        *("compare", folder / "prompts.txt", *methods, *share, "--junction", "head.safetensors"),
        *("--junction-weight", 0.5, "--junction-weight", 2, "--junction-threshold", 0.1, "--junction-top", 5),
        *("--held-out", folder / "test.jsonl", "--seeds", 1, "--max-new-tokens", 6, "--json", "out.json"),
    )
    assert code == 0, err
    record = {method["name"]: method for method in json.loads((tmp_path / "out.json").read_text())["methods"]}
    names = [name for name in record if "entropy" in name]
    assert [name.partition(": ")[2] for name in names] == 2 * ["", "random gate", "complement gate"]
    assert names[0].startswith("DSPA ablate 1, entropy >= ") and names[3].startswith("FSRL adapter, entropy >= ")
    assert {"DSPA ablate 1", "FSRL adapter", "junction head 0.5", "junction head 2"} <= record.keys()
    assert record["junction head 2"]["settings"].items() >= {"k": 5, "threshold": 0.1, "weight": 2}.items()
    assert "margin" not in record["junction head 2"]["measures"] and "margin" in record[names[0]]["measures"]
    assert "The gate's threshold is" in out and "touched" in out and "GFLOP" in out
    assert record["junction head 2"]["operations_per_token"] > record["base"]["operations_per_token"]


@pytest.mark.parametrize("n_first", [1, 6])
def test_generate(run: Run, folder: Path, n_first: int) -> None:
    """All of six tokens are as steered as without a gate, and one of them is not."""
    command = ("generate", "--map", folder / "map", "--alpha", 1.5, "--mode", "both", "--prompt", PROMPTS[3])
    settings = ("--max-new-tokens", 6, "--compare")
    code, everywhere, err = run(*command, *settings)
    assert code == 0, err
    code, gated, err = run(*command, *settings, "--gate", "first", "--gate-tokens", n_first)
    assert code == 0, err
    assert (gated == everywhere) == (n_first == 6)
    assert run(*command, *settings, "--gate", "entropy", "--gate-threshold", 0)[1] == everywhere
    assert run(*command, *settings, "--gate", "random", "--gate-share", 1)[1] == everywhere


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--gate", "often"), "--gate is 'often'; accepted: none, entropy, random, first"),
        (("--gate", "entropy", "--gate-threshold", 3), "--gate-threshold is 3.0; accepted: 0 to ln 10, 2.303 nats"),
        (("--gate", "random"), "--gate random is without --gate-share; accepted: both"),
        (("--gate", "first"), "--gate first is without --gate-tokens; accepted: both"),
        (("--gate-threshold", 1), "--gate-threshold is given with --gate none; accepted: --gate entropy"),
        (("--gate", "first", "--gate-tokens", 2, "--gate-share", 0.1), "--gate entropy or random"),
        (("--gate-complement",), "--gate-complement is given with --gate none"),
        (("--gate", "entropy", "--gate-share", 0.5), "One of --gate-share and --gate-prompts is missing"),
        (
            ("--gate", "entropy", "--gate-share", 0.5, "--gate-threshold", 1, "--gate-prompts", "prompts.txt"),
            "--gate-share is given with --gate-threshold",
        ),
        (("--gate", "entropy", "--gate-share", 0.5, "--gate-prompts", "none.txt"), "--gate-prompts"),
    ],
)
def test_refusals(run: Run, folder: Path, options: tuple[object, ...], message: str) -> None:
    for command in (("generate", "--prompt", "the cat"), ("compare", folder / "prompts.txt")):
        code, _, err = run(*command, "--map", folder / "map", *options)
        assert code and message in err, err


def test_refusals_of_compare(run: Run, folder: Path) -> None:
    for options, message in (
        (("--gate", "entropy", "--prefix", "my dog"), "--gate is given without a method that acts on tokens"),
        (("--map", folder / "map", "--junction-weight", 2), "Without --junction there is no use for --junction-weight"),
        (("--junction", folder / "map"), "value head"),
        (("--junction", "none.safetensors"), "value head"),
        (("--gate", "entropy", "--gate-share", 0.01, "--gate-prompts", folder / "prompts.txt"), "the first token of"),
    ):
        given = (
            options
            if any(str(option).startswith(("--map", "--j", "--prefix")) for option in options)
            else (*options, "--map", folder / "map")
        )
        code, _, err = run("compare", folder / "prompts.txt", *given, "--model", folder / "tiny", "--max-new-tokens", 4)
        assert code and message in err, err


def test_refusals_of_junction(run: Run, folder: Path) -> None:
    for options, message in (
        (("--ridge", 0), "--ridge is 0"),
        (("--out", "no/folder/head"), "--out"),
    ):
        given = options if "--out" in options else ("--out", "head.safetensors", *options)
        code, _, err = run("baseline", "junction", folder / "test.jsonl", "--model", folder / "tiny", *given)
        assert code and message in err, err
