"""Files of tensors, safetensors with a JSON header that holds a checksum of them, and files of rows, as CSV."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from dspa.errors import MapError
from dspa.outputs import replacing, write_atomically
from dspa.schemas import check, parse_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

E = TypeVar("E", bound=Exception)
T = TypeVar("T")

METADATA_KEY = "dspa"
# The entry of a record which covers the others.
SEAL = "seal"
AGAIN = "Copy it again from where it was made."
# By bytes per number, to read the bits of dtypes that NumPy does not have, such as bfloat16.
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def cache_folder() -> Path:
    """Return the folder for what can be made or fetched again: $DSPA_CACHE, $XDG_CACHE_HOME/dspa or ~/.cache/dspa."""
    if given := os.environ.get("DSPA_CACHE"):
        return Path(given).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "dspa"


@contextmanager
def writing_cache(path: Path, size: int) -> Iterator[None]:
    """Say what to do where a file or folder in the cache cannot be written.

    Args:
        path: what is written.
        size: bytes that it takes.

    Raises:
        OSError: it cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{path} ({size / 1e6:,.1f} MB) could not be written: {error}. Make room, or set DSPA_CACHE to another "
            "folder, then start again."
        ) from error


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, with a bar if it takes more than two seconds."""
    sha, size = hashlib.sha256(), path.stat().st_size
    with (
        path.open("rb") as file,
        tqdm(total=size, unit="B", unit_scale=True, desc="check", delay=2, leave=False) as bar,
    ):
        while block := file.read(1 << 22):
            sha.update(block)
            bar.update(len(block))
    return sha.hexdigest()


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the values of all tensors, in their order."""
    sha = hashlib.sha256()
    for tensor in tensors.values():
        sha.update(tensor.view(INTEGERS[tensor.element_size()]).numpy().tobytes())
    return sha.hexdigest()


def digest_of(content: object) -> str:
    """Return 16 hexadecimal digits that identify what JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record with a digest of its entries, by which `check_seal` sees an edit. It does not show who sealed."""
    # As JSON reads them again: keys that are numbers become text.
    text = json.dumps({name: value for name, value in record.items() if name != SEAL})
    claimed = parse_json(text, ValueError, "the record")
    return {**claimed, SEAL: digest_of(claimed)}


def check_seal(record: Mapping[str, Any], error: type[E], what: str, advice: str) -> None:
    """Raise `error` for a record that is not as it was sealed. One of an earlier version has no seal.

    Args:
        record: the record, with or without a seal.
        error: class of the error.
        what: name of the record in the message.
        advice: what to do, as a whole sentence.
    """
    if record.get(SEAL, "") not in ("", sealed(record)[SEAL]):
        raise error(f"{what} was changed after it was written: its seal does not fit it. {advice}")


def warn_unsealed(record: Mapping[str, Any], path: Path, again: str) -> None:
    """Warn of a record without a seal, in which a fingerprint could be edited.

    Args:
        record: the record.
        path: its file.
        again: how to write it again, as the end of a sentence.
    """
    if not record.get(SEAL):
        warnings.warn(
            f"{path} is of an earlier version, or its seal was removed: nothing shows that the fingerprints in it are "
            f"as they were written. If you are sure that they are, {again}.",
            stacklevel=3,
        )


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write a safetensors file.

    Args:
        path: file to write.
        tensors: CPU tensors by name.
        header: entries that JSON can hold.

    Raises:
        OSError: the file cannot be written.
    """
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    # One metadata entry, because safetensors does not fix the order of several: the same content is the same file.
    record = json.dumps(sealed({**header, "sha256": checksum(tensors)}))
    write_atomically(path, save(tensors, metadata={METADATA_KEY: record}))


def read_header(path: Path) -> dict[str, Any]:
    """Return the header that `write_tensors` wrote, without reading the tensors.

    Args:
        path: file to read.

    Raises:
        MapError: the file is damaged, or its header was edited.
    """
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA_KEY, "{}")
    except SafetensorError as error:
        raise MapError(f"{path} is damaged ({error}).") from error
    header = parse_json(text, MapError, f"{path} is damaged: its header")
    if not isinstance(header, dict):
        return {}
    check_seal(header, MapError, f"The header of {path}", AGAIN)
    return header


def read_tensors(path: Path, names: Sequence[str], header: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """Return tensors of a file by name. They are copies, which stay what they are whatever happens to the file.

    Args:
        path: file to read.
        names: tensors to read; with `header`, all of them in the order in which they were written.
        header: what `read_header` returned, whose checksum is compared with that of the copies.

    Raises:
        MapError: the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            # The file is mapped: a view of it would change with it.
            tensors = {name: file.get_tensor(name).clone() for name in names}
    except SafetensorError as error:
        raise MapError(f"{path} is damaged ({error}).") from error
    if header is not None and header.get("sha256") != checksum(tensors):
        raise MapError(f"{path} is damaged (its tensors are not those that were written).")
    return tensors


def read_sealed(
    path: Path, record: type[T], names: Sequence[str], error: type[Exception], what: str, format_: str
) -> tuple[T, dict[str, Tensor]]:
    """Return the header of a file that has always been sealed, checked by its schema, and its tensors.

    Args:
        path: file to read.
        record: schema of the header.
        names: all tensors, in the order in which they were written.
        error: class of errors.
        what: what the file holds, and what wrote it, as in "persona, which dspa personal make writes".
        format_: its format.

    Raises:
        error: there is no such file, or it is of another format, damaged, or was edited.
    """
    if not path.is_file():
        raise error(f"There is no file at {path}; accepted: a {what}.")
    try:
        header = read_header(path)
        if header.get("format") != format_:
            kind = what.partition(",")[0]
            raise error(f"{path} is not a {kind} of format {format_} (it says {header.get('format')!r}).")
        checked = check(record, header, error, f"{path} is damaged", AGAIN)
        if not header.get(SEAL):
            raise error(f"The header of {path} was changed after it was written: it has no seal. {AGAIN}")
        return checked, read_tensors(path, names, header)
    except MapError as damage:
        raise error(str(damage)) from damage


def write_csv(path: Path, rows: Sequence[Mapping[str, object]], names: Sequence[str] = ()) -> None:
    """Write rows as CSV.

    Args:
        path: file to write.
        rows: values by column.
        names: columns, needed where there may be no row.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names or list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def write_figure(path: Path, figure: Figure) -> None:
    """Write a figure as PNG, whatever the ending of `path`."""
    with replacing(path) as made:
        figure.savefig(made, dpi=150, format="png")
