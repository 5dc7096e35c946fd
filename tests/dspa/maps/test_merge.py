"""Merges of folders of counts, as if their data had been one file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dspa import MapError, reduce
from dspa.maps.collection import Collection
from dspa.maps.merge import merge

from ..support.counts import (
    CHANGES,
    Case,
    as_collection,
    check_same,
    draw,
    files,
    same_bits,
    shards,
)

pytestmark = pytest.mark.usefixtures("small_pieces")


def halves(case: Case, folder: Path) -> list[Path]:
    for name, ids in (("one", case.ids[:5]), ("two", case.ids[5:])):
        case.collect(ids, work_dir=folder / name, max_length=30)
    return [folder / "one", folder / "two"]


@pytest.mark.parametrize("reverse", [False, True])
def test_merged_folders_make_the_map_of_all_data(case: Case, tmp_path: Path, reverse: bool) -> None:
    parts = halves(case, tmp_path)
    before = [files(part) for part in parts]
    merged = merge(tmp_path / "all", parts[::-1] if reverse else parts, progress=False)
    ids = [*case.ids[5:], *case.ids[:5]] if reverse else case.ids
    at_once = case.collect(ids, work_dir=tmp_path / "at once", max_length=30)
    check_same(replace_data(merged, at_once), at_once, batched_alike=False)
    options = {"percentile": 60, "k_diff": 3}
    assert same_bits(reduce(merged, **options), reduce(at_once, **options))
    assert same_bits(reduce(tmp_path / "all", **options, subset=[1, 6]), reduce(at_once, **options, subset=[1, 6]))
    assert [files(part) for part in parts] == before
    assert reduce(merged).meta.n_cut > 0


def replace_data(merged: Collection, like: Collection) -> Collection:
    """Return the collection with the record of another, which was cut into other pieces."""
    assert merged.data is not None and like.data is not None and merged.data.n_triples == like.data.n_triples

    class Same(Collection):
        data = like.data  # type: ignore[assignment]

        def paths(self) -> list[Path]:
            return merged.paths()

    return Same(merged.folder, merged.settings)


def test_merges_of_merges(tmp_path: Path) -> None:
    data = draw(9, seed=0)
    rows = [list(range(4)), [4, 5], [6, 7, 8]]
    for n, numbers in enumerate(rows):
        index = [r - numbers[0] for r in numbers]
        part = [*(table[numbers] for table in data[:3]), data[3][:, numbers]]
        as_collection(part, pieces=[index[:1], index[1:]], folder=tmp_path / f"{n}")
    merge(tmp_path / "01", [tmp_path / "0", tmp_path / "1"], progress=False)
    merge(tmp_path / "012", [tmp_path / "01", tmp_path / "2"], progress=False)
    assert same_bits(reduce(tmp_path / "012", k_diff=2), reduce(as_collection(data), k_diff=2))
    assert [path.name for path in shards(tmp_path / "012")] == [f"shard-{n:06d}.safetensors" for n in range(6)]


def test_progress_of_a_merge(case: Case, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    merge(tmp_path / "all", halves(case, tmp_path))
    out, err = capfd.readouterr()
    assert out == "" and "merge" in err and "5/5" in err


@pytest.mark.parametrize("how", ["same", "copy"])
def test_a_merge_of_the_same_data_is_refused(case: Case, tmp_path: Path, how: str) -> None:
    one, two = halves(case, tmp_path)
    twice = one
    if how == "copy":
        twice = tmp_path / "copy"
        shutil.copytree(one, twice)
    with pytest.raises(MapError, match=f"triples in {twice} are in {one} too, and would count twice"):
        merge(tmp_path / "all", [one, two, twice])
    assert not list(tmp_path.glob("all*"))


def test_a_merge_of_data_that_overlap_is_refused(case: Case, tmp_path: Path) -> None:
    case.collect(case.ids[:5], work_dir=tmp_path / "one")
    case.collect(case.ids[3:], work_dir=tmp_path / "two")
    with pytest.raises(MapError, match=f"2 of 5 triples in {tmp_path / 'two'} are in {tmp_path / 'one'} too"):
        merge(tmp_path / "all", [tmp_path / "one", tmp_path / "two"])


def test_a_merge_that_fails_leaves_nothing(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = halves(case, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Collection, "record", lambda *_: exec("raise KeyboardInterrupt"))
        with pytest.raises(KeyboardInterrupt):
            merge(tmp_path / "all", parts)
    assert not list(tmp_path.glob("all*"))
    merge(tmp_path / "all", parts)


@pytest.mark.parametrize("name", CHANGES)
def test_a_merge_of_other_settings_is_refused(case: Case, tmp_path: Path, name: str) -> None:
    field, options = CHANGES[name]
    case.collect(case.ids[:5], work_dir=tmp_path / "one")
    case.collect(case.ids[5:], work_dir=tmp_path / "two", **options)
    with pytest.raises(MapError, match=rf"{tmp_path / 'two'} holds shards of other settings \({field}: "):
        merge(tmp_path / "all", [tmp_path / "one", tmp_path / "two"])
    assert not (tmp_path / "all").exists()


def test_a_merge_of_what_is_not_complete_is_refused(case: Case, tmp_path: Path) -> None:
    one, two = halves(case, tmp_path)
    shards(two)[0].unlink()
    with pytest.raises(MapError, match=f"{two} are not complete: 1 of 2 shards are missing"):
        merge(tmp_path / "all", [one, two])
    with pytest.raises(MapError, match=f"{tmp_path / 'none'} holds no counts"):
        merge(tmp_path / "all", [one, tmp_path / "none"])
    assert not (tmp_path / "all").exists()


def test_a_merge_goes_into_a_new_folder(case: Case, tmp_path: Path) -> None:
    one, two = halves(case, tmp_path)
    before = files(one)
    with pytest.raises(MapError, match=f"The folder {one} is there already; accepted: a new folder"):
        merge(one, [one, two])
    assert files(one) == before


def test_folders_of_a_user_are_kept(case: Case, tmp_path: Path) -> None:
    parts = halves(case, tmp_path)
    (tmp_path / "all.partial").mkdir()
    (tmp_path / "all.partial" / "notes.txt").write_text("kept")
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(MapError, match="twice"):
        merge(tmp_path / "all", [parts[0], parts[0]], progress=False)
    assert {path.name for path in tmp_path.iterdir()} == before
    merge(tmp_path / "all", parts, progress=False)
    assert {path.name for path in tmp_path.iterdir()} == before | {"all"}
    assert (tmp_path / "all.partial" / "notes.txt").read_text() == "kept"
    (tmp_path / "link").symlink_to("nowhere")
    for out in (tmp_path / "all.partial", tmp_path / "link", Path("/dev/null")):
        with pytest.raises(MapError, match="there already"):
            merge(out, parts, progress=False)
