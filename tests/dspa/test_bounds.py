"""Inputs whose reading would not end, or take far more memory than they are large."""

from __future__ import annotations

import gzip
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dspa import FrozenSAE
from dspa.cli.loading import triple_source
from dspa.data.lines import MOST_EXPANSION, read_text
from dspa.data.prompts import read_prompts
from dspa.data.records import read_records
from dspa.data.texts import TextFile
from dspa.data.triples import load_triples
from dspa.errors import MapError, SAEError, TextError
from dspa.maps.collection import Collection
from dspa.maps.pieces import DataRecord
from dspa.saes.activations import Activations
from dspa.saes.labels import read_labels, read_rules
from dspa.testing import make_model, make_sae, make_tokenizer


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
