"""A folder of counts: a manifest, one shard a piece of the data, and a record of the data once they are known."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from torch import Tensor

from dspa.errors import MapError
from dspa.files import read_header, read_tensors, write_atomically, write_tensors
from dspa.maps.pieces import DataRecord

FORMAT = "dspa.counts.3"
# Of sums of residuals: integers, which add up alike in any order.
ROW_QUANTUM = 2.0**-16
MANIFEST, DATA = "manifest.json", "data.json"
# What is counted on the tokens of a triple: input latents on its prompt, output latents on its responses.
PARTS = ("prompt", "chosen", "rejected")
# And again on those of them that are special tokens.
COUNTED = (*PARTS, *(f"{part}_special" for part in PARTS))


@dataclass(frozen=True)
class CollectSettings:
    """All that decides the counts of given triples. SAE fingerprints; layers; widths; dtypes of model and SAEs; what
    each triple is cut to (tokens); a digest of what the tokenizer does; and the format of the shards."""

    model_name: str
    sae_in: str
    sae_out: str
    layer_in: int
    layer_out: int
    d_sae_in: int
    d_sae_out: int
    dtypes: str
    max_length: int | None
    tokenizer: str
    format: str = FORMAT


@dataclass(frozen=True)
class Counts:
    """Sparse counts of N texts: text n activates latent `latents[e]` on `counts[e]` of its `lengths[n]` tokens, for
    the entries e from `starts[n]` to `starts[n + 1]`, latents in order. starts and lengths int64, the others int32."""

    starts: Tensor
    latents: Tensor
    counts: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, dense: Tensor, lengths: Tensor) -> Counts:
        """Of counts [N, width] on any device and lengths [N]."""
        texts, latents = dense.nonzero(as_tuple=True)
        sizes = torch.bincount(texts, minlength=len(dense)).cpu()
        counts = dense[texts, latents].to(torch.int32)
        return cls(_starts(sizes), latents.to(torch.int32).cpu(), counts.cpu(), lengths.long().cpu())

    @classmethod
    def join(cls, parts: Sequence[Counts]) -> Counts:
        """One after another."""
        return cls(
            starts=_starts(torch.cat([each.starts.diff() for each in parts])),
            latents=torch.cat([each.latents for each in parts]),
            counts=torch.cat([each.counts for each in parts]),
            lengths=torch.cat([each.lengths for each in parts]),
        )


def _starts(sizes: Tensor) -> Tensor:
    return torch.cat((sizes.new_zeros(1), sizes.cumsum(0)))


@dataclass(frozen=True)
class Shard:
    """Counts of n triples.

    index [n] int64: their numbers in the data. keys [n] int64: what they say, by `pieces.key_of`. cut [n] uint8: how
    many responses were shortened. counts: one of each of COUNTED. Of a sample of response tokens: maxima [d_sae_out]
    int64, how many each latent is the largest of; looked [1] int64, how many there are; totals [d_in] int64, their
    residuals, summed in units of ROW_QUANTUM.
    """

    index: Tensor
    keys: Tensor
    cut: Tensor
    counts: dict[str, Counts]
    maxima: Tensor
    looked: Tensor
    totals: Tensor

    @classmethod
    def join(cls, parts: Sequence[Shard]) -> Shard:
        """One after another; samples are added up."""
        return cls(
            index=torch.cat([each.index for each in parts]),
            keys=torch.cat([each.keys for each in parts]),
            cut=torch.cat([each.cut for each in parts]),
            counts={name: Counts.join([each.counts[name] for each in parts]) for name in COUNTED},
            maxima=torch.stack([each.maxima for each in parts]).sum(dim=0),
            looked=torch.stack([each.looked for each in parts]).sum(dim=0),
            totals=torch.stack([each.totals for each in parts]).sum(dim=0),
        )

    def tensors(self) -> dict[str, Tensor]:
        """All of it, by the names in files."""
        sparse = {f"{name}.{field}": getattr(self.counts[name], field) for name in COUNTED for field in FIELDS}
        return sparse | {name: getattr(self, name) for name in OTHERS}

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> Shard:
        """What `tensors` gave."""
        counts = {name: Counts(**{field: tensors[f"{name}.{field}"] for field in FIELDS}) for name in COUNTED}
        return cls(counts=counts, **{name: tensors[name] for name in OTHERS})


FIELDS = tuple(Counts.__annotations__)
OTHERS = ("index", "keys", "cut", "maxima", "looked", "totals")
NAMES = (*(f"{name}.{field}" for name in COUNTED for field in FIELDS), *OTHERS)


@dataclass(frozen=True)
class Collection:
    """Counts of preference triples in a folder, whole or in the making.

    Raises `MapError` for a folder of other settings or data, and for files that are damaged.
    """

    folder: Path
    settings: CollectSettings

    @classmethod
    def start(cls, folder: str | Path | None, settings: CollectSettings) -> Collection:
        """A folder to collect in, new or begun with the same settings; for None one that is removed in the end."""
        self = cls(Path(mkdtemp(prefix="dspa-counts-") if folder is None else folder), settings)
        if folder is None:
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        path = self.folder / MANIFEST
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            advice = "accepted: a folder, a new one or one that was begun before"
            raise MapError(f"The folder of counts {folder} cannot be made ({error.strerror}); {advice}.") from error
        # Without a shard, nothing is lost with settings that were given up.
        if not path.exists() or not self._begun():
            write_atomically(path, json.dumps(asdict(settings), indent=2).encode())
        self._check(settings)
        return self

    def _begun(self) -> bool:
        return any(self.folder.glob("shard-*.safetensors"))

    def _check(self, settings: CollectSettings) -> None:
        mine, theirs = asdict(settings), _json(self.folder / MANIFEST)
        if differ := [name for name in mine if theirs.get(name) != mine[name]]:
            told = "; ".join(f"{name}: {theirs.get(name)!r} there, {mine[name]!r} now" for name in differ)
            raise MapError(f"{self.folder} holds shards of other settings ({told}). Use another folder.")

    @classmethod
    def open(cls, folder: str | Path) -> Collection:
        """A folder that was collected before."""
        path = Path(folder) / MANIFEST
        if not path.is_file():
            raise MapError(f"{folder} holds no counts (no {MANIFEST}). Make them: dspa map collect, or dspa.collect.")
        found = _json(path)
        if found.get("format") != FORMAT:
            raise MapError(f"{path} is of format {found.get('format')!r}; accepted: {FORMAT}. Collect again.")
        try:
            return cls(Path(folder), CollectSettings(**found))
        except TypeError as error:
            raise MapError(f"{path} is not what collect wrote ({error}). Collect into another folder.") from error

    @property
    def data(self) -> DataRecord | None:
        """The data, where they have been read to their end."""
        path = self.folder / DATA
        try:
            return DataRecord(**_json(path)) if path.is_file() else None
        except TypeError as error:
            raise MapError(f"{path} is not what collect wrote ({error}). Use another folder.") from error

    @property
    def n_triples(self) -> int:
        """Triples of the data. Raises `MapError` where they have not been read to their end."""
        return self._known().n_triples

    def _known(self) -> DataRecord:
        if (data := self.data) is None:
            raise MapError(self._incomplete("their data were not read to the end"))
        return data

    def _incomplete(self, state: str) -> str:
        return f"The counts in {self.folder} are not complete: {state}. Collect again: it goes on from there."

    def record(self, data: DataRecord) -> None:
        """Write down what the data are. Raises `MapError` where the folder is of other data."""
        known = self.data
        if known == data:
            return
        if known is not None and self._begun():
            raise MapError(
                f"{self.folder} holds shards of other data ({known.n_triples} triples of digest {known.digest} there, "
                f"{data.n_triples} of {data.digest} now). Use another folder; of triples that were added, collect the "
                "new ones alone and join the folders: dspa map merge."
            )
        write_atomically(self.folder / DATA, json.dumps(asdict(data), indent=2).encode())

    def path(self, piece: int) -> Path:
        """Where the shard of a piece is or will be."""
        return self.folder / f"shard-{piece:06d}.safetensors"

    def write(self, piece: int, digest: str, shard: Shard) -> None:
        """The shard of one piece, whose triples have this digest."""
        write_tensors(self.path(piece), shard.tensors(), {"format": FORMAT, "triples": digest})

    def has(self, piece: int, digest: str) -> bool:
        """Whether a piece has its shard. Raises `MapError` where that is damaged or of other triples."""
        path = self.path(piece)
        if not path.exists():
            return False
        self.read(path)
        if (theirs := read_header(path).get("triples")) != digest:
            raise MapError(
                f"{path} holds shards of other data (digest {theirs} there, {digest} now). Use another folder."
            )
        return True

    def read(self, path: Path) -> Shard:
        """One shard, its checksum tried."""
        try:
            return Shard.of(read_tensors(path, NAMES))
        except MapError as error:
            raise MapError(f"{error} Delete it and collect again: only its triples are counted.") from error

    def paths(self) -> list[Path]:
        """All shards of data that are known to their end.

        Raises `MapError` where some are missing.
        """
        found = set(self.folder.glob("shard-*.safetensors"))
        wanted = [self.path(piece) for piece in range(self._known().n_pieces)]
        if missing := len(set(wanted) - found):
            raise MapError(self._incomplete(f"{missing} of {len(wanted)} shards are missing"))
        return wanted

    def shards(self, *names: str) -> Iterator[dict[str, Tensor]]:
        """Of every shard some tensors, by their names in the file."""
        for path in self.paths():
            yield read_tensors(path, names, check=False)

    def triples(self) -> dict[str, Tensor]:
        """Of all triples in their order: tokens of prompt, chosen and rejected, and how many responses were cut; [N]
        each. Subsets can be chosen by it: `reduce(counts, subset=(counts.triples()["prompt"] < 500).nonzero())`."""
        names = ("index", *(f"{part}.lengths" for part in PARTS), "cut")
        found = list(self.shards(*names))
        order = torch.cat([each["index"] for each in found]).argsort()
        return {name.split(".")[0]: torch.cat([each[name] for each in found])[order] for name in names[1:]}

    def verify(self) -> None:
        """Raise `MapError` for a shard that is not what was written, or not of its place in the data."""
        paths, data = self.paths(), self._known()
        # Copies: a tensor of a file keeps all of it mapped.
        index = [self.read(path).index.clone() for path in paths]
        found = DataRecord.of(data.n_triples, [str(read_header(path).get("triples")) for path in paths])
        if found != data or not torch.equal(torch.cat(index).sort().values, torch.arange(data.n_triples)):
            raise MapError(
                f"The shards in {self.folder} are not those of its data: some were exchanged, or come from elsewhere. "
                "Collect again, into another folder."
            )


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise MapError(f"{path} is not what collect wrote ({error}). Use another folder.") from error
