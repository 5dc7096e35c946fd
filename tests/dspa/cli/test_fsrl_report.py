"""`dspa fsrl analyse report`: its three files, the texts in it, and what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from dspa.cli import main
from dspa.fsrl import FSRLAdapter
from dspa.models.load import load_model
from dspa.saes.frozen import FrozenSAE
from dspa.testing import D_SAE_OUT, ENGLISH

from ..support.endpoint import last, serving
from ..support.files import save_map_and_adapter

PROMPTS = ["the cat <script>", "is a dog of", "we see it run"]
# Far enough that the adapter's texts are others.
STRENGTH = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    save_map_and_adapter(folder, PROMPTS, strength=STRENGTH)
    (folder / "texts.txt").write_text("".join(" ".join(ENGLISH[n:] + ENGLISH[:n]) + "\n" for n in range(9)))
    return folder


@pytest.fixture
def run(folder, tmp_path, capsys, monkeypatch):
    """Run the command on the prompts; returns its exit code and all that it printed on one line."""

    def go(*arguments: object) -> tuple[int, str]:
        given = [folder / "prompts.txt", "--adapter", folder / "adapter", "--out", tmp_path / "out", *arguments]
        words = ["dspa", "fsrl", "analyse", "report", *map(str, given), "--max-new-tokens", "7", "--device", "cpu"]
        monkeypatch.setattr("sys.argv", words)
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), " ".join((captured.out + captured.err).split())

    return go


def written(folder: Path, prompt: str, *, steered: bool) -> str:
    """The text that the model writes greedily, alone."""
    model, tokenizer = load_model(str(folder / "tiny"))
    inputs: Any = AutoTokenizer.from_pretrained(folder / "tiny")(prompt, return_tensors="pt")
    adapter = FSRLAdapter.load(folder / "adapter", FrozenSAE.load(folder / "sae_out"))
    if steered:
        adapter.attach(model)
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=7, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def test_report(run, folder, tmp_path):
    code, said = run("--texts", folder / "texts.txt", "--top", 8)
    assert code == 0, said
    record = json.loads((tmp_path / "out" / "audit.json").read_text())
    latents = record["latents"]
    assert record["kind"] == "adapter" and record["effects"] == [] and len(record["density"]) == D_SAE_OUT
    groups = {name: [one for one in latents if one["group"] == name] for name in ("augment", "ablate", "control")}
    assert [len(ones) for ones in groups.values()] == [8, 8, 8] and len(latents) == 24
    assert all(one["edits"]["change"] > 0 for one in groups["augment"])
    assert all(one["edits"]["change"] < 0 for one in groups["ablate"])
    assert all(one["column_sum"] is None and one["promotes"] for one in latents)
    assert any(one["contexts"] for one in latents) and record["n_read"] > 100
    for sample, prompt in zip(record["samples"], PROMPTS, strict=True):
        assert sample["base"] == written(folder, prompt, steered=False)
        assert "".join(token["text"] for token in sample["steered"]) == written(folder, prompt, steered=True)
        assert all(0 < len(token["edits"]) <= 20 for token in sample["steered"])
    assert any(sample["base"] != "".join(token["text"] for token in sample["steered"]) for sample in record["samples"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<h1>Audit of adapter</h1>" in page and "column sum" not in page and "preferred responses" not in page
    assert "the cat &lt;script&gt;" in page and 'class="edit"' in page
    assert "one of the latents that the adapter raises most in its texts" in page
    assert "8 that the adapter raises most in the texts that it steered, 8 that it lowers most" in said
    assert "Raised most are" in said and "In 3 steered texts" in said
    with (tmp_path / "out" / "latents.csv").open(newline="") as file:
        assert [int(row["latent"]) for row in csv.DictReader(file)] == [one["latent"] for one in latents]


def judge(request: dict[str, Any]) -> str:
    """A judge that finds one explanation and one category for all, and a latent in every text."""
    asked = last(request)
    if asked.startswith("When is latent"):
        return '{"reliable": true, "explanation": "tone", "evidence": "words"}'
    return "Intent" if asked.startswith("Categories") else json.dumps([1] * asked.count("--- Text"))


def test_a_judge(run, folder, tmp_path):
    pytest.importorskip("openai", reason='needs openai: pip install "dspa-kernels[judge]"')
    (tmp_path / "hand.json").write_text(json.dumps({str(n): "Discourse" for n in range(D_SAE_OUT)}))
    with serving(judge) as endpoint:
        asked = ["--judge", endpoint.url, "--judge-model", "m", "--hand", tmp_path / "hand.json"]
        code, said = run("--texts", folder / "texts.txt", "--top", 2, *asked)
    assert code == 0, said
    record = json.loads((tmp_path / "out" / "audit.json").read_text())
    judged = [one["judgment"] for one in record["latents"] if one["contexts"]]
    assert len(judged) >= 3
    assert {(one["explanation"], one["category"]) for one in judged} == {("tone", "Discourse")}
    titles = [section["title"] for section in record["sections"]]
    assert titles == ["Quality of the explanations", "Categories", "Categories compared with labels by hand"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--tokens", 5), "Without --texts there is no use for --tokens"),
        (("--explainer", "x"), "Without --labels there is no use for --explainer"),
        (("--hand", "hand.json"), "Without --judge there is no use for --hand"),
        (("--adapter", "nowhere"), "nowhere"),
        (("--texts", "nowhere.txt"), "nowhere.txt"),
    ],
)
def test_bad_input(run, given, message):
    code, said = run(*given)
    assert code == 2 and message in said
