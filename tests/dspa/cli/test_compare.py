"""`dspa compare`: its methods, tables and file, how it goes on, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from dspa.cli import main
from dspa.evaluate.compare import run as running
from dspa.maps.cdmap import ConditionalDifferenceMap
from dspa.models.sources import model_source
from dspa.testing import ENGLISH, make_model

from ..support.adapters import TRIPLES
from ..support.files import save_map_and_adapter, save_second_map

PROMPTS = [" ".join(ENGLISH[n : n + 1 + n * 5 % 9]) for n in range(5)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A map and an adapter that know their model and SAEs, prompts and triples."""
    folder = tmp_path_factory.mktemp("user")
    save_map_and_adapter(folder, PROMPTS)
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TRIPLES))
    return folder


@pytest.fixture
def run(capsys, monkeypatch, folder, tmp_path):
    """Run `dspa compare` on the prompts; returns its exit code, standard output, and standard error on one line."""

    def go(*arguments: object) -> tuple[int, str, str]:
        given = [folder / "prompts.txt", *arguments, "--max-new-tokens", 5, "--device", "cpu"]
        monkeypatch.setattr("sys.argv", ["dspa", "compare", *map(str, given)])
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, " ".join(captured.err.split())

    return go


def test_all_methods_in_tables_and_file(run, folder, tmp_path):
    code, out, err = run(
        *("--map", folder / "map", "--adapter", folder / "adapter", "--fraction", 1, "--fraction", 0.05),
        *("--alpha", 0.5, "--alpha", 1, "--mode", "ablate", "--mode", "both", "--prefix", "my own red tree"),
        *("--held-out", folder / "test.jsonl", "--count", "the=\\bthe\\b", "--count", "x=(?i)CAT|dog"),
        *("--seeds", 2, "--json", "out.json", "--show", 1),
    )
    assert code == 0, err
    record = json.loads((tmp_path / "out.json").read_text())
    settings = [f"{mode} {alpha}" for mode in ("ablate", "both") for alpha in (0.5, 1)]
    controls = ["random set", "shuffled map", "wrong layer"]
    names = [
        f"{start}{setting}{end}"
        for setting in settings
        for start, end in (("DSPA ", ""), *(("DSPA ", f": {control}") for control in controls), ("Static-SAE ", ""))
    ]
    adapters = [f"FSRL adapter{top}{end}" for top in ("", " top 0.05") for end in ("", ": random latents")]
    others = [*adapters, 'prefix "my own red tree"']
    assert [method["name"] for method in record["methods"]] == ["base", *names, *others]
    assert record["settings"]["counters"] == {"the": r"\bthe\b", "x": "(?i)CAT|dog"}
    assert record["prompts"] == PROMPTS and record["settings"]["seeds"] == [0, 1]
    steered = record["methods"][1]
    assert len(steered["answers"]) == 2 and len(steered["answers"][0]) == len(PROMPTS)
    assert len(steered["measures"]["margin"]["values"][0]) == len(TRIPLES)
    assert steered["measures"]["margin"]["over_controls"].keys() == {f"DSPA ablate 0.5: {c}" for c in controls}
    tables = (
        "14 held-out triples",
        "Mean per answer to 5 prompts, 2 seeds",
        "perplexity under the base model",
        "speed",
    )
    places = [out.index(text) for text in (*tables, record["recommendation"]["reason"], "\nPrompt 1, seed 0, DSPA")]
    assert places == sorted(places) and "  random set" in out and f": {PROMPTS[0]}\nbase: " in out
    assert "base, seed 0: 0%" in err


def test_counters_of_style_by_name(run, folder, tmp_path):
    """Those of the package, or of a file of rules: every answer has the value of the counter."""
    rules = {"format": "dspa.style.1", "counters": {"cats": {"about": "Cats.", "words": ["cat"]}}}
    (tmp_path / "rules.json").write_text(json.dumps(rules))
    base = ("--model", folder / "tiny", "--prefix", "be kind", "--seeds", 1)
    assert run(*base, "--count", "words", "--count", "w=\\S")[0] == 0
    record = json.loads((tmp_path / "dspa-compare.json").read_text())
    method = record["methods"][1]
    assert method["measures"]["words"]["values"][0] == [len(text.split()) for text in method["answers"][0]]
    code, _, err = run(*base, "--count", "cats", "--counters", "rules.json", "--json", "cats.json")
    assert code == 0, err
    cats = json.loads((tmp_path / "cats.json").read_text())["methods"][1]
    assert cats["measures"]["cats"]["values"][0] == [text.split().count("cat") for text in cats["answers"][0]]
    assert "'words'; accepted: NAME=REGEX" in run(*base, "--count", "words", "--counters", "rules.json")[2]


