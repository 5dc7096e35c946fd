"""Merge collections of counts."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from dspa.errors import MapError
from dspa.files import read_header
from dspa.maps.pieces import DataRecord
from dspa.maps.shards import Collection


def merge(out: str | Path, folders: Sequence[str | Path], *, progress: bool = True) -> Collection:
    """One collection of several, of the same settings and of different triples: as if their data had been one file.

    Raises `MapError` for one that is not complete, damaged or of other settings, for data that are given twice, and
    for an `out` that is there already.
    """
    if not folders:
        raise MapError("There is nothing to merge; accepted: one folder of counts or more.")
    parts = [Collection.open(folder) for folder in folders]
    if Path(out).exists():
        raise MapError(f"{out} is there already; accepted: a folder that is new.")
    for part in parts:
        part.verify()
        part._check(parts[0].settings)
    _check_apart(parts)
    # Of another name until it is whole.
    made = Collection.start(Path(out).with_name(f"{Path(out).name}.partial"), parts[0].settings)
    try:
        _copy(parts, made, progress)
        made.folder.rename(out)
    except BaseException:
        shutil.rmtree(made.folder, ignore_errors=True)
        raise
    return Collection.open(out)


def _check_apart(parts: Sequence[Collection]) -> None:
    """Raise `MapError` if a triple is in two of the collections."""
    keys = [torch.cat([shard["keys"] for shard in part.shards("keys")]) for part in parts]
    for n, (part, mine) in enumerate(zip(parts, keys, strict=True)):
        for other, theirs in zip(parts[:n], keys, strict=False):
            if shared := int(torch.isin(mine, theirs).sum()):
                raise MapError(
                    f"{shared} of {len(mine)} triples in {part.folder} are in {other.folder} too, and would count "
                    "twice. Leave one folder out, or collect only what the other does not have."
                )


def _copy(parts: Sequence[Collection], made: Collection, progress: bool) -> None:
    n_triples, digests = 0, list[str]()
    with tqdm(total=sum(len(part.paths()) for part in parts), unit="shard", desc="merge", disable=not progress) as bar:
        for part in parts:
            for path in part.paths():
                shard = part.read(path)
                moved = dataclasses.replace(shard, index=shard.index + n_triples)
                digest = str(read_header(path)["triples"])
                made.write(len(digests), digest, moved)
                digests.append(digest)
                bar.update()
            n_triples += part.n_triples
    made.record(DataRecord.of(n_triples, digests))
