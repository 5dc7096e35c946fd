"""Inputs whose reading would not end, or take far more memory than they are large."""

from __future__ import annotations

import gzip
import os
import signal
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dspa import FrozenSAE
from dspa.cli.loading import triple_source
from dspa.data.lines import MOST_EXPANSION, read_text
from dspa.data.prompts import read_prompts
from dspa.data.records import read_records
from dspa.data.texts import TextFile
from dspa.data.triples import load_triples
from dspa.errors import MapError, SAEError, TextError, TrainingError
from dspa.maps.collection import Collection
from dspa.maps.pieces import DataRecord
from dspa.models.places import ModelPlace, reading_model
from dspa.saes.activations import Activations
from dspa.saes.labels import read_labels, read_rules
from dspa.testing import make_model, make_sae, make_tokenizer
from dspa.training_folder import reading_checkpoint


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Fail, instead of waiting for ever."""

    def late(*_: object) -> None:
        raise AssertionError("It did not end.")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


READERS: dict[str, Callable[[Path], Any]] = {
    "triples": lambda path: list(load_triples(path)),
    "triples of a command": lambda path: list(load_triples(triple_source(str(path), "train", False))),
    "texts": TextFile,
    "prompts": lambda path: list(read_prompts(None, path)),
    "labels": lambda path: read_labels(path, make_sae(1, 8)),
    "rules": read_rules,
}


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.jsonl.gz", "pipe"])
@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_streams_are_refused_by_name(tmp_path: Path, name: str, reader: Callable[[Path], Any]) -> None:
    os.mkfifo(tmp_path / name)
    advice = r"is a stream, which can be read only once; accepted: a regular file\. Write it to a file first"
    with within(10), pytest.raises(ValueError, match=rf"{name} {advice}"):
        reader(tmp_path / name)


@pytest.mark.parametrize(
    "content",
    [b"[" + b" " * (1 << 26) + b"]", b"x" * (1 << 26), b"[" + b"{}," * (1 << 24) + b"{}]"],
    ids=["spaces", "one line", "a list"],
)
@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_gzip_files_far_larger_than_they_look(tmp_path: Path, content: bytes, reader: Callable[[Path], Any]) -> None:
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(content))
    assert len(content) > MOST_EXPANSION * path.stat().st_size
    with pytest.raises(ValueError, match=r"a\.json\.gz is a gzip file of \d+ bytes that unpacks to more than"):
        reader(path)


def test_repetitive_text_is_no_bomb(tmp_path: Path) -> None:
    (tmp_path / "small.gz").write_bytes(gzip.compress(b"the same\n" * 10_000))
    assert read_text(tmp_path / "small.gz", TextError).count("the same") == 10_000
    (tmp_path / "large.jsonl.gz").write_bytes(
        gzip.compress("".join(f'{{"a": {n * n}, "b": {n}}}\n' for n in range(10**5)).encode())
    )
    assert sum(1 for _ in read_records(tmp_path / "large.jsonl.gz", TextError)) == 10**5


# The SAE of a Gemma Scope file.
ARRAYS = {"w_enc": (4, 8), "b_enc": (8,), "threshold": (8,), "w_dec": (8, 4), "b_dec": (4,)}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"w_enc": (2048, 8192), "w_dec": (8192, 2048)},
            r"params\.npz is \d+ bytes that unpack to \d+; accepted: at most",
        ),
        ({"more": (1 << 26,)}, r"params\.npz has more; accepted: exactly W_dec"),
        ({"W_enc": (4, 8)}, r"params\.npz has W_enc twice; accepted: exactly W_dec"),
    ],
)
def test_names_and_sizes_come_before_arrays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, tuple[int, ...]], message: str
) -> None:
    path = tmp_path / "params.npz"
    arrays = {name: np.zeros(shape, dtype=np.float32) for name, shape in {**ARRAYS, **changed}.items()}
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
    read = []
    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", lambda _, name: read.append(name))
    with pytest.raises(SAEError, match=message):
        FrozenSAE.load(path)
    assert not read


# The SAE of a dictionary_learning file.
STATE = {"encoder.weight": (8, 4), "encoder.bias": (8,), "decoder.weight": (4, 8), "bias": (4,)}


def deflated(path: Path) -> None:
    """Compress the entries of a zip file, which torch stores as they are."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def damaged_archive(path: Path, whole: Path) -> Path:
    """Write an archive whose list of entries is damaged."""
    path.parent.mkdir()
    path.write_bytes(whole.read_bytes().replace(b"PK\x01\x02", b"PK\x01\x03"))
    return path