def test_answers_that_are_shown_are_of_the_file(run, folder, tmp_path):
    code, out, _ = run("--map", folder / "map", "--no-controls", "--no-static", "--seeds", 1, "--alpha", 1)
    assert code == 0
    record = json.loads((tmp_path / "dspa-compare.json").read_text())
    assert [method["name"] for method in record["methods"]] == ["base", "DSPA ablate 1"]
    base, steered = (method["answers"][0] for method in record["methods"])
    for number in range(2):
        shown = out.split(f"Prompt {number + 1}, seed 0, DSPA ablate 1: {PROMPTS[number]}\n")[1].splitlines()
        assert shown[0] == f"base: {base[number]}"
        assert shown[1].replace("**", "") == f"steered: {steered[number]}"
    assert "no counter was preferred" in out and "Prompt 3" not in out


def test_a_stopped_command_goes_on(run, folder, tmp_path, monkeypatch):
    arguments = ("--map", folder / "map", "--seeds", 2, "--batch-size", 2)
    generate, calls = running.continue_prompts, []

    def stopping(*given, **options):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return generate(*given, **options)

    monkeypatch.setattr(running, "continue_prompts", stopping)
    code, _, err = run(*arguments)
    assert code == 130 and "Stopped. Finished runs are kept, and the same command continues from there: dspa" in err
    assert (tmp_path / "dspa-compare.json.partial").exists()
    before = len(calls)
    assert run(*arguments)[0] == 0
    # Six methods by two seeds, of three batches, two runs of which were finished.
    assert len(calls) - before == (6 * 2 - 2) * 3


def test_several_maps(run, folder, tmp_path):
    cdmap = ConditionalDifferenceMap.load(folder / "map")
    cdmap.save(tmp_path / "one.dspa.safetensors")
    cdmap.replaced(values=-cdmap.values).save(tmp_path / "two.dspa.safetensors")
    (tmp_path / "b").mkdir()
    cdmap.save(tmp_path / "b" / "one.dspa.safetensors")
    short = ["--seeds", 1, "--no-static", "--no-controls", "--json", "out.json"]
    one, two, other = tmp_path / "one.dspa.safetensors", tmp_path / "two.dspa.safetensors", tmp_path / "b"

    def names() -> list[str]:
        return [method["name"] for method in json.loads((tmp_path / "out.json").read_text())["methods"]]

    assert run("--map", one, "--map", two, *short)[0] == 0 and names()[1:] == [
        "DSPA ablate 0.2, one",
        "DSPA ablate 0.2, two",
    ]
    other = other / "one.dspa.safetensors"
    assert run("--map", one, "--map", other, *short)[0] == 0
    assert names()[1:] == [f"DSPA ablate 0.2, {one}", f"DSPA ablate 0.2, {other}"]


