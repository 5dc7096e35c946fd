"""`dspa baseline`: what it writes, that `dspa compare` takes it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dspa.baselines.repe import repe_vector
from dspa.cli import main
from dspa.models.load import load_model
from dspa.steering.vector import SteeringVector
from dspa.testing import L_OUT

from ..support.adapters import TRIPLES
from ..support.files import save_map_and_adapter

PROMPTS = ["the cat is", "my own red tree"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    save_map_and_adapter(folder, PROMPTS)
    (folder / "triples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TRIPLES))
    return folder


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run a command of dspa; returns its exit code, standard output, and standard error on one line."""

    def go(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["dspa", *map(str, arguments), "--device", "cpu"])
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, " ".join(captured.err.split())

    return go


def test_repe_is_made_and_compared(run, folder, tmp_path):
    on = ("--model", folder / "tiny")
    code, out, err = run(
        *("baseline", "repe", folder / "triples.jsonl", *on, "--layer", L_OUT, "--out", "repe.safetensors"),
        *("--directions", 3, "--first", 10),
    )
    assert code == 0, err
    assert "3 directions at layer 2, scale 0.5" in out and "Next: dspa compare PROMPTS --vector repe" in out
    vector = SteeringVector.load(tmp_path / "repe.safetensors")
    model, tokenizer = load_model(folder / "tiny")
    made = repe_vector(model, tokenizer, TRIPLES[:10], L_OUT, n_directions=3, progress=False)
    assert torch.equal(vector.vector, made.vector) and vector.model_digest == made.model_digest
    code, out, err = run(
        *("compare", folder / "prompts.txt", *on, "--map", folder / "map", "--vector", "repe.safetensors"),
        *("--held-out", folder / "triples.jsonl", "--no-controls", "--no-static", "--seeds", 1),
        *("--max-new-tokens", 5, "--json", "out.json"),
    )
    assert code == 0, err
    base, _, repe = json.loads((tmp_path / "out.json").read_text())["methods"]
    assert repe["name"] == "vector repe" and repe["settings"]["scale"] == 0.5
    assert repe["measures"]["margin"]["values"] != base["measures"]["margin"]["values"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--positions", "some"], "--positions is 'some'; accepted: response, generated, all"),
        (["--layer", "9"], "`layer` is 9; accepted: 0 to 3"),
        (["--directions", "15"], "differences of 14 triples have 14"),
    ],
)
def test_what_repe_refuses(run, folder, options, message):
    given = ["--model", folder / "tiny", "--layer", L_OUT, "--out", "repe.safetensors", *options]
    code, _, err = run("baseline", "repe", folder / "triples.jsonl", *given)
    assert code == 2 and message in err, err
