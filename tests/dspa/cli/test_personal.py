"""`dspa personal`: effects and personas from the command line, and what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from dspa.cli import main
from dspa.maps.cdmap import ConditionalDifferenceMap
from dspa.personal.effects import Effects
from dspa.personal.persona import Persona
from dspa.testing import ENGLISH

from ..support.files import save_map_and_adapter

PROMPTS = [" ".join(ENGLISH[n : n + 1 + n * 5 % 9]) for n in range(5)]
RULES = {
    "format": "dspa.style.1",
    "counters": {
        "the": {"about": "The.", "words": ["the", "a", "red", "cat"]},
        "letters": {"about": "x", "pattern": "e"},
    },
    "axes": {
        "article": {"about": "Articles against none.", "weights": {"the": 0.1}},
        "e": {"about": "E against others.", "weights": {"letters": 0.05}},
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A map that knows its model and SAEs, prompts, rules and the effects of the prompts."""
    folder = tmp_path_factory.mktemp("user")
    save_map_and_adapter(folder, PROMPTS)
    (folder / "rules.json").write_text(json.dumps(RULES))
    return folder


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run `dspa` in an empty folder; returns its exit code and all of its output on one line."""

    def go(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["dspa", *map(str, arguments)])
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), " ".join((captured.out + captured.err).split())

    return go


def measuring(folder: Path, *arguments: object) -> tuple[Any, ...]:
    given = ("--map", folder / "map", "--counters", folder / "rules.json", "--max-new-tokens", 5, "--device", "cpu")
    return ("personal", "effects", folder / "prompts.txt", *given, *arguments)


@pytest.fixture
def measured(run, folder) -> Path:
    path = folder / "effects.jsonl"
    code, text = run(*measuring(folder, "--candidates", 31, "--out", path, "--csv", folder / "effects.csv"))
    assert code == 0, text
    assert f"Next: dspa personal make {path} --weight article=1 --out mine.persona" in text
    return path


def test_from_prompts_to_a_persona(run, folder, measured, tmp_path):
    effects, cdmap = Effects.read(measured), ConditionalDifferenceMap.load(folder / "map")
    sums = dict(zip(cdmap.columns.tolist(), cdmap.values.double().sum(dim=0).tolist(), strict=True))
    order = sorted(sums, key=lambda latent: sums[latent])
    smallest, largest = [j for j in order if sums[j] < 0][:15], [j for j in reversed(order) if sums[j] > 0][:16]
    assert set(effects.ablated) == {*smallest, *largest}
    rows = list(csv.DictReader((folder / "effects.csv").open()))
    assert [int(row["latent"]) for row in rows] == list(effects.ablated)
    assert list(rows[0]) == ["latent", "answers_changed", "article", "article_error", "e", "e_error"]
    assert sum(int(row["answers_changed"]) for row in rows) > 0
    given = ("personal", "make", measured, "--counters", folder / "rules.json")
    code, text = run(*given, "--weight", "article=-0.5", "--weight", "e=1", "--out", "a.persona", "--top", 1)
    assert code == 0 and "Next: dspa generate --persona a.persona" in text, text
    persona = Persona.load(tmp_path / "a.persona")
    assert persona.record.weights == {"article": -0.5, "e": 1.0} and len(persona.latents) == 1
    assert all(f"{gain:+.4f}" in text for gain, _ in [persona.gains[latent] for latent in persona.latents])
    (tmp_path / "weights.json").write_text('{"article": -0.5, "e": 1}')
    assert run(*given, "--weights", "weights.json", "--out", "all.persona", "--unconstrained")[0] == 0
    every = Persona.load(tmp_path / "all.persona")
    assert len(every.latents) > 1 and every.latents == [
        latent for latent, (gain, _) in persona.gains.items() if gain > 0
    ]
    code, text = run("info", "a.persona")
    assert code == 0 and "kind │ persona" in text and "article -0.5, e +1" in text and "prompts │ 5" in text


def test_a_measurement_of_a_list_goes_on(run, folder, tmp_path):
    for latents in ([3], [3, 7]):
        code, text = run(*measuring(folder, *(a for one in latents for a in ("--latent", one)), "--out", "e.jsonl"))
        assert code == 0, text
        assert list(Effects.read(tmp_path / "e.jsonl").ablated) == latents
    code, text = run(*measuring(folder, "--latent", 3, "--alpha", 0.5, "--out", "e.jsonl"))
    assert code == 2 and "holds effects with other --alpha; accepted: a new file" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--latent", 999), "--latent is 999; accepted: 0 to 127, latents of the output SAE"),
        (("--counters", "none.json"), "axes"),
        (("--map", "prompts.txt"), "prompts.txt"),
        (("--chat",), "for a chat template, and the tokenizer has none"),
    ],
)
def test_bad_measurements(run, folder, tmp_path, arguments, message):
    (tmp_path / "none.json").write_text(json.dumps({name: RULES[name] for name in ("format", "counters")}))
    (tmp_path / "prompts.txt").write_text("a cat\n")
    code, text = run(*measuring(folder, "--out", "e.jsonl", *arguments))
    assert code == 2 and message in text
    assert not (tmp_path / "e.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--weight is missing; accepted: one --weight or more, or a file of --weights"),
        (("--weight", "article=1", "--weights", "rules.json"), "--weight is given together with --weights"),
        (("--weight", "article"), "--weight is 'article'; accepted: AXIS=NUMBER, such as conciseness=1"),
        (("--weight", "article=x"), "--weight is 'article=x'"),
        (("--weight", "e=1", "--weight", "e=2"), "--weight is one axis twice"),
        (("--weight", "moons=1"), "The axis of a weight is 'moons'; accepted: article, e"),
        (("--weight", "e=nan"), "a finite number"),
        (("--weight", "e=0"), "none but 0"),
    ],
)
def test_bad_personas(run, folder, measured, tmp_path, arguments, message):
    given = ("personal", "make", measured, "--counters", folder / "rules.json", "--out", "a.persona")
    code, text = run(*given, *arguments)
    assert code == 2 and message in text and not (tmp_path / "a.persona").exists()


def test_effects_of_something_else(run, folder, measured, tmp_path):
    code, text = run("personal", "make", folder / "prompts.txt", "--weight", "conciseness=1", "--out", "a.persona")
    assert code == 2 and "prompts.txt line 1" in text
    code, text = run("personal", "make", measured, "--weight", "conciseness=1", "--out", measured)
    assert code == 2 and "as EFFECTS is" in text


@pytest.fixture
def persona(run, folder, measured) -> Path:
    path = folder / "mine.persona"
    given = ("personal", "make", measured, "--counters", folder / "rules.json", "--weight", "e=1", "--out", path)
    assert run(*given, "--top", 1)[0] == 0
    return path


SHORT = ("--max-new-tokens", 5, "--device", "cpu")


def test_generation_with_a_persona(run, folder, measured, persona, tmp_path):
    """A persona of one latent answers as the measurement of that latent did."""
    given = ("generate", "--file", folder / "prompts.txt", *SHORT, "--out", "answers.jsonl")
    code, text = run(*given, "--persona", persona)
    assert code == 0, text
    answers = [json.loads(line)["response"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    effects, (latent,) = Effects.read(measured), Persona.load(persona).latents
    own = effects.measurement.answers
    assert answers == [effects.ablated[latent].get(n, own[n]) for n in range(len(PROMPTS))] != own
    code, text = run(*given, "--persona", persona, "--map", folder / "map")
    assert code == 0, text
    code, text = run(*given, "--persona", folder / "map")
    assert code == 2 and "is not a persona of format dspa.persona.1" in text
    code, text = run(*given, "--persona", persona, "--k-diff", 3)
    assert code == 2 and "Without --map there is no use for --k-diff" in text
    code, text = run(*given, "--persona", persona, "--out", persona)
    assert code == 2 and "as --persona is" in text


def test_comparison_with_a_persona(run, folder, persona, tmp_path):
    given = ("compare", folder / "prompts.txt", "--persona", persona, *SHORT, "--seeds", 2, "--json", "out.json")
    code, text = run(*given, "--counters", folder / "rules.json", "--count", "e")
    assert code == 0, text
    record = json.loads((tmp_path / "out.json").read_text())
    methods = {method["name"]: method for method in record["methods"]}
    assert list(methods) == ["base", "persona mine", "persona mine: random persona"]
    mine, control = methods["persona mine"], methods["persona mine: random persona"]
    assert mine["settings"]["latents"] == Persona.load(persona).latents and control["control_of"] == "persona mine"
    # A weight of 1 for one axis.
    assert mine["measures"]["utility of persona mine"] == mine["measures"]["e"]
    assert "persona mine: random persona" in mine["measures"]["e"]["over_controls"]
    code, text = run(*given)
    assert code == 2 and "The rules of style is of other axes than the persona's (article, e)" in text
    code, text = run(*given, "--no-controls", "--counters", folder / "rules.json", "--map", folder / "map")
    assert code == 0 and "random persona" not in text and "DSPA ablate 0.2" in text, text


def test_shots(run, folder, tmp_path):
    triples = [{"prompt": prompt, "chosen": f"yes {prompt}", "rejected": "no"} for prompt in PROMPTS]
    (tmp_path / "liked.jsonl").write_text("".join(json.dumps(triple) + "\n" for triple in triples))
    given = ("personal", "shots", folder / "prompts.txt", "--examples", "liked.jsonl", "--out")
    code, text = run(*given, "shots.jsonl", "--shots", 2)
    assert code == 0 and "5 prompts, 2 examples before each" in text, text
    lines = [json.loads(line)["prompt"] for line in (tmp_path / "shots.jsonl").read_text().splitlines()]
    for prompt, messages in zip(PROMPTS, lines, strict=True):
        # Its own example is the most like it.
        assert [message["content"] for message in messages[-3:]] == [prompt, f"yes {prompt}", prompt]
        assert [message["role"] for message in messages] == ["user", "assistant"] * 2 + ["user"]
    code, text = run(*given, "liked.jsonl")
    assert code == 2 and "--out is liked.jsonl, as --examples is" in text
    (tmp_path / "other.jsonl").write_text('{"prompt": "a"}\n')
    code, text = run("personal", "shots", "other.jsonl", "--examples", "other.jsonl", "--out", "o.jsonl")
    assert code == 2 and "other.jsonl line 1" in text
