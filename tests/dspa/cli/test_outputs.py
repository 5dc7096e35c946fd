"""Outputs of commands that would replace what is read, or cannot be written: refused before anything is loaded."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest

from dspa import MapError
from dspa.cli import main
from dspa.cli.loading import check_writable
from dspa.files import write_tensors
from dspa.fsrl.adapter import FSRLAdapter
from dspa.maps.collection import Collection
from dspa.models.sources import Source
from dspa.outputs import held
from dspa.testing import make_sae

MODEL = ("--model", "model", "--sae-in", "sae", "--sae-out", "sae")
FILES = ("map", "a", "labels.json", "rules.json", "only", "model/config.json", "sae/cfg.json", "counts/manifest.json")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files that commands are given, which stay as they are. They would fail to load."""
    for name in FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"name": name}))
    for name in ("map", "a"):
        (tmp_path / f"hard-{name}").hardlink_to(tmp_path / name)
        (tmp_path / f"soft-{name}").symlink_to(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["dspa", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0), " ".join(capsys.readouterr().err.split())


REFUSED = [
    ("generate --map map --file a --out a", "--out is a, as --file is"),
    ("generate --map map --file a --out hard-a", "--out is hard-a, as --file is"),
    ("generate --map map --out map", "--out is map, as --map is"),
    ("generate --map map --out hard-map", "--out is hard-map, as --map is"),
    ("generate --map map --out soft-map", "--out is soft-map, as --map is"),
    ("generate --map map --trace hard-map", "--trace is hard-map, as --map is"),
    ("generate --map map --out new --trace ./new", "--trace is new, as --out is"),
    ("generate --map map --model model --out model/config.json", "a file in the folder that --model is"),
    ("generate --map map --sae-in sae --out sae/cfg.json", "a file in the folder that --sae-in is"),
    ("generate --adapter sae --out sae/cfg.json", "a file in the folder that --adapter is"),
    ("map build a --out hard-a", "--out is hard-a, as TRIPLES is"),
    ("map build a --out counts/manifest.json --work-dir counts", "a file in the folder that --work-dir is"),
    ("map build model --out model/config.json", "a file in the folder that TRIPLES is"),
    ("map build a --out sae/cfg.json", "a file in the folder that --sae-in is"),
    ("map reduce counts --out counts/manifest.json", "a file in the folder that COUNTS is"),
    ("map reduce counts --only only --out only", "--out is only, as --only is"),
    ("map show map --plot hard-map", "--plot is hard-map, as the map is"),
    ("map show map --labels labels.json --plot labels.json", "--plot is labels.json, as --labels is"),
    ("map show map --model model --plot model/config.json", "a file in the folder that --model is"),
    ("map diff a map --plot hard-a", "--plot is hard-a, as one map is"),
    ("map stability counts --plot counts/manifest.json", "a file in the folder that COUNTS is"),
    ("map stability counts --csv new --plot new", "--csv is new, as --plot is"),
    ("compare a --map map --json hard-map", "--json is hard-map, as --map map is"),
    ("demo smollm2 --file a --json hard-a", "--json is hard-a, as --file is"),
    ("fsrl analyse usage usage.csv --adapter sae --out .", "--out is usage.csv, as usage.csv is"),
    ("fsrl analyse categories a --adapter sae --labels categories.csv --out .", "--out is categories.csv, as"),
    ("fsrl analyse coherence --file texts.csv --adapter sae --out .", "--out is texts.csv, as texts.csv is"),
]


@pytest.mark.parametrize(("line", "message"), REFUSED, ids=[line for line, _ in REFUSED])
def test_no_command_replaces_what_it_reads(capsys, monkeypatch, here, line, message):
    for name in ("usage.csv", "categories.csv", "texts.csv"):
        (here / name).write_text("prompt\nx\n")
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    more = MODEL if line.startswith("map build") else ()
    code, err = run(capsys, monkeypatch, *line.split(), *more)
    assert code == 2 and message in err, err
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before


RECORDING = [
    ("generate --map made --out model/config.json", "a file in the folder that the model of --map is"),
    ("generate --map made --trace sae/cfg.json", "a file in the folder that the sae-in of --map is"),
    ("compare a --map made --json model/config.json", "a file in the folder that the model of --map made is"),
    ("map show made --plot sae/cfg.json", "a file in the folder that the sae-in of the map is"),
    ("generate --adapter trained --out model/config.json", "a file in the folder that the model of --adapter is"),
]


@pytest.mark.parametrize(("line", "message"), RECORDING, ids=[line for line, _ in RECORDING])
def test_what_a_map_or_an_adapter_names_is_not_replaced(capsys, monkeypatch, here, line, message):
    sources = {name: Source(str(here / name.partition("_")[0]), "") for name in ("model", "sae_in", "sae_out")}
    write_tensors(here / "made", {}, {"format": "dspa.map.3", "sources": {n: asdict(s) for n, s in sources.items()}})
    adapter = FSRLAdapter(make_sae(1, 8))
    adapter.trained_on = sources["model"]
    adapter.save(here / "trained")
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    code, err = run(capsys, monkeypatch, *line.split())
    assert code == 2 and message in err, err
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before


def test_what_may_be_written_next_to_inputs(here: Path) -> None:
    write_tensors(here / "counts" / "map", {}, {"format": "dspa.map.3"})
    read = {"COUNTS": here / "counts", "--model": "google/gemma-2-2b", "--sae-in": "release:id", "--only": None}
    for path in (here / "counts" / "map", here / "counts" / "new", here / "new", here / "map", Path("/dev/null")):
        check_writable("--out", path, read)
    check_writable("--trace", Path("/dev/null"), {"--out": Path("/dev/null")})
    assert not (here / "new").exists()


FOLDERS = [
    ("map collect a --out counts", "The folder of counts is counts, whose manifest.json is of something else"),
    ("map collect a --out sae/cfg.json", "The folder of counts is sae/cfg.json, which cannot be made"),
    ("map collect a --out /dev/null", "The folder of counts is /dev/null, which cannot be made"),
    ("map build a --work-dir counts", "The folder of counts is counts, whose manifest.json is of something else"),
    ("map collect a --out busy", "The folder of counts is busy, which process "),
    ("sae train a --layer 1 --out busy", "The output folder is busy, which process "),
    ("sae finetune a --sae sae --out busy", "The output folder is busy, which process "),
    ("fsrl train a --sae sae --out busy", "The output folder is busy, which process "),
    ("fsrl analyse layers a --sae sae --held-out a --out busy", "--out is busy, which process "),
    ("fsrl analyse usage a --adapter sae --out busy", "--out is busy, which process "),
    ("fsrl analyse usage a --adapter sae --out /dev/null", "--out is /dev/null; accepted: a folder"),
    ("sae train a --layer 1 --out /dev/null", "The output folder is /dev/null; accepted: a new folder"),
]


@pytest.mark.parametrize(("line", "message"), FOLDERS, ids=[line for line, _ in FOLDERS])
def test_a_folder_that_cannot_be_written_is_refused_at_once(capsys, monkeypatch, here, line, message):
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    more = MODEL if line.startswith("map") else () if "analyse usage" in line else MODEL[:2]
    with held(here / "busy", "--out", ValueError):
        code, err = run(capsys, monkeypatch, *line.split(), *more)
    assert code == 2 and message in err, err
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["data.json", "sources.json", "tokens.json", "costs.json", "shard-000000.safetensors"])
def test_a_folder_with_files_that_counts_would_replace(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    (tmp_path / "index.html").write_text("")
    with pytest.raises(MapError, match=rf"which holds {name} and no manifest\.json"):
        Collection.check_free(tmp_path)
    os.unlink(tmp_path / name)
    Collection.check_free(tmp_path)
