"""Folders of counts: stopped, resumed, damaged, and in places that cannot be written."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dspa import ConditionalDifferenceMap, MapError, PreferenceError, reduce, top_tokens
from dspa.data.triples import digest_of_keys, key_of
from dspa.files import read_header, read_tensors
from dspa.maps import pieces
from dspa.maps.collection import COSTS, DATA, MANIFEST, MEASURED, TOKENS, Collection
from dspa.maps.merge import merge
from dspa.maps.shards import COUNTED, FORMAT, NAMES
from dspa.testing import D_SAE_OUT, L_OUT, make_sae

from ..support.clock import set_clock
from ..support.counts import (
    CHANGES,
    PASSES,
    TEMPLATE,
    Calls,
    Case,
    as_conversations,
    as_rows,
    as_triples,
    check_same,
    files,
    in_a_child,
    make_ids,
    same_bits,
    shards,
    with_template,
)

pytestmark = pytest.mark.usefixtures("small_pieces")


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in shards(folder)}


# Resumed


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fail_at", [0, 1, 2, 5, 6, 7, 12, 23])
def test_a_stopped_run_goes_on(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail_at: int, stream: bool
) -> None:
    def start(folder: Path) -> Collection:
        rows = as_rows(case.ids)
        return case.collect(triples=iter(rows) if stream else rows, batch_tokens=1, work_dir=folder)

    start(tmp_path / "at once")
    folder = tmp_path / "new" / "work"
    with monkeypatch.context() as patch:
        Calls(patch, fail_at)
        with pytest.raises(KeyboardInterrupt):
            start(folder)
    finished = fail_at // (2 * PASSES)
    assert len(shards(folder)) == finished
    before = times(folder)
    with monkeypatch.context() as patch:
        calls = Calls(patch)
        start(folder)
        assert calls.n == PASSES * (len(case.ids) - 2 * finished)
        again = start(folder)
        assert calls.n == PASSES * (len(case.ids) - 2 * finished)
    assert files(folder) == files(tmp_path / "at once")
    assert before.items() <= times(folder).items()
    check_same(again, case.collect(batch_tokens=1))


def test_a_run_that_goes_on_after_midnight(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(name: str, day: str, **options: Any) -> Collection:
        set_clock(monkeypatch, day)
        rows, tokenizer = as_conversations(case.ids), with_template("{{ strftime_now('w%d w%m ') }}" + TEMPLATE)
        return case.collect(triples=rows, tokenizer=tokenizer, batch_tokens=1, work_dir=tmp_path / name, **options)

    whole = start("at once", "2026-11-20T09:00")
    assert whole.settings.template_date == reduce(whole).meta.template_date == "2026-11-20"
    # A start that was stopped before its first shard has set the date.
    for fail_at in (0, 2 * PASSES):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            Calls(patch, fail_at)
            start("stopped", "2026-11-20T23:59")
    check_same(start("stopped", "2026-11-21T00:01"), whole)
    assert files(tmp_path / "stopped") == files(tmp_path / "at once")
    later = start("later", "2026-11-21T00:01")
    assert later.settings.template_date == "2026-11-21" and files(later.folder) != files(whole.folder)
    with pytest.raises(MapError, match=r"\(template_date: '2026-11-21' there, '2026-11-20' now\)"):
        merge(tmp_path / "merged", [whole.folder, later.folder])
    with pytest.raises(MapError, match=r"max_length: 128 there, 99 now; template_date: '2026-11-20' there"):
        start("stopped", "2026-11-21T00:01", max_length=99)


def test_a_run_that_is_killed_again_and_again(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By SIGKILL, at any moment, be it within a pass or a write."""
    case.ids = [triple for seed in range(3) for triple in make_ids(seed)]
    case.collect(work_dir=tmp_path / "at once")
    folder, draw = tmp_path / "work", random.Random(0)
    n_killed = 0
    for _ in range(100):
        child = in_a_child(lambda: case.collect(work_dir=folder))
        n_before, since = len(shards(folder)), time.monotonic()
        # Not before it has finished a piece, because this would take long otherwise.
        while len(shards(folder)) == n_before and child.is_alive() and time.monotonic() - since < 10:
            time.sleep(0.001)
        time.sleep(draw.random() * 0.02)
        child.kill()
        child.join()
        n_killed += child.exitcode == -signal.SIGKILL
        if child.exitcode == 0:
            break
    assert n_killed >= 3 and child.exitcode == 0
    assert files(folder) == files(tmp_path / "at once")


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_what_was_half_written_is_not_read(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """A kill between the beginning of a file and its renaming leaves it in a workspace, and the folder's lock."""

    def work() -> None:
        real, n = getattr(os, step), 0

        def kill(*args: Any) -> None:
            nonlocal n
            n += 1
            # The manifest, the data, and one shard come first.
            if n == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            real(*args)

        monkeypatch.setattr(os, step, kill)
        case.collect(work_dir=tmp_path / "work")

    child = in_a_child(work)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    (partial,) = (tmp_path / "work").glob(".dspa-partial-*/content")
    assert (tmp_path / "work" / ".dspa.lock").is_file()
    assert [path.name for path in shards(tmp_path / "work")] == ["shard-000000.safetensors"]
    partial.write_bytes(partial.read_bytes()[:100])
    case.collect(work_dir=tmp_path / "work")
    case.collect(work_dir=tmp_path / "at once")
    assert files(tmp_path / "work") == files(tmp_path / "at once")


def test_a_piece_is_what_is_lost_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """A usual map has 250 triples, and a piece is much less, in triples and in text."""
    monkeypatch.undo()
    assert pieces.TRIPLES_PER_PIECE <= 64 and pieces.TRIPLES_PER_PIECE < pieces.TRIPLES_PER_WINDOW
    text = "x" * 40_000
    rows = [{"prompt": text, "chosen": text, "rejected": f"{n}"} for n in range(10)]
    assert [len(piece.triples) for piece in pieces.TripleSource(rows).pieces()] == [1] * 10
    assert [len(piece.triples) for piece in pieces.TripleSource([*rows, *as_rows(make_ids(0))]).pieces()] == [1] * 9 + [
        9
    ]


@pytest.mark.parametrize("n", [1, 4, 5, 9])
def test_pieces_hold_every_triple_once_and_the_longest_first(n: int) -> None:
    rows = as_rows([triple for seed in range(2) for triple in make_ids(seed)][:n])
    cut = list(pieces.TripleSource(rows).pieces())
    assert [piece.number for piece in cut] == list(range(len(cut)))
    numbers = [index for piece in cut for index, _ in piece.triples]
    assert sorted(numbers) == list(range(n))
    lengths = [sum(map(len, rows[index].values())) for index in numbers]
    windows = [lengths[k : k + 4] for k in range(0, n, 4)]
    assert windows == [sorted(window, reverse=True) for window in windows]
    assert [sorted(numbers[k : k + 4]) for k in range(0, n, 4)] == [list(range(n))[k : k + 4] for k in range(0, n, 4)]


def test_what_is_on_disk(case: Case, tmp_path: Path) -> None:
    got = case.collect(work_dir=tmp_path)
    assert json.loads((tmp_path / MANIFEST).read_text()) == asdict(got.settings)
    assert got.settings.sae_in == case.sae_in.fingerprint and got.settings.format == FORMAT
    assert json.loads((tmp_path / DATA).read_text()) == asdict(got.data)
    assert {path.name for path in tmp_path.iterdir()} == {
        MANIFEST,
        DATA,
        TOKENS,
        MEASURED,
        COSTS,
        *(f"shard-00000{n}.safetensors" for n in range(4)),
    }
    costs, measured = got.costs, got.measured
    assert costs is not None and measured is not None
    assert (costs.method, costs.n_triples, costs.model_digest) == ("DSPA", got.n_triples, got.settings.model_digest)
    assert 0 < measured.seconds <= costs.measured.seconds and costs.measured.peak_rss_bytes > 1e8
    assert costs.triples == digest_of_keys(map(key_of, reversed(as_triples(case.ids))))
    check_same(Collection.open(tmp_path), got)
    # Of shards of an earlier version, it is not known what they took.
    for name in (MEASURED, COSTS, "shard-000000.safetensors"):
        (tmp_path / name).unlink()
    assert case.collect(work_dir=tmp_path).costs is None and not (tmp_path / MEASURED).exists()


def test_files_that_are_no_shards_of_the_data(case: Case, tmp_path: Path) -> None:
    """Files as a stopped write leaves them, and a copy made by hand."""
    got = case.collect(work_dir=tmp_path / "work")
    at_once = reduce(got)
    one, *_ = shards(got.folder)
    for name in ("shard-000004.safetensors", "shard-0000001.safetensors", "shard-000000.safetensors.partial"):
        shutil.copy(one, got.folder / name)
    assert len(got.paths()) == 4 and same_bits(reduce(got), at_once)
    assert same_bits(reduce(merge(tmp_path / "merged", [got.folder], progress=False)), at_once)


def test_a_temporary_folder_goes_with_its_collection(case: Case) -> None:
    got = case.collect()
    folder = got.folder
    assert len(shards(folder)) == 4
    del got
    assert not folder.exists()


# Other settings and data


def refusal(case: Case, folder: Path, **options: Any) -> str:
    """Return the message that refuses a folder. Nothing in it changes, and the model does not run."""
    before, calls = files(folder), []
    handle = case.model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(MapError) as raised:
        case.collect(work_dir=folder, **options)
    handle.remove()
    assert files(folder) == before and not calls
    return str(raised.value)


@pytest.mark.parametrize("name", CHANGES)
def test_a_folder_of_other_settings_is_refused(case: Case, tmp_path: Path, name: str) -> None:
    case.collect(work_dir=tmp_path)
    field, options = CHANGES[name]
    message = refusal(case, tmp_path, **options)
    assert (
        message.startswith(f"{tmp_path} holds shards of other settings ({field}: ") and message.count(" there, ") == 1
    )


def test_a_folder_of_another_dtype_is_refused(case: Case, tmp_path: Path) -> None:
    case.collect(work_dir=tmp_path)
    case.model.to(torch.bfloat16)
    assert "(dtypes: 'torch.float32, torch.float32, torch.float32' there, 'torch.bfloat16, " in refusal(case, tmp_path)


def test_a_folder_of_an_earlier_version(case: Case, tmp_path: Path) -> None:
    """It makes a map, and does not go on, because its texts were tokenized otherwise."""
    case.collect(work_dir=tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert manifest.pop("boundary") == "joint"
    assert manifest.pop("chat_template_kwargs") is manifest.pop("template_date") is None
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    assert refusal(case, tmp_path).startswith(
        f"{tmp_path} holds shards of other settings (boundary: 'apart' there, 'joint' now)."
    )
    assert reduce(tmp_path).meta.boundary == "apart"


def edited(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [*rows[:-1], rows[-1] | {"chosen": "w3 w4 w5"}]


DATA_CHANGES: dict[str, Callable[[list[dict[str, str]]], list[dict[str, str]]]] = {
    "edited": edited,
    "appended": lambda rows: [*rows, *as_rows(make_ids(7))],
    "shortened": lambda rows: rows[:-1],
    "shortened by a window": lambda rows: rows[:4],
    "reordered": lambda rows: [rows[1], rows[0], *rows[2:]],
    "other": lambda _: as_rows(make_ids(7)),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("change", DATA_CHANGES)
def test_a_folder_of_other_data_is_refused(case: Case, tmp_path: Path, change: str, stream: bool) -> None:
    case.collect(work_dir=tmp_path)
    rows = DATA_CHANGES[change](as_rows(case.ids))
    assert "holds shards of other data (" in refusal(case, tmp_path, triples=iter(rows) if stream else rows)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("change", ["edited", "other"])
def test_other_data_are_refused_before_the_end_too(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, stream: bool
) -> None:
    """The stopped run had counted the edited triple."""

    def given(rows: list[dict[str, str]]) -> Any:
        return iter(rows) if stream else rows

    with monkeypatch.context() as patch:
        Calls(patch, 3 * PASSES)
        with pytest.raises(KeyboardInterrupt):
            case.collect(triples=given(as_rows(case.ids)), work_dir=tmp_path, batch_tokens=1)
    rows = as_rows(case.ids)
    counted = {index for path in shards(tmp_path) for index in read_tensors(path, ["index"])["index"].tolist()}
    rows[min(counted)] |= {"chosen": "w3 w4 w5"}
    rows = rows if change == "edited" else DATA_CHANGES["other"](rows)
    assert "holds shards of other data (" in refusal(case, tmp_path, triples=given(rows))


def test_the_first_triples_are_other_data(case: Case, tmp_path: Path) -> None:
    case.collect(work_dir=tmp_path, first=4)
    assert "(4 triples of digest " in refusal(case, tmp_path, first=5)
    check_same(case.collect(case.ids[:4], work_dir=tmp_path), case.collect(case.ids[:4]))


def test_settings_that_were_given_up(case: Case, tmp_path: Path) -> None:
    """A start that counted nothing does not claim the folder."""
    with pytest.raises(PreferenceError, match="leaves no room"):
        case.collect(work_dir=tmp_path, max_length=9)
    assert not shards(tmp_path)
    case.collect(case.ids[:3], work_dir=tmp_path)
    assert reduce(tmp_path).meta.n_triples == 3


@pytest.mark.parametrize("content", ['{"name": "web app", "icons": []}', '{"format": "tar"}', "[]", ""])
def test_a_manifest_of_something_else_is_kept(case: Case, tmp_path: Path, content: str) -> None:
    (tmp_path / MANIFEST).write_text(content)
    assert str(tmp_path) in refusal(case, tmp_path)


@pytest.mark.parametrize("name", [DATA, TOKENS, "shard-000000.safetensors"])
def test_files_of_something_else_are_kept(case: Case, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    assert f"{tmp_path}, which holds {name} and no {MANIFEST}; accepted: a new folder" in refusal(case, tmp_path)


def test_one_process_counts_in_a_folder(case: Case, tmp_path: Path) -> None:
    """The second is refused, also where the first began long ago, and goes on when that has ended."""
    folder = tmp_path / "work"
    messages: list[str] = []

    def second(*_: Any) -> None:
        with pytest.raises(MapError) as raised:
            case.collect(work_dir=folder)
        messages.append(str(raised.value))

    embedding = case.model.get_input_embeddings()
    handle = embedding.register_forward_pre_hook(lambda *_: None if messages else second())
    case.collect(work_dir=folder)
    handle.remove()
    assert f"{folder}, which process {os.getpid()} on " in messages[0] and "Wait until it has ended" in messages[0]
    case.collect(work_dir=folder)
    case.collect(work_dir=tmp_path / "at once")
    assert files(folder) == files(tmp_path / "at once")


def test_files_of_a_user_in_the_folder_are_kept(case: Case, tmp_path: Path) -> None:
    mine = {"log.txt": b"a", "all.partial": b"b", "shard-000000.safetensors.partial": b"c", ".dspa-partial-mine": b"d"}
    for name, content in mine.items():
        (tmp_path / name).write_bytes(content)
    case.collect(work_dir=tmp_path)
    assert mine.items() <= files(tmp_path).items()


# Tokens that latents promote


def test_counts_record_the_tokens_that_latents_promote(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {name: top_tokens(getattr(case, name), case.model, case.tokenizer) for name in ("sae_in", "sae_out")}
    case.collect(work_dir=tmp_path / "one")
    case.collect(make_ids(7), work_dir=tmp_path / "other")
    assert Collection.open(tmp_path / "one").promoted == expected
    # Maps have those of their rows and columns, with which they are written and read.
    for made in (
        reduce(tmp_path / "one", gate_rule="active", k_diff=1),
        reduce(merge(tmp_path / "both", [tmp_path / "one", tmp_path / "other"], progress=False), k_diff=1),
    ):
        rows, columns = made.values.any(dim=1), made.columns.tolist()
        assert made.promoted["sae_in"] == {i: expected["sae_in"][i] for i in rows.nonzero().flatten().tolist()}
        assert made.promoted["sae_out"] == {j: expected["sae_out"][j] for j in columns}
        made.save(tmp_path / "map")
        assert ConditionalDifferenceMap.load(tmp_path / "map").promoted == made.promoted == made.to("cpu").promoted
    # Computed once.
    monkeypatch.setattr("dspa.maps.collect.top_tokens", None)
    case.collect(work_dir=tmp_path / "one")


def test_a_folder_of_an_earlier_version_has_no_tokens(case: Case, tmp_path: Path) -> None:
    case.collect(work_dir=tmp_path)
    promoted = reduce(tmp_path).promoted
    (tmp_path / TOKENS).unlink()
    assert reduce(tmp_path).promoted == {}
    # To go on records them.
    case.collect(work_dir=tmp_path)
    assert reduce(tmp_path).promoted == promoted != {}


def test_tokens_are_those_of_the_folders_saes(case: Case, tmp_path: Path) -> None:
    """Without a shard, another start takes the folder, here with an SAE of other rows."""
    case.collect(work_dir=tmp_path)
    for shard in shards(tmp_path):
        shard.unlink()
    other = replace(case, sae_out=make_sae(L_OUT, D_SAE_OUT, seed=9))
    promoted = other.collect(work_dir=tmp_path).promoted
    assert promoted["sae_out"] == top_tokens(other.sae_out, case.model, case.tokenizer)


def test_a_model_that_does_not_show_its_end_is_counted(case: Case, tmp_path: Path) -> None:
    model: Any = case.model
    model.model.norm = torch.nn.Identity()
    with pytest.warns(UserWarning, match="will not show what their latents mean. The final norm of Qwen3ForCausalLM"):
        case.collect(work_dir=tmp_path)
    assert reduce(tmp_path).promoted == {} and not (tmp_path / TOKENS).exists()


# Damaged


def cut_off(content: bytes) -> bytes:
    return content[:-5]


def flip_a_bit(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


DAMAGES = {"cut off": cut_off, "a bit": flip_a_bit, "empty": lambda _: b"", "text": lambda _: b"not a shard" * 100}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_named_and_counted_again(case: Case, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "work"
    case.collect(work_dir=folder)
    before = files(folder)
    path = shards(folder)[1]
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    for refuse in (
        lambda: case.collect(work_dir=folder),
        lambda: reduce(folder),
        lambda: merge(tmp_path / "x", [folder]),
    ):
        with pytest.raises(MapError, match=f"{path} is damaged"):
            refuse()
    with pytest.raises(MapError, match="Delete it and collect again: only its triples are counted again"):
        case.collect(work_dir=folder)
    path.unlink()
    case.collect(work_dir=folder)
    assert files(folder) == before


@pytest.mark.parametrize("name", ["index", "cut", "chosen.counts", "prompt_special.lengths", "totals"])
def test_the_checksum_is_of_every_tensor(case: Case, tmp_path: Path, name: str) -> None:
    case.collect(work_dir=tmp_path)
    path = shards(tmp_path)[0]
    header, tensors = read_header(path), read_tensors(path, NAMES)
    tensors[name][0] += 1
    save_file(tensors, path, {"dspa": json.dumps(header)})
    with pytest.raises(MapError, match="its tensors are not those that were written"):
        reduce(tmp_path)


def test_a_shard_has_no_other_tensors(case: Case, tmp_path: Path) -> None:
    case.collect(work_dir=tmp_path)
    with safe_open(shards(tmp_path)[0], framework="pt") as file:
        assert set(file.keys()) == set(NAMES)
        assert len(NAMES) == 4 * len(COUNTED) + 6


@pytest.mark.parametrize("n", [0, 3])
def test_a_missing_shard(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    case.collect(work_dir=tmp_path)
    before = files(tmp_path)
    shards(tmp_path)[n].unlink()
    with pytest.raises(MapError, match=r"not complete: 1 of 4 shards are missing. Collect again: it continues"):
        reduce(tmp_path)
    calls = Calls(monkeypatch)
    case.collect(work_dir=tmp_path)
    assert files(tmp_path) == before and calls.n > 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_folder_in_the_making_makes_no_map(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    Calls(monkeypatch, 3 * PASSES)
    rows = as_rows(case.ids)
    with pytest.raises(KeyboardInterrupt):
        case.collect(triples=iter(rows) if stream else rows, work_dir=tmp_path, batch_tokens=1)
    state = "their data were not read to the end" if stream else "3 of 4 shards are missing"
    with pytest.raises(MapError, match=f"not complete: {state}. Collect again: it continues from there"):
        reduce(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"[1]", b"", b"7", b"null", b"\xff\xfe", b'{"n_triples": 8}', b'{"x": 1}'])
@pytest.mark.parametrize("name", [MANIFEST, DATA])
def test_damaged_json(case: Case, tmp_path: Path, name: str, content: bytes) -> None:
    case.collect(work_dir=tmp_path)
    (tmp_path / name).write_bytes(content)
    for refuse in (lambda: case.collect(work_dir=tmp_path), lambda: reduce(tmp_path)):
        with pytest.raises(MapError, match=str(tmp_path)):
            refuse()


def test_a_folder_without_data_json_reads_them_again(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case.collect(work_dir=tmp_path)
    before = files(tmp_path)
    (tmp_path / DATA).unlink()
    with pytest.raises(MapError, match="not complete"):
        reduce(tmp_path)
    calls = Calls(monkeypatch)
    case.collect(work_dir=tmp_path)
    assert files(tmp_path) == before and calls.n == 0


def test_an_earlier_format(case: Case, tmp_path: Path) -> None:
    case.collect(work_dir=tmp_path)
    settings = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps(settings | {"format": "dspa.counts.2"}))
    assert f"other settings (format: 'dspa.counts.2' there, '{FORMAT}' now)" in refusal(case, tmp_path)
    with pytest.raises(MapError, match=f"is of format 'dspa.counts.2'; accepted: {FORMAT}"):
        reduce(tmp_path)


@pytest.mark.parametrize("made", [True, False])
def test_a_folder_without_counts(tmp_path: Path, made: bool) -> None:
    folder = tmp_path if made else tmp_path / "none"
    with pytest.raises(MapError, match=f"{folder} holds no counts .*dspa map collect"):
        reduce(folder)


def test_shards_that_were_exchanged(case: Case, tmp_path: Path) -> None:
    """A shard in place of another would count its triples twice."""
    case.collect(work_dir=tmp_path)
    first, second, *_ = shards(tmp_path)
    second.write_bytes(first.read_bytes())
    with pytest.raises(MapError, match=f"The shards in {tmp_path} are not those of its data"):
        reduce(tmp_path)


# Where they cannot be written


def outcome(work: Callable[[], Any]) -> BaseException | None:
    """Return what `work` raises in a separate process."""
    ours, theirs = Pipe(duplex=False)

    def run() -> None:
        try:
            work()
            theirs.send(None)
        except BaseException as error:
            theirs.send((type(error), str(error)))

    child = in_a_child(run)
    child.join(60)
    assert child.exitcode == 0
    outcome_of_child = ours.recv()
    return outcome_of_child and outcome_of_child[0](outcome_of_child[1])


def test_a_full_disk(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On this disk, no more than 3 kB fit into a file."""
    case.collect(work_dir=tmp_path / "at once")
    folder = tmp_path / "work"
    with monkeypatch.context() as patch:
        Calls(patch, 3 * PASSES)
        with pytest.raises(KeyboardInterrupt):
            case.collect(work_dir=folder, batch_tokens=1)
    before = times(folder)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        case.collect(work_dir=folder)

    error = outcome(work)
    assert isinstance(error, OSError)
    problem = r"shard-000001.safetensors (0.0 MB) could not be written: File too large. What was written before is"
    assert str(folder) in str(error) and problem in str(error) and "then start again" in str(error)
    assert times(folder) == before and len(before) == 1
    assert not list(folder.glob(".*"))
    case.collect(work_dir=folder)
    check_same(Collection.open(folder), Collection.open(tmp_path / "at once"), batched_alike=False)


@contextlib.contextmanager
def public_folder(mode: int) -> Iterator[Path]:
    """Make a folder that every user can reach."""
    path = Path(tempfile.mkdtemp())
    path.chmod(mode)
    try:
        yield path
    finally:
        path.chmod(0o700)
        shutil.rmtree(path)


@pytest.mark.parametrize("below", [False, True])
def test_a_folder_that_may_not_be_written(case: Case, below: bool) -> None:
    calls = []
    case.model.register_forward_pre_hook(lambda *_: calls.append(1))
    with public_folder(0o555) as folder:

        def work() -> None:
            if os.geteuid() == 0:
                # Root may write to all folders.
                os.seteuid(65534)
            try:
                case.collect(work_dir=folder / "new" if below else folder)
            finally:
                assert not calls

        error = outcome(work)
    assert isinstance(error, MapError) and f"which cannot be {'made' if below else 'written'} (Permission" in str(error)
    assert str(folder) in str(error)


@pytest.mark.parametrize("below", [False, True])
def test_a_folder_that_cannot_be(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: bool) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "new" if below else tmp_path / "file"
    calls = Calls(monkeypatch)
    with pytest.raises(MapError, match=rf"{folder}, which cannot be made \("):
        case.collect(work_dir=folder)
    assert calls.n == 0
