"""`dspa.maps.collect.collect`: sources of triples, progress, and refusals."""

from __future__ import annotations

import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dspa import ConditionalDifferenceMap, MapError, ModelError, PreferenceError, Triple
from dspa.maps import pieces
from dspa.maps.pieces import TripleSource
from dspa.maps.reduce import reduce
from dspa.testing import BOS, D_IN, D_SAE_IN, D_SAE_OUT, L_IN, L_OUT, make_sae

from ..support.counts import (
    PASSES,
    TEMPLATE,
    Calls,
    Case,
    as_conversations,
    as_rows,
    check_same,
    hooked,
    shards,
    with_template,
    write_lines,
)


def test_first(case: Case) -> None:
    got = case.collect(first=3)
    check_same(got, case.collect(case.ids[:3]))
    with pytest.warns(UserWarning, match="`first` is 100 and the data hold 8 triples: all were counted"):
        check_same(case.collect(first=100), case.collect())


# Chat templates


def test_settings_of_the_chat_template(case: Case, tmp_path: Path) -> None:
    tokenizer, rows = with_template(TEMPLATE), as_conversations(case.ids)
    own: list[dict[str, Any]] = [
        {"chat_template_kwargs": {"polite": False}},
        {"tools": [{"name": "w9"}, {"name": "w9"}]},
        {"tools": '[{"name": "w9"}]', "chat_template_kwargs": None},
    ]
    mixed = [row | settings for row, settings in zip(rows, own, strict=False)] + rows[len(own) :]
    plain, polite = (
        case.collect(triples=mixed, tokenizer=tokenizer, work_dir=tmp_path / str(kwargs), chat_template_kwargs=kwargs)
        for kwargs in (None, {"polite": True})
    )
    # <s> is no part of the template: two words open the user's and the assistant's turn.
    words = torch.tensor([len(prompt) - 1 + 2 for prompt, *_ in case.ids])
    words[1:3] += torch.tensor([4, 2])
    assert torch.equal(plain.triples()["prompt"], words)
    words[1:] += 2
    assert torch.equal(polite.triples()["prompt"], words)
    assert torch.equal(polite.triples()["chosen"], plain.triples()["chosen"])
    assert (plain.settings.chat_template_kwargs, polite.settings.chat_template_kwargs) == (None, {"polite": True})
    cdmap = reduce(polite, sparsify=False)
    cdmap.save(tmp_path / "map")
    assert ConditionalDifferenceMap.load(tmp_path / "map").meta.chat_template_kwargs == {"polite": True}
    with pytest.raises(MapError, match=r"other settings \(chat_template_kwargs: \{'polite': True\} there, None now\)"):
        case.collect(triples=mixed, tokenizer=tokenizer, work_dir=polite.folder)
    with pytest.raises(MapError, match=r"other data"):
        case.collect(triples=rows, tokenizer=tokenizer, work_dir=plain.folder)


def test_settings_that_the_chat_template_does_not_read(case: Case) -> None:
    tokenizer, rows = with_template(TEMPLATE), as_conversations(case.ids)
    with pytest.raises(ValueError, match=r"with polit, which the chat template does not read"):
        case.collect(triples=rows, tokenizer=tokenizer, chat_template_kwargs={"polit": True})
    rows[3]["chat_template_kwargs"] = {"polit": True}
    with pytest.warns(UserWarning, match=r"`chat_template_kwargs` of the data set polit, which .* does not read"):
        case.collect(triples=rows, tokenizer=tokenizer)
    rows[3]["chat_template_kwargs"] = {"tokenize": True}
    with pytest.raises(PreferenceError, match=r"triple 4: `chat_template_kwargs` is with tokenize, reserved"):
        case.collect(triples=rows, tokenizer=tokenizer)


# Sources of triples


def dataset(rows: list[dict[str, Any]]) -> Any:
    return pytest.importorskip("datasets", reason="datasets is not installed").Dataset.from_list(rows)


BAD = {"prompt": "w3", "chosen": "w4", "rejected": ""}
SOURCES: dict[str, Callable[[list[dict[str, str]], Path], Any]] = {
    "file": lambda rows, path: write_lines(path, rows),
    "name of a file": lambda rows, path: str(write_lines(path, rows)),
    "list": lambda rows, _: rows,
    "tuple": lambda rows, _: tuple(rows),
    "dataset": lambda rows, _: dataset(rows),
}
STREAMS: dict[str, Callable[[list[dict[str, str]]], Any]] = {
    "generator": lambda rows: (row for row in rows),
    "iterable dataset": lambda rows: dataset(rows).to_iterable_dataset(),
}


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "TRIPLES_PER_WINDOW", 3)
    monkeypatch.setattr(pieces, "TRIPLES_PER_PIECE", 2)


