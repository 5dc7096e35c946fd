"""`dspa baseline`: what it writes, that `dspa compare` takes it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dspa.baselines.repe import repe_vector
from dspa.cli import main
from dspa.evaluate.scores import score_triples
from dspa.models.load import load_model
from dspa.steering.vector import SteeringVector
from dspa.testing import L_OUT, make_model, word_tokenizer

from ..support.adapters import TRIPLES
from ..support.files import save_map_and_adapter

PROMPTS = ["the cat is", "my own red tree"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    save_map_and_adapter(folder, PROMPTS)
    # RAHF's instructions are longer than the tiny model's positions.
    make_model("gemma2", max_position_embeddings=512, initializer_range=0.05).save_pretrained(folder / "long")
    word_tokenizer().save_pretrained(folder / "long")
    (folder / "triples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TRIPLES))
    return folder


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run a command of dspa; returns its exit code, standard output, and standard error on one line."""

    def go(*arguments: object) -> tuple[int, str, str]:
        on = () if "costs" in arguments else ("--device", "cpu")
        monkeypatch.setattr("sys.argv", ["dspa", *map(str, arguments), *on])
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
    costs = json.loads((tmp_path / "repe.safetensors.costs.json").read_text())
    assert made.costs is not None and (costs["flops"], costs["triples"]) == (made.costs.flops, made.costs.triples)
    assert costs["method"] == "RepE" and costs["n_triples"] == 10
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
        (["--directions", "15"], "--directions is 15, of 14 triples; accepted: 1 to 14"),
    ],
)
def test_what_repe_refuses(run, folder, options, message):
    given = ["--model", folder / "tiny", "--layer", L_OUT, "--out", "repe.safetensors", *options]
    code, _, err = run("baseline", "repe", folder / "triples.jsonl", *given)
    assert code == 2 and message in err, err


def test_rahf_is_trained_in_two_stages_and_compared(run, folder, tmp_path):
    pytest.importorskip("peft")
    data = (folder / "triples.jsonl", "--batch-size", 4)
    code, out, err = run(
        *("baseline", "rahf", "tune", *data, "--model", folder / "long", "--out", "tuned"),
        *("--lr", 1e-3, "--epochs", 1, "--loss", "paper"),
    )
    assert code == 0, err
    assert "Written to tuned." in out and "Next: dspa baseline rahf align" in out
    align = ("baseline", "rahf", "align", *data, "--model", tmp_path / "tuned", "--max-steps", 2, "--out", "aligned")
    code, out, err = run(*align, "--target", 1, "--target", 3)
    assert code == 0, err
    assert "Next: dspa compare PROMPTS --tuned aligned" in out
    assert "finished before" in run(*align, "--target", 3, "--target", 1)[1]
    code, _, err = run(*align, "--target", 4)
    assert code == 2 and "--target is [4]; accepted: layers from 1 to 3" in err
    code, out, err = run(
        *("compare", folder / "prompts.txt", "--model", folder / "long", "--tuned", "tuned", "--tuned", "aligned"),
        *("--prefix", "my", "--held-out", folder / "triples.jsonl", "--seeds", 1, "--max-new-tokens", 5),
        *("--json", "out.json"),
    )
    assert code == 0, err
    methods = json.loads((tmp_path / "out.json").read_text())["methods"]
    names = ["base", "tuned tuned", "tuned tuned: random change", "tuned aligned", "tuned aligned: random change"]
    assert [method["name"] for method in methods] == [*names, 'prefix "my"']
    # What the table has is what the merged model itself gives.
    model, tokenizer = load_model(tmp_path / "tuned")
    from peft import PeftModel

    merged = PeftModel.from_pretrained(model, str(tmp_path / "aligned")).merge_and_unload()
    scored = score_triples(merged, tokenizer, TRIPLES, progress=False)
    base, tuned, _, margins, changed, _ = (method["measures"]["margin"]["values"][0] for method in methods)
    torch.testing.assert_close(torch.tensor(margins), scored.margins, atol=1e-5, rtol=0)
    assert margins != tuned != base and changed not in (margins, base)
    code, _, err = run("compare", folder / "prompts.txt", "--model", folder / "tiny", "--tuned", tmp_path / "small")
    assert code == 2 and "small" in err

    # Their costs beside those of a map from the same triples.
    saes = ("--sae-in", folder / "sae_in", "--sae-out", folder / "sae_out")
    code, _, err = run("map", "build", data[0], "--model", folder / "long", *saes, "--out", "map")
    assert code == 0, err
    code, out, err = run("baseline", "costs", "map", "tuned", "aligned", "--json", "costs.json")
    assert code == 0, err
    rows = {row["method"]: row for row in json.loads((tmp_path / "costs.json").read_text())["rows"]}
    assert list(rows) == ["DSPA", "RAHF-SCIT, stage 1", "RAHF-SCIT, stage 2", "RAHF-SCIT, both stages"]
    stages = [json.loads((tmp_path / name / "training.json").read_text())["costs"] for name in ("tuned", "aligned")]
    assert rows["RAHF-SCIT, both stages"]["flops"] == sum(costs["flops"] for costs in stages)
    ratio = rows["RAHF-SCIT, both stages"]["flops"] / rows["DSPA"]["flops"]
    assert f"{ratio:.3g}x" in out and "by a formula: 4.47x" in out and "14 triples" in out and "Warning" not in out
    code, _, err = run("baseline", "costs", "map", "aligned")
    assert code == 2 and "aligned is made with a model of weights" in err and "Give the earlier stage, too" in err
    code, _, err = run("baseline", "costs", "map", "tuned", folder / "long")
    assert code == 2 and "long is without costs; accepted: what this version" in err
    record = json.loads((tmp_path / "map.costs.json").read_text())
    record["measured"]["machine"] = "another"
    (tmp_path / "map.costs.json").write_text(json.dumps(record))
    assert "Warning: The machines differ: " in run("baseline", "costs", "map", "tuned")[1]
    (tmp_path / "map.costs.json").write_text(json.dumps(record | {"triples": "0", "n_triples": 3}))
    code, _, err = run("baseline", "costs", "map", "tuned")
    assert code == 2 and "tuned is made from 14 triples of digest" in err and "those of map: 3 of digest 0" in err


