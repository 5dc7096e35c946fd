"""`dspa fsrl analyse`: what the commands write, and what they refuse."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from dspa.cli import main
from dspa.data.token_texts import quoted
from dspa.evaluate.coherence import METRICS
from dspa.fsrl import Usage, fit_decay, fraction_curve, mask_effect
from dspa.saes.meanings import top_tokens
from dspa.testing import D_SAE_OUT, L_OUT, make_model, make_sae

from ..support.adapters import TRIPLES, acting_adapter


@pytest.fixture(scope="module")
def model():
    return make_model("gemma2")


@pytest.fixture(scope="module")
def folder(model, tokenizer, responses, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    model.save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    sae = make_sae(L_OUT, D_SAE_OUT, seed=2)
    sae.save(folder / "sae")
    make_sae(L_OUT, D_SAE_OUT, seed=5).save(folder / "other_sae")
    acting_adapter(model, responses, sae).save(folder / "adapter")
    (folder / "triples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TRIPLES))
    (folder / "labels.json").write_text(json.dumps({str(n): ("style", "topic")[n % 2] for n in range(100)}))
    (folder / "hand.json").write_text(json.dumps({str(n): ("style", "topic")[n < 3] for n in range(8)}))
    (folder / "prompts.txt").write_text("the cat\nis a dog of\nwe see it run\n")
    return folder


@pytest.fixture
def run(folder, capsys, monkeypatch):
    def go(command: str, *arguments: object, **changed: object) -> tuple[int, str]:
        options = {"model": folder / "tiny", "sae": folder / "sae", "adapter": folder / "adapter", "device": "cpu"}
        options |= changed
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        monkeypatch.setattr("sys.argv", ["dspa", "fsrl", "analyse", command, *map(str, arguments), *words])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), " ".join((captured.out + captured.err).split())

    return go


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_commands_write_what_the_library_says(
    run, folder, model, tokenizer, adapter, responses, used, tmp_path, monkeypatch
):
    triples = folder / "triples.jsonl"
    code, said = run("usage", triples, out=tmp_path / "usage")
    assert code == 0, said
    rows = table(tmp_path / "usage" / "usage.csv")
    assert [int(row["latent"]) for row in rows] == used.ranked.tolist()
    promoted = top_tokens(adapter.sae, model, tokenizer, used.ranked.tolist())
    assert [row["promotes"] for row in rows] == [quoted(promoted[int(row["latent"])]) for row in rows]
    assert rows[0]["promotes"] in said
    assert float(table(tmp_path / "usage" / "decay.csv")[0]["tau"]) == pytest.approx(fit_decay(used).tau)
    # The fit of an adapter that moves all latents on all tokens has nothing to fit, and the rest is shown.
    with monkeypatch.context() as patch:
        patch.setattr("dspa.fsrl.usage.latent_usage", lambda *_, **__: Usage(torch.full((9,), 5), torch.ones(9), 5))
        code, said = run("usage", triples, out=tmp_path / "usage")
    assert code == 0 and "9 latents are moved on 5 tokens" in said and "Warning: No decay is fitted. Each of 9" in said
    assert {path.name for path in (tmp_path / "usage").iterdir()} == {"usage.csv", "usage.png"}

    code, said = run("fraction", triples, "--fraction", 0, "--fraction", 0.5, out=tmp_path / "fraction")
    assert code == 0, said
    base, nothing, half = table(tmp_path / "fraction" / "fraction.csv")
    assert base["loss"] == nothing["loss"] != half["loss"]
    curve = fraction_curve(model, adapter, responses, fractions=(0.5,), progress=False)
    assert float(half["loss"]) == pytest.approx(curve.scores[0].loss)

    asked = ("--labels", folder / "labels.json", "--category", "style", "--n-random", 3)
    code, said = run("mask", triples, *asked, out=tmp_path / "mask")
    assert code == 0, said
    assert "50 latents masked (of 50 given" in said
    sets = [row["masked"] for row in table(tmp_path / "mask" / "mask.csv")]
    assert sets == ["base model", "whole adapter", "given", "random 1", "random 2", "random 3"]
    style = mask_effect(model, adapter, responses, range(0, 100, 2), used, n_random=2, progress=False)
    (loss, *_) = table(tmp_path / "mask" / "comparison.csv")
    assert float(loss["given"]) == pytest.approx(style.given.loss)

    settings = ("--file", folder / "prompts.txt", "--max-new-tokens", 10)
    code, said = run("coherence", *settings, out=tmp_path / "coherence")
    assert code == 0, said
    assert [row["metric"] for row in table(tmp_path / "coherence" / "coherence.csv")] == list(METRICS)
    assert len(table(tmp_path / "coherence" / "texts.csv")) == 6
    for name in ("usage", "fraction", "mask", "coherence"):
        assert (tmp_path / name / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_shares_without_a_score_of_the_labels_say_so(run, folder, used, tmp_path):
    asked = (folder / "triples.jsonl", "--labels", folder / "labels.json")
    code, said = run("categories", *asked, out=tmp_path / "a")
    assert code == 0, said
    rows = {row["category"]: row for row in table(tmp_path / "a" / "categories.csv")}
    assert list(rows) == ["style", "topic", "unlabelled"]
    assert all(row["label_quality"].startswith("NOT MEASURED") for row in rows.values())
    assert "Quality of the labels: NOT MEASURED" in said
    assert float(rows["topic"]["mass"]) == pytest.approx(float(used.mass[1:100:2].sum() / used.mass.sum()))
    assert sum(float(row["active"]) for row in rows.values()) == pytest.approx(1)

    code, said = run("categories", *asked, "--hand", folder / "hand.json", out=tmp_path / "b")
    assert code == 0, said
    (quality,) = table(tmp_path / "b" / "quality.csv")
    # By hand the first three of eight are topics, of which the labels have one; of the five others three.
    assert (int(quality["n"]), float(quality["accuracy"])) == (8, 3 / 8)
    assert float(quality["mcc_low"]) <= float(quality["mcc"]) <= float(quality["mcc_high"])
    assert "NOT MEASURED" not in said and "accuracy 0.375" in said
    assert (tmp_path / "b" / "categories.png").read_bytes().startswith(b"\x89PNG")


def test_bad_input_is_one_message(run, folder, tmp_path):
    triples, labels = folder / "triples.jsonl", tmp_path / "labels.json"
    labels.write_text(json.dumps({"3": "style", "128": "style", "-1": "topic"}))
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "file").write_text("")
    out, unclear = tmp_path / "out", "Say what to mask in exactly one way: --latent, or --labels with --category."
    for arguments, changed, message in (
        (("usage", triples), {"out": tmp_path / "file"}, "--out is"),
        (("usage", triples), {"sae": folder / "other_sae"}, "was trained with an SAE of fingerprint"),
        (("usage", triples), {"adapter": folder}, "holds no adapter.json"),
        (("fraction", tmp_path / "none.jsonl"), {}, "does not exist; accepted: the path of a file"),
        (("fraction", triples, "--fraction", 2), {}, "accepted: one or more numbers from 0 to 1"),
        (("mask", triples), {}, unclear),
        (("mask", triples, "--latent", 1, "--labels", labels), {}, unclear),
        (("mask", triples, "--labels", folder / "labels.json", "--category", "x"), {}, "accepted: style, topic"),
        (("categories", triples, "--labels", labels), {}, "labels latents 128, -1; accepted: 0 to 127"),
        (("categories", triples, "--labels", tmp_path / "none"), {}, "is not a file"),
        (("coherence", "--file", tmp_path / "empty.txt"), {}, "holds no prompt"),
    ):
        code, said = run(*arguments, **({"out": out} | changed))
        assert code == 2 and message in said and said.count("Error:") == 1, said
