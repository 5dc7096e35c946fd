"""A folder of counts: a manifest, one shard per piece of the data, and a record of the data once they are known."""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import gettempdir
from typing import Any, TypeVar

import torch
from torch import Tensor

from dspa.costs import COSTS, Costs, Measured
from dspa.data.triples import digest_of_keys
from dspa.errors import MapError, refusal
from dspa.files import read_header, read_tensors, write_tensors
from dspa.maps.cdmap import Promoted
from dspa.maps.pieces import DataRecord
from dspa.maps.shards import FORMAT, NAMES, PARTS, Shard
from dspa.models.sources import Source
from dspa.outputs import try_folder, workspace, write_atomically
from dspa.schemas import Count, Day, PositiveInt, Text, check, read_json, schema

T = TypeVar("T")

MANIFEST, DATA, SOURCES, TOKENS = "manifest.json", "data.json", "sources.json", "tokens.json"
MEASURED = "measured.json"
SHARD = re.compile(r"shard-([0-9]{6}|[1-9][0-9]{6,})\.safetensors")
FOLDER = "The folder of counts"
# Settings of folders whose manifest does not name them.
EARLIER = {"boundary": "apart"}
OTHER = "Use another folder."
# Settings that a folder records and that may differ when a collection goes on.
RECORDED = ("attention", "neuronpedia_out")
# Settings that are not compared where one of both is empty.
UNKNOWN = ("model_digest",)


@schema
class CollectSettings:
    """All that the counts of given triples depend on.

    Attributes:
        model_name: name of the model.
        sae_in, sae_out: fingerprints of the SAEs.
        layer_in, layer_out: their layers.
        d_sae_in, d_sae_out: their widths.
        dtypes: of the model and the two SAEs.
        max_length: tokens to which prompt and response together are cut.
        tokenizer: digest of the tokenizer's behaviour.
        boundary: rule of the place where a text's prompt ends, as `tokens.BOUNDARY`.
        chat_template_kwargs: values of the chat template's variables by name, or None.
        template_date: date that the chat template writes, as `2026-03-01`, or None where it writes none.
        neuronpedia_out: `FrozenSAE.neuronpedia_place` of the output SAE; empty in folders of earlier versions. The
            counts do not depend on it, so it is recorded and not compared.
        format: format of the shards.
        model_digest: digest of the model's weights, by `dspa.models.sources.model_digest`. Empty in folders of earlier
            versions and where weights are offloaded. It is then not compared.
        attention: names of the implementations that computed attention, joined by commas; empty in folders of earlier
            versions. Those of one function differ in rounding alone, so this is recorded and not compared.
    """

    model_name: Text
    sae_in: Text
    sae_out: Text
    layer_in: Count
    layer_out: Count
    d_sae_in: PositiveInt
    d_sae_out: PositiveInt
    dtypes: Text
    max_length: PositiveInt | None
    tokenizer: Text
    boundary: Text = "apart"
    chat_template_kwargs: dict[Text, Any] | None = None
    template_date: Day | None = None
    neuronpedia_out: Text = ""
    format: Text = FORMAT
    attention: Text = ""
    model_digest: Text = ""


