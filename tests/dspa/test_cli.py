"""The command line: its commands on small files, and its errors as one message with exit code 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dspa.cdmap import ConditionalDifferenceMap
from dspa.cli import main

from .conftest import L_IN, L_OUT, make_model, make_sae
from .tokens import ENGLISH, word_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, two SAEs, triples and prompts, as a user has them."""
    folder = tmp_path_factory.mktemp("user")
    make_model("gemma2").save_pretrained(folder / "tiny")
    word_tokenizer().save_pretrained(folder / "tiny")
    make_sae(L_IN, 96, seed=1).save(folder / "sae_in")
    make_sae(L_OUT, 128, seed=2).save(folder / "sae_out")
    rows = [
        {
            "prompt": " ".join(ENGLISH[n : n + 5]),
            "chosen": " ".join(ENGLISH[n + 9 : n + 14]),
            "rejected": ENGLISH[n + 3],
        }
        for n in range(12)
    ]
    (folder / "triples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prompts.txt").write_text("the cat\nis a dog of\n")
    return folder


def dspa(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> tuple[int, str]:
    """Exit code and everything printed, its line breaks folded."""
    monkeypatch.setattr("sys.argv", ["dspa", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    return int(stop.value.code or 0), " ".join((captured.out + captured.err).split())


@pytest.fixture
def run(capsys, monkeypatch):
    return lambda *arguments: dspa(capsys, monkeypatch, *arguments)


def common(folder: Path) -> list[object]:
    return [
        "--model",
        folder / "tiny",
        "--sae-in",
        folder / "sae_in",
        "--sae-out",
        folder / "sae_out",
        "--device",
        "cpu",
    ]


@pytest.fixture(scope="module")
def built(folder: Path) -> Path:
    path = folder / "map.dspa.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "sys.argv", ["dspa", "map", "build", *map(str, [folder / "triples.jsonl", *common(folder), "--out", path])]
        )
        with pytest.raises(SystemExit) as stop:
            main()
    assert stop.value.code == 0
    return path


def test_map_build(built):
    cdmap = ConditionalDifferenceMap.load(built)
    assert (cdmap.meta.n_triples, cdmap.meta.layer_in, cdmap.meta.layer_out) == (12, L_IN, L_OUT)


def test_map_show(run, built):
    code, text = run("map", "show", built, "--top", 3)
    assert code == 0 and "percentile" in text and "column sum" in text
    cdmap = ConditionalDifferenceMap.load(built)
    assert f"{len(cdmap.hot)}; the first 64 held {cdmap.hot_share():.1%} of the tokens' maxima" in text
    cdmap.hot, cdmap.hot_counts = cdmap.hot[:0], cdmap.hot_counts[:0]
    cdmap.save(built.parent / "uncalibrated")
    assert "the map has no calibration" in run("map", "show", built.parent / "uncalibrated")[1]


def test_generate(run, folder, built, tmp_path):
    arguments = ["generate", *common(folder), "--map", built, "--max-new-tokens", 3]
    code, text = run(*arguments, "--prompt", "the cat is")
    assert code == 0 and text
    code, screened = run(*arguments, "--prompt", "the cat is", "--screen", "int8")
    assert code == 0 and screened.split("Loading")[0] == text.split("Loading")[0] != ""
    code, _ = run(
        *arguments, "--file", folder / "prompts.txt", "--out", tmp_path / "o.jsonl", "--trace", tmp_path / "t.jsonl"
    )
    answers = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert code == 0 and [answer["prompt"] for answer in answers] == ["the cat", "is a dog of"]
    assert all(set(json.loads(line)) >= {"row", "position"} for line in (tmp_path / "t.jsonl").read_text().splitlines())


def test_interactive(run, folder, built, monkeypatch):
    lines = iter(["the cat", "", "is a dog"])

    def typed(_: str = "") -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    code, _ = run("generate", *common(folder), "--map", built, "--max-new-tokens", 2)
    assert code == 0


def test_sae_show_and_info(run, folder):
    code, text = run("sae", "show", folder / "sae_out")
    assert code == 0 and "jumprelu" in text and make_sae(L_OUT, 128, seed=2).fingerprint in text
    code, text = run("info")
    assert code == 0 and "reference" in text and "Backends, in the order" in text


@pytest.mark.parametrize(
    "command", [(), ("demo",), ("map", "build"), ("map", "show"), ("generate",), ("sae", "show"), ("info",)]
)
def test_help(run, command):
    code, text = run(*command, "--help")
    assert code == 0 and "Usage: dspa" in text


def test_errors(run, folder, built, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": \n')
    (tmp_path / "messages.jsonl").write_text('{"prompt": "the cat"}\n{"prompt": [{"role": "user"}]}\n')
    other = ["--model", folder / "tiny", "--sae-in", folder / "sae_in", "--device", "cpu"]
    make_sae(L_OUT, 128, seed=9).save(tmp_path / "other")
    for arguments, message in (
        (["map", "show", tmp_path / "none"], "There is no map file at"),
        (["map", "build", tmp_path / "bad.jsonl", *common(folder)], "bad.jsonl line 2"),
        (["map", "build", folder / "triples.jsonl", *common(folder), "--percentile", 101], "`percentile` is 101.0"),
        (["sae", "show", tmp_path / "nothing"], "nothing"),
        (["map", "build", folder / "triples.jsonl", *common(folder), "--out", tmp_path / "no" / "x"], "--out is"),
        (["generate", *common(folder), "--map", built, "--prompt", " "], "--prompt is empty"),
        (["generate", *common(folder), "--map", built, "--file", tmp_path / "messages.jsonl"], "messages.jsonl line 2"),
        (["generate", *common(folder), "--map", built, "--file", tmp_path / "no.txt"], "not a file"),
        (["demo", "--json", tmp_path / "no" / "demo.json"], "--json is"),
        (["generate", *common(folder), "--map", built, "--prompt", "a", "--alpha", -1], "`alpha` is -1.0"),
        (["generate", *common(folder), "--map", built, "--prompt", "a", "--device", "cuda"], "no CUDA device"),
        (["generate", *other, "--sae-out", tmp_path / "other", "--map", built, "--prompt", "a"], "fingerprint"),
    ):
        code, text = run(*arguments)
        assert code == 2 and "Error:" in text and message in text and "Traceback" not in text