@pytest.mark.parametrize("source", [*SOURCES, *STREAMS])
def test_any_source_gives_the_same_counts(case: Case, tmp_path: Path, source: str, small_windows: None) -> None:
    rows = as_rows(case.ids)
    given = SOURCES[source](rows, tmp_path / "prefs.jsonl") if source in SOURCES else STREAMS[source](rows)
    check_same(case.collect(triples=given), case.collect())


@pytest.mark.parametrize("source", SOURCES)
def test_a_bad_triple_is_found_before_the_model_runs(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, small_windows: None
) -> None:
    calls = Calls(monkeypatch)
    given = SOURCES[source]([*as_rows(case.ids), BAD], tmp_path / "prefs.jsonl")
    with pytest.raises(PreferenceError, match=r"(line|triple) 9: `rejected` is empty"):
        case.collect(triples=given, work_dir=tmp_path / "work")
    assert calls.n == 0 and not shards(tmp_path / "work")


def test_a_triple_that_only_the_tokenizer_refuses_is_found_as_early(
    case: Case, monkeypatch: pytest.MonkeyPatch, small_windows: None
) -> None:
    calls = Calls(monkeypatch)
    with pytest.raises(PreferenceError, match="triple 9: `chosen` is equal to `rejected` after tokenization"):
        case.collect(triples=[*as_rows(case.ids), {"prompt": "w3", "chosen": " w4", "rejected": " w4 "}])
    assert calls.n == 0


def test_all_triples_that_cannot_be_tokenized_are_named(case: Case, small_windows: None) -> None:
    same = {"prompt": "w3", "chosen": " w4", "rejected": " w4 "}
    rows = [*as_rows(case.ids), same, Triple(**same, name="C: mine"), same]
    with pytest.raises(PreferenceError, match="equal to `rejected`") as raised:
        case.collect(triples=rows)
    assert str(raised.value).startswith("triple 9: `chosen` is equal to")
    assert str(raised.value).endswith(" 2 more cannot be tokenized either: C: mine, triple 11.")


def test_those_that_cannot_be_tokenized_are_named_in_their_order(case: Case) -> None:
    """Pieces are made by length."""
    rows = [{"prompt": "w3 " * n, "chosen": "w4", "rejected": "w4 "} for n in (5, 40, 1, 20)]
    with pytest.raises(PreferenceError, match=r"^triple 1: .* either: triple 2, triple 3, triple 4\.$"):
        case.collect(triples=rows)


def test_thousands_that_cannot_be_tokenized_are_counted(case: Case) -> None:
    """As with a wrong chat template, which refuses all of them."""
    with pytest.raises(PreferenceError, match=r"2999 more cannot be tokenized either: .* and 2899 more") as raised:
        case.collect(triples=[{"prompt": "w3", "chosen": " w4", "rejected": " w4 "}] * 3000)
    assert len(str(raised.value)) < 5000


@pytest.mark.parametrize("source", STREAMS)
def test_a_stream_is_read_a_window_at_a_time(case: Case, source: str, small_windows: None) -> None:
    rows = as_rows(case.ids)
    n_read, read_at = 0, []

    def counted() -> Iterator[dict[str, str]]:
        nonlocal n_read
        for row in STREAMS[source](rows):
            n_read += 1
            yield row

    with hooked(case.model, lambda _: read_at.append(n_read)):
        case.collect(triples=counted(), batch_tokens=1)
    # Windows of 3, 3 and 2.
    assert read_at == [3] * 3 * PASSES + [6] * 3 * PASSES + [8] * 2 * PASSES


def test_a_bad_triple_in_a_stream_keeps_what_is_finished(case: Case, tmp_path: Path, small_windows: None) -> None:
    rows = as_rows(case.ids)
    with pytest.raises(PreferenceError, match="triple 6: `rejected` is empty"):
        case.collect(triples=iter([*rows[:5], BAD, *rows[5:]]), work_dir=tmp_path)
    finished = {path: path.stat().st_mtime_ns for path in shards(tmp_path)}
    assert len(finished) == 2
    check_same(case.collect(triples=iter(rows), work_dir=tmp_path), case.collect())
    assert all(path.stat().st_mtime_ns == then for path, then in finished.items())


@pytest.mark.parametrize("source", ["file", "generator"])
def test_no_more_triples_are_held_than_two_windows(
    case: Case, tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "TRIPLES_PER_WINDOW", 2)
    monkeypatch.setattr(pieces, "TRIPLES_PER_PIECE", 1)
    rows = as_rows(case.ids)
    given = write_lines(tmp_path / "prefs.jsonl", rows) if source == "file" else iter(rows)
    check, n_alive, held = Triple.__post_init__, 0, []

    def gone() -> None:
        nonlocal n_alive
        n_alive -= 1

    def made(self: Triple) -> None:
        nonlocal n_alive
        check(self)
        n_alive += 1
        weakref.finalize(self, gone)

    monkeypatch.setattr(Triple, "__post_init__", made)
    with hooked(case.model, lambda _: held.append(n_alive)):
        case.collect(triples=given)
    assert len(held) >= 2 * len(rows) and 0 < max(held) <= 4


