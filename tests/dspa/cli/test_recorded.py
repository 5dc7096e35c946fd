"""Maps and adapters that name where their model and SAEs were loaded from, so that no option has to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dspa.cli import main
from dspa.maps.cdmap import ConditionalDifferenceMap
from dspa.testing import D_IN, ENGLISH, L_IN, L_OUT, make_model, make_sae

from ..support.adapters import TRIPLES as HELD_OUT
from ..support.adapters import acting_adapter
from ..support.files import save_model_and_saes

NAMED = ["--model", "tiny", "--sae-in", "sae_in", "--sae-out", "sae_out", "--device", "cpu"]
PROMPT = ["--prompt", "the cat is", "--max-new-tokens", 3, "--device", "cpu"]


@pytest.fixture
def run(capsys, monkeypatch):
    """Run a command, and return its exit code and what it printed on stdout and on both, line breaks folded."""

    def go(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["dspa", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, " ".join((captured.out + captured.err).split())

    return go


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a user, with a model, two SAEs and triples."""
    folder = tmp_path / "work"
    save_model_and_saes(folder)
    rows = [
        {"prompt": " ".join(ENGLISH[n : n + 5]), "chosen": f" {ENGLISH[n + 9]}", "rejected": f" {ENGLISH[n + 3]}"}
        for n in range(12)
    ]
    (folder / "triples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def cdmap(folder: Path, run) -> Path:
    """A map that was made with relative paths."""
    assert run("map", "build", "triples.jsonl", *NAMED, "--out", "map")[0] == 0
    return folder / "map"


def test_a_map_is_enough_from_any_folder(run, folder, cdmap, tmp_path, monkeypatch):
    code, expected, _ = run("generate", "--map", cdmap, *NAMED, *PROMPT)
    assert code == 0
    monkeypatch.chdir(tmp_path)
    assert run("generate", "--map", cdmap, *PROMPT)[:2] == (0, expected)
    assert "output SAE from" in run("map", "show", cdmap)[2]
    # Options that are given win.
    code, _, text = run("generate", "--map", cdmap, *PROMPT, "--sae-out", folder / "sae_in")
    assert code == 2 and "--sae-out has fingerprint" in text


def test_the_map_does_not_depend_on_where_things_are(run, folder, cdmap, tmp_path, monkeypatch):
    for name in ("tiny", "sae_in", "sae_out"):
        shutil.copytree(folder / name, tmp_path / "copy" / name)
    monkeypatch.chdir(tmp_path / "copy")
    assert run("map", "build", folder / "triples.jsonl", *NAMED, "--out", "map")[0] == 0
    one, other = (ConditionalDifferenceMap.load(path) for path in (cdmap, tmp_path / "copy" / "map"))
    assert one.meta == other.meta and one.sources["sae_in"].path != other.sources["sae_in"].path
    assert one.sources["model"].digest == other.sources["model"].digest


def test_a_collection_records_where_it_came_from(run, folder, cdmap):
    options = [*NAMED]
    assert run("map", "collect", "triples.jsonl", *options, "--out", "counts")[0] == 0
    assert run("map", "merge", "merged", "counts")[0] == 0
    assert run("map", "reduce", "merged", "--out", "again")[0] == 0
    assert (folder / "again").read_bytes() == cdmap.read_bytes()
    # Counts continue where the model has moved, and the newest place is recorded.
    shutil.move(folder / "tiny", folder / "moved")
    options[1] = "moved"
    code, _, text = run("map", "collect", "triples.jsonl", *options, "--model-name", "./tiny", "--out", "counts")
    assert code == 0, text
    assert run("map", "reduce", "counts", "--out", "again")[0] == 0
    assert ConditionalDifferenceMap.load(folder / "again").sources["model"].path == str(folder / "moved")


@pytest.mark.parametrize("role", ["model", "sae_out"])
@pytest.mark.parametrize("change", ["removed", "damaged", "replaced", "unknown"])
def test_a_place_is_no_evidence_of_what_is_there(run, folder, cdmap, role, change):
    place = folder / {"model": "tiny"}.get(role, role)
    if change == "unknown":
        loaded = ConditionalDifferenceMap.load(cdmap)
        del loaded.sources[role]
        loaded.save(cdmap)
    elif change == "removed":
        shutil.move(place, folder / "moved")
    elif change == "damaged":
        next(place.glob("*.safetensors")).write_bytes(b"no tensors")
    elif role == "model":
        make_model("gemma2", seed=1).save_pretrained(place)
    else:
        make_sae(L_OUT, 128, seed=7).save(place)
    code, _, text = run("generate", "--map", cdmap, *PROMPT)
    message = {
        "removed": "not there any more",
        "damaged": "cannot be loaded",
        "replaced": "another one now",
        "unknown": "does not record its place",
    }[change]
    option = f"--{role.replace('_', '-')}"
    assert code == 2 and message in text and f"Pass {option}." in text
    # And with the option, where what was recorded is elsewhere.
    if change == "removed":
        code, _, text = run("generate", "--map", cdmap, *PROMPT, option, folder / "moved", "--model-name", "tiny")
        assert code == 0, text


def test_the_layer_is_recorded_too(run, folder):
    """A file that does not say its layer, as those of Gemma Scope."""
    for name in ("sae_in", "sae_out"):
        config = folder / name / "cfg.json"
        stated = json.loads(config.read_text())
        del stated["metadata"]["hook_name"]
        config.write_text(json.dumps(stated))
    options = [
        "--model",
        "tiny",
        "--sae-in",
        "sae_in",
        "--sae-out",
        "sae_out",
        "--layer-in",
        L_IN,
        "--layer-out",
        L_OUT,
    ]
    assert run("map", "build", "triples.jsonl", *options, "--device", "cpu", "--out", "map")[0] == 0
    code, _, text = run("generate", "--map", "map", *PROMPT)
    assert code == 0, text


def test_an_sae_of_the_catalogue_is_recorded_by_its_names(run, folder, cdmap, monkeypatch):
    """The SAE that the catalogue would return is read from the folder."""
    from sae_lens import SAE

    monkeypatch.setattr(SAE, "from_pretrained", lambda release, sae_id: SAE.load_from_disk(folder / sae_id))
    options = ["--model", "tiny", "--sae-in", "tiny-release:sae_in", "--sae-out", "sae_out", "--device", "cpu"]
    assert run("map", "build", "triples.jsonl", *options, "--out", "other")[0] == 0
    assert ConditionalDifferenceMap.load("other").sources["sae_in"].path == "tiny-release:sae_in"
    assert run("generate", "--map", "other", *PROMPT)[0] == 0
    monkeypatch.setattr(SAE, "from_pretrained", lambda *_: SAE.load_from_disk(folder / "sae_out"))
    code, _, text = run("generate", "--map", "other", *PROMPT)
    assert code == 2 and "Pass --sae-in." in text


def test_a_map_without_sources_is_an_earlier_one(cdmap):
    from dspa.files import read_header, read_tensors, write_tensors
    from dspa.maps.cdmap import TENSORS

    header = read_header(cdmap)
    del header["sources"], header["sha256"]
    write_tensors(cdmap, read_tensors(cdmap, TENSORS), header)
    loaded = ConditionalDifferenceMap.load(cdmap)
    assert loaded.sources == {}
    loaded.save(cdmap)
    assert ConditionalDifferenceMap.load(cdmap).meta == loaded.meta


def test_an_adapter_is_enough(run, folder, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dspa.evaluate.responses import responses_of
    from dspa.fsrl import FSRLAdapter
    from dspa.models.sources import model_source
    from dspa.saes.frozen import FrozenSAE

    model, tokenizer = AutoModelForCausalLM.from_pretrained("tiny").eval(), AutoTokenizer.from_pretrained("tiny")
    adapter = acting_adapter(model, responses_of(model, tokenizer, HELD_OUT), FrozenSAE.load("sae_out"))
    adapter.trained_on = model_source(model)
    adapter.save("adapter")
    (folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in HELD_OUT))
    monkeypatch.chdir(tmp_path)
    arguments = ["fsrl", "analyse", "usage", folder / "held_out.jsonl", "--adapter", folder / "adapter"]
    code, _, text = run(*arguments, "--out", tmp_path / "a", "--device", "cpu")
    assert code == 0, text
    given = ["--model", folder / "tiny", "--sae", folder / "sae_out"]
    assert run(*arguments, "--out", tmp_path / "b", "--device", "cpu", *given)[0] == 0
    assert (tmp_path / "a" / "usage.csv").read_bytes() == (tmp_path / "b" / "usage.csv").read_bytes()
    assert FSRLAdapter.load(folder / "adapter", FrozenSAE.load(folder / "sae_out")).trained_on == adapter.trained_on
    make_sae(L_OUT, 128, seed=7).save(folder / "sae_out")
    code, _, text = run(*arguments, "--out", tmp_path / "c", "--device", "cpu")
    assert code == 2 and "Pass --sae." in text


@pytest.mark.filterwarnings("ignore:The weights in")
def test_a_map_of_a_gguf_file_finds_it_and_takes_the_folder_of_its_weights(run, folder, tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    from ..support.gguf_files import gguf_llama, write_gguf

    monkeypatch.setenv("DSPA_CACHE", str(tmp_path / "cache"))
    model = gguf_llama(D_IN)
    write_gguf(folder / "tiny.gguf", model)
    named = ["--model", "tiny.gguf", *NAMED[2:], "--dtype", "float32"]
    with pytest.warns(UserWarning, match="dequantized: in float32 they take"):
        code, _, text = run("map", "build", "triples.jsonl", *named, "--out", "map")
    assert code == 0, text
    assert ConditionalDifferenceMap.load("map").sources["model"].path == str(folder / "tiny.gguf")
    monkeypatch.chdir(tmp_path)
    arguments = ["generate", "--map", folder / "map", *PROMPT, "--dtype", "float32"]
    code, expected, text = run(*arguments)
    assert code == 0, text
    # The ordinary folder that the file was made from, which has its values in fp32.
    model.save_pretrained(folder / "plain")
    for tokens in (tmp_path / "cache" / "gguf").glob("*/tokenizer*"):
        shutil.copy(tokens, folder / "plain")
    assert run(*arguments, "--model", folder / "plain")[:2] == (0, expected)
    # The recorded place may have become such a folder, but not another file.
    (folder / "tiny.gguf").unlink()
    shutil.move(folder / "plain", folder / "tiny.gguf")
    assert run(*arguments)[:2] == (0, expected)
    shutil.rmtree(folder / "tiny.gguf")
    write_gguf(folder / "tiny.gguf", gguf_llama(D_IN, seed=1))
    code, _, text = run(*arguments)
    assert code == 2 and "another one now" in text and "Pass --model." in text
