"""Merging of collections of counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from dspa.errors import MapError, refusal
from dspa.files import read_header
from dspa.maps.collection import Collection
from dspa.maps.pieces import DataRecord
from dspa.maps.provenance import join_attention
from dspa.outputs import new_folder, try_folder


def merge(out: str | Path, folders: Sequence[str | Path], *, progress: bool = True) -> Collection:
    """Merge collections of the same settings and of different triples, as if their data had been one file.

    Args:
        out: a new folder.
        folders: the collections, in the order of their data.
        progress: show a bar.

    Raises:
        MapError: a collection that is incomplete, damaged or of other settings, triples that are in two of them, or an
            `out` that exists or cannot be made.
    """
    if not folders:
        raise refusal(MapError, "`folders`", "empty", "one folder of counts or more")
    parts = [Collection.open(folder) for folder in folders]
    out = Path(out)
    if out.exists() or out.is_symlink():
        raise refusal(MapError, f"The folder {out}", "there already", "a new folder")
    try_folder(out, "The merged folder", MapError)
    for n, part in enumerate(parts):
        part.verify()
        for other in parts[:n]:
            part.check_settings(other.settings)
    _check_disjoint(parts)
    attention = join_attention({part.settings.attention for part in parts})
    # Parts of earlier versions do not know theirs.
    model_digest = next(filter(None, (part.settings.model_digest for part in parts)), "")
    settings = dataclasses.replace(parts[0].settings, attention=attention, model_digest=model_digest)
    out.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(out) as made:
        merged = Collection.start(made, settings, parts[0].sources)
        _copy_shards(parts, merged, progress)
        if promoted := next((part.promoted for part in parts if part.promoted), None):
            merged.record_promoted(promoted)
    return Collection.open(out)


def _check_disjoint(parts: Sequence[Collection]) -> None:
    """Raise `MapError` if a triple is in two of the collections."""
    keys = [torch.cat([shard["keys"] for shard in part.shards("keys")]) for part in parts]
    for n, (part, mine) in enumerate(zip(parts, keys, strict=True)):
        for other, theirs in zip(parts[:n], keys, strict=False):
            if shared := int(torch.isin(mine, theirs).sum()):
                raise MapError(
                    f"{shared} of {len(mine)} triples in {part.folder} are in {other.folder} too, and would count "
                    "twice. Leave one folder out, or collect only the triples that the other does not have."
                )


def _copy_shards(parts: Sequence[Collection], merged: Collection, progress: bool) -> None:
    """Write the shards of all parts, their triples renumbered, and the record of the data."""
    n_triples, digests = 0, list[str]()
    with tqdm(total=sum(len(part.paths()) for part in parts), unit="shard", desc="merge", disable=not progress) as bar:
        for part in parts:
            for path in part.paths():
                shard = part.read(path)
                renumbered = dataclasses.replace(shard, index=shard.index + n_triples)
                digest = str(read_header(path)["triples"])
                merged.write(len(digests), digest, renumbered)
                digests.append(digest)
                bar.update()
            n_triples += part.n_triples
    merged.record(DataRecord.of(n_triples, digests))