@dataclass(frozen=True)
class Collection:
    """Counts of preference triples in a folder, complete or in the making.

    Methods raise `MapError` for a folder of other settings or data, and for damaged files.

    Attributes:
        folder: path of the folder.
        settings: all that the counts of given triples depend on.
    """

    folder: Path
    settings: CollectSettings

    @classmethod
    def start(
        cls, folder: str | Path | None, settings: CollectSettings, sources: Mapping[str, Source] | None = None
    ) -> Collection:
        """Open a folder to collect in, new or begun with the same settings.

        The chat template writes the date on which the folder was begun, also for those who continue on another day.

        Args:
            folder: its path. None makes a temporary folder, which is removed with the collection.
            settings: all that the counts of given triples depend on.
            sources: where model and SAEs were loaded from, on which the counts do not depend.

        Raises:
            MapError: the folder holds shards of other settings, or files of something else.
        """
        with ExitStack() as stack:
            place = stack.enter_context(workspace(Path(gettempdir()))) / "counts" if folder is None else Path(folder)
            _check_ours(place)
            self = cls._begin(place, settings, sources)
            # Where the folder is temporary, it goes with the collection.
            weakref.finalize(self, stack.pop_all().close)
        return self

    @classmethod
    def _begin(cls, place: Path, settings: CollectSettings, sources: Mapping[str, Source] | None) -> Collection:
        path = place / MANIFEST
        if settings.template_date is not None and path.exists():
            begun = replace(settings, template_date=_read_json(path).get("template_date"))
            settings = settings if _differing(path, begun) else begun
        self = cls(place, settings)
        self.folder.mkdir(parents=True, exist_ok=True)
        # Without a shard, nothing is lost with earlier settings.
        if not path.exists() or not self.has_shards:
            write_atomically(path, json.dumps(asdict(settings), indent=2).encode())
            for name in (TOKENS, MEASURED, COSTS):
                (self.folder / name).unlink(missing_ok=True)
        self.check_settings(settings)
        if sources and sources != self.sources:
            record = {name: asdict(source) for name, source in sources.items()}
            write_atomically(self.folder / SOURCES, json.dumps(record, indent=2).encode())
        return self

    @staticmethod
    def check_free(folder: Path) -> None:
        """Raise `MapError` for a folder in which counts cannot be collected, or in which another process does it.

        Args:
            folder: a folder, there or not. It is neither made nor changed.
        """
        _check_ours(folder)
        try_folder(folder, FOLDER, MapError)

    def check_settings(self, settings: CollectSettings) -> None:
        """Raise `MapError` unless the manifest of the folder holds these settings."""
        if differing := _differing(self.folder / MANIFEST, settings):
            raise MapError(
                f"{self.folder} holds shards of other settings ({'; '.join(differing)}). Use another folder."
            )

    @classmethod
    def open(cls, folder: str | Path) -> Collection:
        """Open a folder that was collected before.

        Args:
            folder: its path.

        Raises:
            MapError: a folder without counts, of another format, or damaged.
        """
        path = Path(folder) / MANIFEST
        if not path.is_file():
            raise MapError(f"{folder} holds no counts (no {MANIFEST}). Make them: dspa map collect, or dspa.collect.")
        manifest = _read_json(path)
        if manifest.get("format") != FORMAT:
            raise refusal(MapError, str(path), f"of format {manifest.get('format')!r}", FORMAT, "Collect again.")
        return cls(Path(folder), check(CollectSettings, manifest, MapError, str(path), OTHER))

    @property
    def sources(self) -> dict[str, Source]:
        """Where model and SAEs were last loaded from, as far as that is known; as for `ConditionalDifferenceMap`."""
        path = self.folder / SOURCES
        return _read(dict[Text, Source], path, "Delete it.") if path.is_file() else {}

    @property
    def promoted(self) -> dict[str, dict[int, list[str]]]:
        """The tokens that all latents of "sae_in" and "sae_out" promote; empty in folders of earlier versions."""
        path = self.folder / TOKENS
        promoted: dict[str, dict[int, list[str]]] = _read(Promoted, path, "Delete it.") if path.is_file() else {}
        widths = {"sae_in": self.settings.d_sae_in, "sae_out": self.settings.d_sae_out}
        for name, tokens in promoted.items():
            if sorted(tokens) != list(range(widths.get(name, 0))):
                got, accepted = f"{len(tokens)} latents of {name!r}", "all latents of sae_in and sae_out"
                raise refusal(MapError, str(path), got, accepted, "Delete it.")
        return promoted

    def record_promoted(self, promoted: Mapping[str, Mapping[int, list[str]]]) -> None:
        """Write the tokens that latents promote, which a model is needed for, so that all maps of the counts have them.

        Args:
            promoted: as `promoted`.
        """
        write_atomically(self.folder / TOKENS, json.dumps(promoted).encode())

    @property
    def measured(self) -> Measured | None:
        """Time and memory that collecting took so far; None in a new folder, and in one of an earlier version."""
        path = self.folder / MEASURED
        return _read(Measured, path, "Delete it.") if path.is_file() else None

    def record_measured(self, measured: Measured) -> None:
        """Write what collecting took so far."""
        write_atomically(self.folder / MEASURED, json.dumps(asdict(measured)).encode())

    @property
    def costs(self) -> Costs | None:
        """Costs of the counts; None where they are not complete, and in folders of earlier versions or merged ones."""
        path = self.folder / COSTS
        return _read(Costs, path, "Delete it.") if path.is_file() else None

    def record_costs(self, costs: Costs) -> None:
        """Write the costs of the counts."""
        write_atomically(self.folder / COSTS, json.dumps(asdict(costs), indent=2).encode())

    @property
    def has_shards(self) -> bool:
        """True where something was counted."""
        return any(self.folder.glob("shard-*.safetensors"))

    @property
    def data(self) -> DataRecord | None:
        """Record of the data, or None where they have not been read to their end."""
        path = self.folder / DATA
        return _read(DataRecord, path, OTHER) if path.is_file() else None

    @property
    def n_triples(self) -> int:
        """Number of triples in the data.

        Raises:
            MapError: the data have not been read to their end.
        """
        return self._require_data().n_triples

    def _require_data(self) -> DataRecord:
        if (data := self.data) is None:
            raise self._incomplete("their data were not read to the end")
        return data

    def _incomplete(self, state: str) -> MapError:
        advice = "Collect again: it continues from there."
        return MapError(f"The counts in {self.folder} are not complete: {state}. {advice}")

    def record(self, data: DataRecord) -> None:
        """Write the record of the data.

        Args:
            data: the record.

        Raises:
            MapError: the folder holds shards of other data.
        """
        recorded = self.data
        if recorded == data:
            return
        if recorded is not None and self.has_shards:
            raise MapError(
                f"{self.folder} holds shards of other data ({recorded.n_triples} triples of digest {recorded.digest} "
                f"there, {data.n_triples} of {data.digest} now). Use another folder. Where triples were added, collect "
                "only the new ones and join the folders: dspa map merge."
            )
        write_atomically(self.folder / DATA, json.dumps(asdict(data), indent=2).encode())

    def path(self, piece: int) -> Path:
        """Return the path of a piece's shard, written or not."""
        return self.folder / f"shard-{piece:06d}.safetensors"

    def write(self, piece: int, digest: str, shard: Shard) -> None:
        """Write the shard of one piece, whose triples have this digest."""
        write_tensors(self.path(piece), shard.tensors(), {"format": FORMAT, "triples": digest})

    def has(self, piece: int, digest: str) -> bool:
        """Return True where the shard of a piece is there.

        Args:
            piece: number of the piece.
            digest: of its triples.

        Raises:
            MapError: the shard is damaged or of other triples.
        """
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
        """Return one shard, whose checksum and numbers are verified."""
        try:
            shard = Shard.of(read_tensors(path, NAMES, read_header(path)))
            shard.check(str(path), self.settings.d_sae_in, self.settings.d_sae_out)
            return shard
        except MapError as error:
            raise MapError(f"{error} Delete it and collect again: only its triples are counted again.") from error

    def paths(self) -> list[Path]:
        """Return the paths of all shards, in order.

        Raises:
            MapError: the data have not been read to their end, or shards are missing.
        """
        n_pieces = self._require_data().n_pieces
        names = (SHARD.fullmatch(path.name) for path in self.folder.iterdir())
        # Those that are there, however many a record says.
        pieces = sorted(piece for piece in (int(name[1]) for name in names if name) if piece < n_pieces)
        if n_missing := n_pieces - len(pieces):
            raise self._incomplete(f"{n_missing} of {n_pieces} shards are missing")
        return [self.path(piece) for piece in pieces]

    def shards(self, *names: str) -> Iterator[dict[str, Tensor]]:
        """Yield, for every shard, some of its tensors by their names in the file."""
        for path in self.paths():
            yield read_tensors(path, names)

    def triples(self) -> dict[str, Tensor]:
        """Return, for all triples in their order, the tokens of each part and the number of responses that were cut.

        Subsets can be chosen by them: `reduce(counts, subset=(counts.triples()["prompt"] < 500).nonzero())`.

        Returns:
            "prompt", "chosen", "rejected" and "cut", [N] each.
        """
        names = ("index", *(f"{part}.lengths" for part in PARTS), "cut")
        shards = list(self.shards(*names))
        order = torch.cat([shard["index"] for shard in shards]).argsort()
        return {name.split(".")[0]: torch.cat([shard[name] for shard in shards])[order] for name in names[1:]}

    def triples_digest(self) -> str:
        """Return the digest of the triples by `dspa.data.triples.digest_of_keys`."""
        return digest_of_keys(key for shard in self.shards("keys") for key in shard["keys"].tolist())

    def verify(self) -> None:
        """Raise `MapError` for a shard that is not what was written, or not of its place in the data."""
        paths, data = self.paths(), self._require_data()
        index = [self.read(path).index for path in paths]
        record = DataRecord.of(data.n_triples, [str(read_header(path).get("triples")) for path in paths])
        if record != data or not torch.equal(torch.cat(index).sort().values, torch.arange(data.n_triples)):
            raise MapError(
                f"The shards in {self.folder} are not those of its data: some were exchanged, or come from elsewhere. "
                "Collect again, into another folder."
            )