def test_joint_maps(run, folder, tmp_path):
    """One method of all maps, and its controls."""
    save_second_map(tmp_path, folder / "map")
    both = ["--map", folder / "map", "--map", tmp_path / "second", "--seeds", 1, "--json", "out.json"]
    assert run(*both, "--joint", "--alpha", 1)[0] == 0
    record = json.loads((tmp_path / "out.json").read_text())
    name = "DSPA ablate 1, map + second"
    controls = [f"{name}: {control}" for control in ("random set", "shuffled map", "wrong layer")]
    assert [method["name"] for method in record["methods"]] == [
        "base",
        name,
        *controls,
        "Static-SAE ablate 1, map + second",
    ]
    assert [part["layers"] for part in record["methods"][1]["settings"]["joint"]] == [[1, 2], [1, 3]]
    code, _, err = run("--map", folder / "map", "--joint")
    assert code == 2 and "--joint is given with fewer than two maps; accepted: --map twice or more" in err
    code, _, err = run("--prefix", "a", "--joint")
    assert code == 2 and "Without --map there is no use for --joint" in err
    ConditionalDifferenceMap.load(folder / "map").save(tmp_path / "same")
    code, _, err = run("--map", folder / "map", "--map", tmp_path / "same", "--joint")
    assert code == 2 and "--map with --joint is with 2 of layer 2; accepted: one for each output layer" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [],
            "None of --map, --adapter, --vector, --tuned, --persona, --latent, --latents, --junction and --prefix was "
            "given",
        ),
        (["--fraction", 0.5, "--prefix", "a"], "Without --adapter there is no use for --fraction"),
        (["--prefix", "a", "--alpha", 1, "--k-diff", 4], "Without --map there is no use for --alpha, --k-diff"),
        (["--map", "map", "--sae", "sae"], "Without --adapter or --latent there is no use for --sae"),
        (["--map", "map", "--count", "the"], "--count is 'the'; accepted: NAME=REGEX, such as 'thanks=(?i)thank', or"),
        (["--map", "map", "--counters", "prompts.txt"], "prompts.txt is not JSON"),
        (["--map", "map", "--count", "a=("], "--count a is '(', which does not compile (missing ), unterminated"),
        (["--map", "map", "--count", "a=b", "--count", "a=c"], "--count is one name twice"),
        (["--map", "map", "--count", "margin=b"], "The name of a counter is 'margin'"),
        (["--map", "map", "--prefer", "margin"], "--prefer is margin without held-out triples"),
        (["--map", "map", "--prefer", "warm", "--count", "a=b"], "--prefer is 'warm'; accepted: margin, a"),
        (["--map", "map", "--mode", "both", "--mode", "all"], "--mode is 'all'; accepted: ablate, augment, both"),
        (["--map", "map", "--alpha", "-1"], "--alpha is -1.0; accepted: a finite number >= 0"),
        (["--map", "map", "--json", "map"], "--json is map, as --map map is"),
        (["--map", "other"], "There is no map file at other"),
        (["--map", "map", "--held-out", "prompts.txt"], "prompts.txt"),
        (["--prefix", "my own"], "Pass --model"),
        (["--map", "map", "--prefix", " "], "A prefix is empty"),
        (["--adapter", "map"], "holds no adapter.json"),
        (["--map", "map", "--alpha", 0.5, "--alpha", 0.5], "--alpha is 0.5 twice; accepted: different values"),
        (["--map", "map", "--map", "map"], "--map is map twice"),
        (["--adapter", "map", "--fraction", 2], "--fraction"),
        (["--map", "map", "--max-perplexity", 0], "--max-perplexity is 0; accepted: a number > 0"),
        (["--map", "map", "--json", "map.json"], "map.json, which holds something else"),
    ],
)
def test_bad_input_is_refused_before_the_model_is_loaded(run, folder, tmp_path, arguments, message):
    for name in ("map", "prompts.txt"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "map.json").write_text('{"a": 1}')
    code, out, err = run(*arguments)
    assert code == 2 and message in err and out == "" and "Loading" not in err


def test_prefixes_that_begin_alike(run, folder, tmp_path):
    prefixes = [f"you are a good old friend, {ending}" for ending in ("cat", "dog")]
    arguments = [word for prefix in prefixes for word in ("--prefix", prefix)]
    code, _, err = run(*arguments, "--model", folder / "tiny", "--json", "out.json", "--seeds", 1)
    record = json.loads((tmp_path / "out.json").read_text())
    assert code == 0, err
    assert [method["name"] for method in record["methods"]] == ["base", *(f'prefix "{text}"' for text in prefixes)]


def test_maps_and_adapters_of_different_models(run, folder, tmp_path):
    make_model("gemma2", seed=1).save_pretrained(tmp_path / "other")
    cdmap = ConditionalDifferenceMap.load(folder / "map")
    cdmap.sources["model"] = model_source(AutoModelForCausalLM.from_pretrained(tmp_path / "other"))
    cdmap.save(tmp_path / "map")
    code, _, err = run("--map", tmp_path / "map", "--adapter", folder / "adapter")
    assert code == 2 and "made with different models. Pass --model" in err


def test_a_file_of_something_else_is_kept(run, folder, tmp_path):
    (tmp_path / "out.json").write_text('{"a": 1}')
    code, _, err = run("--map", folder / "map", "--json", "out.json")
    assert code == 2 and "which holds something else" in err and (tmp_path / "out.json").read_text() == '{"a": 1}'