def test_a_file_is_never_held_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "TRIPLES_PER_WINDOW", 16)
    text = "x" * 10_000
    path = write_lines(tmp_path / "x", ({"prompt": text, "chosen": f"{n}", "rejected": text} for n in range(1000)))
    tracemalloc.start()
    try:
        assert sum(len(piece.triples) for piece in TripleSource(path).pieces()) == 1000
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < path.stat().st_size / 10


# Progress


def test_progress_shows_the_rate(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    case.collect(progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "8/8" in err and "triple/s" in err


def test_progress_of_a_stream_has_no_end(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    case.collect(triples=iter(as_rows(case.ids)), progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "collect: 8triple" in err


def test_no_progress_prints_nothing(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    case.collect(progress=False)
    assert capfd.readouterr() == ("", "")


# Bad input


def test_training_mode(case: Case) -> None:
    case.model.train()
    with pytest.raises(ModelError, match=r"training mode.*model.eval\(\)"):
        case.collect()


BAD_SAES = {
    "sae_in": (make_sae(L_IN, 20, d_in=D_IN + 1), f"`sae_in` reads {D_IN + 1} dimensions .* is {D_IN}"),
    "sae_out": (make_sae(L_OUT, 20, d_in=D_IN + 1), f"`sae_out` reads {D_IN + 1} dimensions .* is {D_IN}"),
    "sae_in above": (make_sae(L_OUT + 1, 20), f"input SAE sits at layer {L_OUT + 1}.* output SAE at layer {L_OUT}"),
    "sae_out beyond": (make_sae(4, 20), "`sae_out` sits at layer 4; accepted: 0 to 3"),
    "sae_out without a layer": (make_sae(None, 20), "does not say its layer"),
    "sae_in of another": (make_sae(L_IN, 20, model_name="gemma-2-2b"), "`sae_in` was made for 'gemma-2-2b'.*'mine'"),
}


@pytest.mark.parametrize("name", BAD_SAES)
def test_saes_that_do_not_fit(case: Case, name: str, tmp_path: Path) -> None:
    sae, message = BAD_SAES[name]
    with pytest.raises(ModelError, match=message):
        case.collect(model_name="mine", work_dir=tmp_path / "work", **{name.split()[0]: sae})
    assert not (tmp_path / "work").exists()


def test_the_same_model_by_another_name(case: Case) -> None:
    sae = make_sae(L_IN, D_SAE_IN, seed=1, model_name="gemma-2-2b")
    assert case.collect(sae_in=sae, model_name="google/gemma-2-2b-it").settings.model_name == "google/gemma-2-2b-it"


def test_the_place_of_an_sae_on_neuronpedia(case: Case, tmp_path: Path) -> None:
    """It is needed to check labels of the map's latents, and the same SAE may know more of it later."""
    sae = make_sae(L_OUT, D_SAE_OUT, seed=2)
    for hook_name, neuronpedia_id, place in (
        (None, None, f"{L_OUT}"),
        (f"blocks.{L_OUT + 1}.hook_resid_pre", None, f"{L_OUT + 1}"),
        (None, "gemma-2-2b/9-res-x", "9-res-x"),
    ):
        sae.hook_name, sae.neuronpedia_id = hook_name, neuronpedia_id
        collection = case.collect(sae_out=sae)
        assert collection.settings.neuronpedia_out == reduce(collection).meta.neuronpedia_out == place
    first = case.collect(work_dir=tmp_path / "counts")
    assert case.collect(work_dir=tmp_path / "counts", sae_out=sae).folder == first.folder


@pytest.mark.parametrize("value", [129, 1, 0, -5])
def test_max_length_beyond_the_model(case: Case, value: int) -> None:
    with pytest.raises(ValueError, match=f"`max_length` is {value}; accepted: 2 to 128"):
        case.collect(max_length=value)


@pytest.mark.parametrize(("length", "options"), [(128, {}), (130, {}), (25, {"max_length": 25})])
def test_a_prompt_without_room_is_refused_by_its_number(
    case: Case, length: int, options: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [*case.ids[:2], ([BOS, *[5] * (length - 1)], [6], [7])]
    calls = Calls(monkeypatch)
    with pytest.raises(PreferenceError, match=f"triple 3: `prompt` is {length} tokens long, which leaves no room"):
        case.collect(ids, **options)
    assert calls.n == 0