def _differing(manifest: Path, settings: CollectSettings) -> list[str]:
    """Return how a manifest differs from settings, one text per setting."""
    mine, theirs = asdict(settings), EARLIER | _read_json(manifest)
    unknown = [name for name in UNKNOWN if not (mine[name] and theirs.get(name))]
    differing = [name for name in mine if name not in (*RECORDED, *unknown) and theirs.get(name) != mine[name]]
    return [f"{name}: {theirs.get(name)!r} there, {mine[name]!r} now" for name in differing]


def _check_ours(folder: Path) -> None:
    """Raise `MapError` for a folder in which files of something else would be replaced."""
    manifest, accepted = folder / MANIFEST, "a new folder, or one in which a collection was begun"
    if manifest.exists():
        if not str(_read_json(manifest).get("format")).startswith(FORMAT.rstrip("0123456789")):
            got = f"{folder}, whose {MANIFEST} is of something else"
            raise refusal(MapError, FOLDER, got, accepted, "Name another.")
        return
    patterns = (DATA, SOURCES, TOKENS, MEASURED, COSTS, "shard-*.safetensors")
    if names := sorted(path.name for pattern in patterns for path in folder.glob(pattern)):
        got = f"{folder}, which holds {', '.join(names[:4])} and no {MANIFEST}"
        raise refusal(MapError, FOLDER, got, accepted, "Name another.")


def _read_json(path: Path) -> dict[str, Any]:
    return _read(dict[str, Any], path, OTHER)


def _read(kind: type[T], path: Path, advice: str) -> T:
    return check(kind, read_json(path, MapError, advice), MapError, f"{path}, which collect did not write so,", advice)
