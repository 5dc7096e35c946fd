"""Files that appear whole or not at all: safetensors with a JSON header, in which a checksum of the tensors stands."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dspa.errors import MapError

METADATA_KEY = "dspa"


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the values of all tensors, in their order."""
    sha = hashlib.sha256()
    for tensor in tensors.values():
        sha.update(tensor.numpy().tobytes())
    return sha.hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write CPU tensors and a header that JSON can hold."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    # Of several entries, safetensors writes any first; with one, the same content is the same file.
    write_atomically(path, save(tensors, metadata={METADATA_KEY: json.dumps({**header, "sha256": checksum(tensors)})}))


def read_header(path: Path) -> dict[str, Any]:
    """The header alone. Raises `MapError` for a file that is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            found = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
    except (SafetensorError, ValueError) as error:
        raise MapError(f"{path} is damaged ({error}).") from error
    return found if isinstance(found, dict) else {}


def read_tensors(path: Path, names: Sequence[str], *, check: bool = True) -> dict[str, Tensor]:
    """Some tensors; with `check`, `names` are all of them, in the order of their writing, and unchanged since.

    Raises `MapError` for a file that is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise MapError(f"{path} is damaged ({error}).") from error
    if check and read_header(path).get("sha256") != checksum(found):
        raise MapError(f"{path} is damaged (its tensors are not those that were written).")
    return found


def write_csv(path: Path, rows: Sequence[Mapping[str, object]], names: Sequence[str] = ()) -> None:
    """Write rows as CSV; `names` are the columns where there may be no row."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names or list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file. Where that fails, as on a full disk, what was there before stays."""
    # Of a name of its own, should another process write the same file.
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        problem = f"{path} ({len(content) / 1e6:.1f} MB) could not be written: {error.strerror}. Whatever was written"
        raise OSError(
            f"{problem} before is still there: make room or choose another folder, and start again."
        ) from error
    finally:
        if partial.is_file():
            partial.unlink()
