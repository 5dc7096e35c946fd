"""`dspa fsrl train` and `dspa fsrl analyse layers`."""

from __future__ import annotations

import json
import sys

import pytest

from dspa.cli import main
from dspa.fsrl import read_held_out
from dspa.testing import D_SAE_OUT, L_OUT, make_sae, word_tokenizer

from ..support.trainings import save_inputs

pytest.importorskip("trl")


def command(monkeypatch, capsys, *arguments: object) -> tuple[int, str]:
    """Exit code and what was said, in one line."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["dspa", "fsrl", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    return stop.value.code or 0, " ".join((captured.out + captured.err).split())


def test_commands(tmp_path_factory, tmp_path, monkeypatch, capsys):
    here = tmp_path_factory.mktemp("inputs")
    save_inputs(here, word_tokenizer())
    pytest.importorskip("sae_lens")
    saes = []
    for layer in (1, L_OUT):
        make_sae(layer, D_SAE_OUT, seed=2).save(tmp_path / f"sae-{layer}")
        saes += ["--sae", tmp_path / f"sae-{layer}"]
    data = (here / "train.jsonl", "--model", here / "model", "--held-out", here / "held.jsonl", "--device", "cpu")
    small = ("--lr", 5e-3, "--batch-size", 4, "--max-steps", 3, "--max-length", 64)
    code, told = command(monkeypatch, capsys, "train", *data, *small, *saes[:2], "--out", tmp_path / "one")
    assert code == 0 and "On 3 held-out triples" in told and "base model" in told
    assert read_held_out(tmp_path / "one").n_triples == 3
    assert "L0 share" in told and "perplexity" in told and "repetition" in told
    # Three steps do not make an adapter sparse.
    assert "Warning: The adapter is not sparse: it moves" in told and "A larger --l1 or more steps" in told
    one = tmp_path / "one"
    assert f"Next: dspa fsrl analyse usage {here / 'held.jsonl'} --adapter {one} --out {one}-usage" in told
    sources = json.loads((one / "adapter.json").read_text())["sources"]
    assert {role: source["path"] for role, source in sources.items()} == {
        "model": str(here / "model"),
        "sae": str(saes[1]),
    }
    code, told = command(monkeypatch, capsys, "train", *data, *small, *saes[:2], "--out", tmp_path / "one", "--l1", 0.3)
    assert code == 2 and "training of other settings (adapter_l1: 0.02 there, 0.3 now)" in told
    code, told = command(monkeypatch, capsys, "train", *data, *saes[:2], "--out", tmp_path / "two", "--l1", -1)
    assert code == 2 and "--l1 is -1.0; accepted: a finite number >= 0" in told
    code, told = command(monkeypatch, capsys, "analyse", "layers", *data, *small, *saes, "--out", tmp_path / "layers")
    assert code == 0 and "layer 1, soft_threshold, λ 0.02" in told and "layer 2" in told
    assert {"sweep.csv", "sweep.png"} < {path.name for path in (tmp_path / "layers").iterdir()}
