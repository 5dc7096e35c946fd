"""The launch table that `bench.tuning.triton` writes."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from bench.tuning import triton as tune
from dspa_kernels import launch
from dspa_kernels.launch import Entry, Launch, launch_parameters

CPU = torch.device("cpu")
OTHER = Launch(BLOCK_N=16, BLOCK_L=128, BLOCK_K=64, num_warps=8, num_stages=2, programs=1)
PLACE = tune.Place("steer", 0, 16, 2304, 16384)


def read(path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Entry, ...]:
    monkeypatch.setattr(launch, "TABLE", path)
    return launch.table.__wrapped__()


def test_the_table_round_trips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = launch.TABLE.read_text()
    assert tune.as_text(tune.ordered(launch.table())) == stored
    (tmp_path / "table.json").write_text(tune.as_text(launch.table()))
    assert read(tmp_path / "table.json", monkeypatch) == launch.table()


def test_the_most_specific_entry_that_fits_comes_first() -> None:
    new = [
        replace(PLACE.entry(OTHER, None), d_in=None, d_sae=None, rows=64, capability=90),
        replace(PLACE.entry(OTHER, 90), rows=32),
        PLACE.entry(OTHER, 90),
        PLACE.entry(OTHER, None),
    ]
    before = [entry for entry in launch.table() if entry.capability is None]
    table = tune.merged(before, new)
    mine = [entry for entry in table if (entry.kernel, entry.precision) == ("steer", 0)]
    assert mine[:4] == [new[2], new[1], new[3], new[0]]
    assert [entry for entry in table if entry not in new] == before


def test_an_entry_replaces_that_of_its_kind() -> None:
    once = tune.merged(launch.table(), [PLACE.entry(OTHER, 90)])
    twice = tune.merged(once, [PLACE.entry(replace(OTHER, num_stages=3), 90)])
    assert len(twice) == len(once) and twice[0].launch.num_stages == 3


def test_a_candidate_is_used_and_then_forgotten() -> None:
    def present() -> Launch:
        return launch_parameters("steer", 1, 2304, 16384, 0, CPU)

    before = present()
    with tune.using(PLACE, OTHER):
        assert present() == OTHER != before
        assert launch_parameters("steer", 1, 2304, 16384, 2, CPU) != OTHER
    assert present() == before


@pytest.mark.parametrize("precision", tune.BYTES)
@pytest.mark.parametrize("rows", [16, 32, 64, None])
def test_candidates_fit_on_a_multiprocessor(rows: int | None, precision: int) -> None:
    place = replace(PLACE, rows=rows, precision=precision)
    candidates = tune.candidates(place)
    assert 5 < len(candidates) == len(set(candidates))
    assert {candidate.BLOCK_N for candidate in candidates} == ({rows} if rows else {64, 128})
    weight, row = tune.BYTES[precision]
    for candidate in candidates:
        tile = candidate.BLOCK_K * (candidate.BLOCK_L * weight + candidate.BLOCK_N * row)
        assert tile * candidate.num_stages * candidate.programs <= tune.SHARED


def test_what_was_measured_is_kept(tmp_path: Path) -> None:
    entry = PLACE.entry(OTHER, 90)
    tune.State(tmp_path / "state.json").add(entry, 17.5)
    again = tune.State(tmp_path / "state.json")
    assert again.of(entry) == 17.5 and again.of(replace(entry, rows=32)) is None


def test_all_of_the_table_can_be_tuned() -> None:
    chosen = tune.parsed(["--shapes", "2304x16384", "--precisions", "0", "1", "2"])
    places = list(tune.places(chosen.kernels, chosen.precisions, chosen.shapes))
    kinds = {(place.kernel, place.precision, place.rows) for place in places}
    assert kinds == {(entry.kernel, entry.precision, entry.rows) for entry in launch.table()}


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device")
def test_without_a_gpu_the_table_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["tune", "--table", str(tmp_path / "table.json")])
    assert tune.main() == 2 and "CUDA" in capsys.readouterr().out
    assert not (tmp_path / "table.json").exists()


def test_entries_are_json() -> None:
    for line, entry in zip(json.loads(tune.as_text(launch.table())), launch.table(), strict=True):
        assert line == asdict(entry)