def test_sizes_come_before_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ae.pt"
    torch.save({name: torch.zeros(shape) for name, shape in STATE.items()}, path)
    deflated(path)
    assert FrozenSAE.load(path).d_sae == 8
    torch.save({name: torch.zeros(*shape) for name, shape in {**STATE, "bias": (1 << 24,)}.items()}, path)
    deflated(path)
    assert path.stat().st_size < 1 << 17
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("The tensors were read."))
    with pytest.raises(SAEError, match=r"ae\.pt is \d+ bytes that unpack to \d+; accepted: at most 200 times as many"):
        FrozenSAE.load(path)
    with pytest.raises(SAEError, match=r"ae\.pt is not readable \(BadZipFile\)"):
        FrozenSAE.load(damaged_archive(tmp_path / "damaged" / "ae.pt", path))
    # Files of models and checkpoints too.
    (tmp_path / "checkpoint-000000001").mkdir()
    for name in ("pytorch_model.bin", "checkpoint-000000001/optimizer.pt"):
        (tmp_path / name).write_bytes(path.read_bytes())
    with (
        pytest.raises(ValueError, match=r"model\.bin is \d+ bytes that unpack"),
        reading_model(ModelPlace(f"{tmp_path}")),
    ):
        pytest.fail("The weights were read.")
    checkpoint = tmp_path / "checkpoint-000000001"
    with pytest.raises(TrainingError, match=r"that unpack to .* Delete it"), reading_checkpoint(checkpoint):
        pytest.fail("The state was read.")


@pytest.mark.parametrize(
    "weight",
    [
        # 256 GB of one number.
        torch.ones(1).expand(1 << 18, 1 << 18),
        torch.empty(8, 4, device="meta"),
        torch.zeros(8, 4).to_sparse(),
    ],
    ids=["expanded", "meta", "sparse"],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_whose_numbers_are_not_in_the_file(tmp_path: Path, weight: torch.Tensor, zipped: bool) -> None:
    state = {name: torch.zeros(shape) for name, shape in STATE.items()} | {"encoder.weight": weight}
    torch.save(state, tmp_path / "ae.pt", _use_new_zipfile_serialization=zipped)
    with within(10), pytest.raises(SAEError, match=r"in which encoder\.weight are not dense tensors; accepted"):
        FrozenSAE.load(tmp_path / "ae.pt")


def test_a_count_of_shards_is_no_list_of_them(tmp_path: Path) -> None:
    counts = Collection(tmp_path, None)  # type: ignore[arg-type]
    counts.record(DataRecord(10**12, 10**11, "d"))
    (tmp_path / "shard-000001.safetensors").touch()
    with within(10), pytest.raises(MapError, match=r"not complete: 99999999999 of 100000000000 shards are missing"):
        counts.paths()


@pytest.mark.parametrize("tail", ["</s>\n" * 3, "<s> </s>\n</s>\n"])
def test_text_without_a_token_to_train_on(tmp_path: Path, tail: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text("w5 w6 w7\nw8 w9\n" + tail)
    options = {"max_length": 8, "exclude_special_tokens": True, "batch_tokens": 64}
    rows = Activations(make_model("qwen3"), make_tokenizer(), TextFile(path), [1], **options)  # type: ignore[arg-type]
    held_out, n_held_out = rows.held_out(5)
    assert n_held_out == 2 and len(held_out[1]) == 5
    with within(60), pytest.raises(TextError, match=r"after the 2 held-out entries is without a token to train on"):
        next(rows.batches(n_held_out, 4, 8, 0))
    path.write_text("w5 w6 w7\nw8 w9\n" + tail + "w3 w4\n")
    rows.texts = TextFile(path)
    with within(60):
        assert next(rows.batches(n_held_out, 4, 8, 0))[2].shape[0] == 4