def test_dpo_trains_a_model_and_a_lora_and_both_are_compared(run, folder, tmp_path):
    pytest.importorskip("trl")
    on = ("--model", folder / "tiny", "--batch-size", 4, "--micro-batch-size", 4, "--epochs", 6, "--lr", 3e-3)
    for name, mode in (("full", "--no-lora"), ("lora", "--lora")):
        code, out, err = run("baseline", "dpo", folder / "triples.jsonl", *on, "--out", name, mode)
        assert code == 0, err
        assert f"Written to {name}." in out and f"Next: dspa compare PROMPTS --tuned {name} --model" in out
    assert "finished before" in run("baseline", "dpo", folder / "triples.jsonl", *on, "--out", "lora", "--lora")[1]
    code, _, err = run("baseline", "dpo", folder / "triples.jsonl", *on, "--out", "lora")
    assert code == 2 and "lora: True there, False now" in err
    code, out, err = run(
        *("compare", folder / "prompts.txt", "--model", folder / "tiny", "--tuned", "full", "--tuned", "lora"),
        *("--held-out", folder / "triples.jsonl", "--seeds", 1, "--max-new-tokens", 5, "--json", "out.json"),
    )
    assert code == 0, err
    methods = {method["name"]: method for method in json.loads((tmp_path / "out.json").read_text())["methods"]}
    margins = {name: sum(methods[name]["measures"]["margin"]["values"][0]) for name in methods}
    assert margins["tuned full"] > margins["base"] and margins["tuned lora"] > margins["base"]


def test_a_tuned_model_of_another_architecture_is_refused(run, folder):
    make_model("qwen3").save_pretrained(folder / "other")
    word_tokenizer().save_pretrained(folder / "other")
    code, _, err = run("compare", folder / "prompts.txt", "--model", folder / "tiny", "--tuned", folder / "other")
    assert code == 2 and "The model of the method 'tuned other' is with" in err and "the same architecture" in err
