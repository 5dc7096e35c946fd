"""`dspa audit`: a report on a map, its trace, prompts and texts, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import dspa
from dspa.cli import main
from dspa.maps.cdmap import ConditionalDifferenceMap
from dspa.testing import ENGLISH, make_model, word_tokenizer

from ..support.endpoint import last, serving
from ..support.files import save_map_and_adapter

PROMPTS = [" ".join(ENGLISH[n : n + 1 + n * 5 % 9]) for n in range(5)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A map that knows its model and SAEs, prompts, and texts."""
    folder = tmp_path_factory.mktemp("user")
    save_map_and_adapter(folder, PROMPTS, strength=20)
    (folder / "texts.txt").write_text("\n".join(" ".join(ENGLISH[n : n + 12]) for n in range(20)))
    return folder


@pytest.fixture
def run(capsys, monkeypatch):
    """Run a command, and return its exit code, standard output, and standard error with line breaks folded."""

    def go(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["dspa", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, " ".join(captured.err.split())

    return go


def audited(out: Path) -> dict[str, Any]:
    assert sorted(path.name for path in out.iterdir()) == ["audit.json", "latents.csv", "report.html"]
    record: dict[str, Any] = json.loads((out / "audit.json").read_text())
    return record


def test_a_map_alone(run, folder, tmp_path):
    """Its columns with the sums, without a model."""
    code, out, _ = run("audit", "--map", folder / "map", "--top", 4, "--out", tmp_path / "a")
    assert code == 0 and "No texts were steered" in out and f"Report: {tmp_path / 'a' / 'report.html'}" in out
    cdmap = ConditionalDifferenceMap.load(folder / "map")
    record, sums = audited(tmp_path / "a"), cdmap.values.double().sum(dim=0).sort().values.tolist()
    groups: dict[str, list[Any]] = {}
    for latent in record["latents"]:
        groups.setdefault(latent["group"], []).append(latent)
    assert {name: len(group) for name, group in groups.items()} == {"augment": 4, "ablate": 4, "control": 4}
    assert [one["column_sum"] for one in groups["augment"]] == pytest.approx(sums[:-5:-1])
    assert [one["column_sum"] for one in groups["ablate"]] == pytest.approx(sums[:4])
    assert record["edits"] is None and record["n_read"] is None and record["samples"] == []
    assert record["settings"]["digest of the map"] == cdmap.digest


def test_prompts_and_texts(run, folder, tmp_path):
    """The edits of the samples are those of `dspa generate --trace`, and so are the texts."""
    steering = ["--map", folder / "map", "--alpha", 0.5, "--mode", "both", "--max-new-tokens", 6, "--device", "cpu"]
    prompts = folder / "prompts.txt"
    code, _, err = run(
        "audit", *steering, "--top", 3, "--prompts", prompts, "--texts", folder / "texts.txt", "--out", tmp_path / "a"
    )
    assert code == 0, err
    record = audited(tmp_path / "a")
    written = ["--trace", tmp_path / "t.jsonl", "--out", tmp_path / "o.jsonl", "--compare"]
    assert run("generate", *steering, "--file", prompts, "--batch-size", 16, *written)[0] == 0
    answers = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [sample["base"] for sample in record["samples"]] == [answer["base"] for answer in answers]
    for sample, answer in zip(record["samples"], answers, strict=True):
        assert sample["prompt"] == answer["prompt"]
        assert "".join(token["text"] for token in sample["steered"]) == answer["response"]
        ranges, start = [], 0
        for token in sample["steered"]:
            end = start + len(token["text"])
            if token["edits"] and token["text"]:
                ranges.append([ranges.pop()[0] if ranges and ranges[-1][1] == start else start, end])
            start = end
        assert ranges == answer["edited"]
    # Read from the trace, they are the same.
    traced = ["--trace", tmp_path / "t.jsonl", "--top", 3]
    assert run("audit", "--map", folder / "map", *traced, "--out", tmp_path / "b")[0] == 0
    again = audited(tmp_path / "b")
    assert again["edits"] == record["edits"] and again["effects"] == record["effects"]
    assert record["edits"]["n_edited"] > 0 and record["edits"]["n_tokens"] == 5 * 6
    assert {latent["group"] for latent in record["latents"]} == {"augment", "ablate", "control", "edited"}
    # And contexts are those of Python.
    model, tokenizer = make_model("gemma2"), word_tokenizer()
    _, sae_out = (dspa.FrozenSAE.load(folder / name) for name in ("sae_in", "sae_out"))
    latents = [latent["latent"] for latent in record["latents"]]
    evidence = dspa.collect_evidence(sae_out, model, tokenizer, folder / "texts.txt", latents, n=10, progress=False)
    assert record["n_read"] == evidence.n_tokens and record["density"] == evidence.density.tolist()
    promoted = dspa.top_tokens(sae_out, model, tokenizer, latents, n=8)
    for latent in record["latents"]:
        expected = evidence.latents[latent["latent"]].top
        assert [context["values"] for context in latent["contexts"]] == [list(context.values) for context in expected]
        assert latent["promotes"] == promoted[latent["latent"]] and len(latent["suppresses"]) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", 0.5], "Without --prompts there is no use for --temperature"),
        (["--tokens", 5], "Without --texts there is no use for --tokens"),
        (["--texts", "empty.txt"], "empty.txt is a file without text"),
        (["--prompts", "empty.txt"], "empty.txt, which holds no prompt"),
        (["--trace", "prompts.txt"], "prompts.txt is plain text"),
        (["--labels", "labels.json"], "accepted: 0 to 127"),
        (["--labels", "other.jsonl"], "of layer '9-"),
        (["--explainer", "gpt"], "without --labels"),
        (["--judge", "http://h/v1", "--judge-model", "m"], "Without --texts there is no use for --judge"),
        (["--texts", "texts.txt", "--replay"], "--judge-model is missing"),
        (["--hand", "hand.json"], "Without --judge there is no use for --hand"),
        (
            ["--replay", "--judge-model", "m", "--texts", "texts.txt", "--hand", "hand.json"],
            "'Style' is not known; accepted: Safety, Discourse, Intent",
        ),
        (["--sae-out", "sae_in"], "has fingerprint"),
    ],
)
def test_bad_input_is_refused_before_the_work(run, folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    Path("empty.txt").write_text("\n \n")
    Path("labels.json").write_text('{"999": "style"}')
    Path("hand.json").write_text('{"3": "Style"}')
    Path("other.jsonl").write_text('{"layer": "9-res", "index": "3", "description": "warmth"}\n')
    code, _, err = run("audit", "--map", "map", "--device", "cpu", "--out", tmp_path / "a", *arguments)
    assert code == 2 and message in err and not list((tmp_path / "a").glob("*"))


def test_a_trace_of_another_map_is_refused(run, folder, tmp_path):
    trace = {"call": 0, "row": 0, "n_tokens": 3, "map_digest": "0123456789abcdef"}
    (tmp_path / "t.jsonl").write_text(json.dumps(trace) + "\n")
    code, _, err = run("audit", "--map", folder / "map", "--trace", tmp_path / "t.jsonl", "--out", tmp_path / "a")
    assert code == 2 and "of the map with digest 0123456789abcdef; accepted: a trace of this map" in err


def test_labels_are_shown(run, folder, tmp_path):
    cdmap = ConditionalDifferenceMap.load(folder / "map")
    latent = int(cdmap.columns[cdmap.values.double().sum(dim=0).argmax()])
    (tmp_path / "l.json").write_text(json.dumps({str(latent): "warm & kind"}))
    assert run("audit", "--map", folder / "map", "--labels", tmp_path / "l.json", "--out", tmp_path / "a")[0] == 0
    assert audited(tmp_path / "a")["latents"][0]["label"] == "warm & kind"
    assert "warm &amp; kind" in (tmp_path / "a" / "report.html").read_text()


def judge(request: dict[str, Any]) -> str:
    """A judge to whom all latents are the same, and all texts fit."""
    asked = last(request)
    if asked.startswith("When is latent"):
        return '{"reliable": true, "explanation": "<b>tone</b>", "evidence": "words"}'
    if asked.startswith("Categories"):
        return "Intent"
    return json.dumps([1] * asked.count("--- Text"))


def test_a_judge(run, folder, tmp_path):
    pytest.importorskip("openai", reason='needs openai: pip install "dspa-kernels[judge]"')
    cdmap = ConditionalDifferenceMap.load(folder / "map")
    first = int(cdmap.columns[cdmap.values.double().sum(dim=0).argmax()])
    (tmp_path / "hand.json").write_text(json.dumps({str(first): "Discourse"}))
    (tmp_path / "other.json").write_text(json.dumps({str(first): "gentle"}))
    common = ["--map", folder / "map", "--texts", folder / "texts.txt", "--top", 2, "--device", "cpu"]
    common += ["--judge-model", "m", "--judge-cache", tmp_path / "replies"]
    with serving(judge) as endpoint:
        hand = ["--hand", tmp_path / "hand.json"]
        code, _, err = run("audit", *common, *hand, "--judge", endpoint.url, "--out", tmp_path / "a")
        assert code == 0, err
        asked = len(endpoint.requests)
        code, _, err = run("audit", *common, *hand, "--replay", "--out", tmp_path / "b")
        assert code == 0, err
        assert len(endpoint.requests) == asked
        # The explanations of a file, in place of the judge's own.
        labels = ["--labels", tmp_path / "other.json", "--judge", endpoint.url]
        code, _, err = run("audit", *common, *labels, "--out", tmp_path / "c")
        assert code == 0, err
        assert not any("When is latent" in last(request) for request in endpoint.requests[asked:])
    record = audited(tmp_path / "a")
    assert {**audited(tmp_path / "b"), "settings": 0} == {**record, "settings": 0}
    latents = {one["latent"]: one for one in record["latents"]}
    active = [one["judgment"] for one in latents.values() if one["contexts"]]
    assert len(active) >= 4
    for judgment in active:
        assert (judgment["explanation"], judgment["category"]) == ("<b>tone</b>", "Discourse")
        assert judgment["notes"]["explained by"] == "m, by dspa_marked-contexts"
    assert 0.5 in {judgment["scores"]["detection"] for judgment in active}
    titles = [section["title"] for section in record["sections"]]
    assert titles == ["Quality of the explanations", "Categories", "Categories compared with labels by hand"]
    assert record["settings"]["judge"] == "m"
    page = (tmp_path / "a" / "report.html").read_text()
    assert "&lt;b&gt;tone&lt;/b&gt;" in page and "<b>tone" not in page
    assert re.search("explained by</dt><dd>m, by", page)
    other = {one["latent"]: one["judgment"] for one in audited(tmp_path / "c")["latents"]}
    assert other[first]["explanation"] == "gentle"
    assert [one["explanation"] for latent, one in other.items() if latent != first] == [""] * (len(other) - 1)
