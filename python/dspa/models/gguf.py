"""GGUF files: their weights dequantized by transformers, once, into an ordinary model folder in the cache."""

from __future__ import annotations

import json
import math
import shutil
import struct
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.integrations.gguf.reader import GgufHeader, read_gguf_metadata

from dspa.errors import listed, refusal
from dspa.files import cache_folder, file_sha256, writing_cache
from dspa.models.places import ModelPlace, reading_model
from dspa.outputs import new_folder
from dspa.schemas import read_json

# Written last, next to the files of a converted model: what they were made from, and their checksums.
RECORD = "conversion.json"


def weights_dtype(path: Path) -> torch.dtype:
    """Return the dtype that `dtype="auto"` means for a GGUF file: its own, or bfloat16 where it is quantized.

    Args:
        path: the file.

    Raises:
        ValueError: the file is damaged.
    """
    return _header(path).dtype or torch.bfloat16


def converted_folder(path: Path, dtype: str = "auto") -> Path:
    """Return the folder of a GGUF file's model in the cache, after its conversion if it is not there.

    Warns of the memory that the dequantized weights take. Several processes may call this at the same time.

    Args:
        path: the GGUF file.
        dtype: name of the dtype of the weights; "auto": as `weights_dtype`.

    Raises:
        ValueError: a file that is damaged, has no tokenizer, or that transformers cannot convert.
        OSError: the cache cannot be written.
    """
    header = _header(path)
    dtype = str(weights_dtype(path)).removeprefix("torch.") if dtype == "auto" else dtype
    size = sum(math.prod(tensor.shape) for tensor in header.tensors) * getattr(torch, dtype).itemsize
    # All that the result depends on. A name, a size or a date is no proof of what is in a file.
    made_from = {"sha256": file_sha256(path), "dtype": dtype}
    made_from |= {package: version(package) for package in ("transformers", "gguf")}
    folder = cache_folder() / "gguf" / "-".join([path.stem, made_from["sha256"][:16], *list(made_from.values())[1:]])
    memory = f"The weights in {path.name} ({path.stat().st_size / 1e6:,.1f} MB) are dequantized: in {dtype} they take "
    memory += f"{size / 1e6:,.1f} MB of memory."
    with writing_cache(folder, size):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if _is_whole(folder, made_from):
                warnings.warn(f"{memory} They are in {folder}.", stacklevel=3)
                return folder
            warnings.warn(f"{memory} They are converted once, into {folder}.", stacklevel=3)
            _convert(path, folder, made_from)
    return folder


def _header(path: Path) -> GgufHeader:
    """Read the architecture and the list of tensors of a GGUF file, of which all data must be there."""
    accepted = "a whole GGUF file of version 2 or 3"
    try:
        header = GgufHeader.from_file(str(path))
    except (ValueError, KeyError, IndexError, struct.error) as error:
        raise refusal(ValueError, "`model`", f"{path}, which cannot be read ({error})", accepted) from error
    end = header.data_start + max((tensor.offset + tensor.nbytes for tensor in header.tensors), default=0)
    if path.stat().st_size < end:
        got = f"{path}, which has {path.stat().st_size} of at least {end} bytes"
        raise refusal(ValueError, "`model`", got, accepted, "Download it again.")
    return header


def _is_whole(folder: Path, made_from: dict[str, str]) -> bool:
    """Return True if a converted model is in `folder` with the files that were written, and no others."""
    try:
        record = read_json(folder / RECORD, ValueError)
        files = {path.name: file_sha256(path) for path in folder.iterdir() if path.name != RECORD}
    except (OSError, ValueError):
        files = record = {}
    if record == {"made_from": made_from, "files": files}:
        return True
    if folder.exists():
        warnings.warn(f"{folder} is damaged, or was changed since it was converted.", stacklevel=4)
    return False


def _convert(path: Path, folder: Path, made_from: dict[str, str]) -> None:
    """Write `folder`, which appears when it is complete."""
    model, tokenizer = _dequantized(path, made_from["dtype"])
    with new_folder(folder) as made:
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        files = {path.name: file_sha256(path) for path in made.iterdir()}
        (made / RECORD).write_text(json.dumps({"made_from": made_from, "files": files}), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)


def _dequantized(path: Path, dtype: str) -> tuple[Any, Any]:
    """Return the model and the tokenizer in a GGUF file."""
    if "tokenizer.ggml.model" not in read_gguf_metadata(str(path))[0]:
        accepted, advice = "a GGUF file with a tokenizer", "Convert the model again, together with its tokenizer."
        raise refusal(ValueError, "`model`", f"{path}, a GGUF file without a tokenizer", accepted, advice)
    place = ModelPlace(str(path.parent), path.name)
    options: dict[str, Any] = {**place.arguments}
    with reading_model(place):
        tokenizer = AutoTokenizer.from_pretrained(place.name, **options, trust_remote_code=False)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            place.name,
            **options,
            trust_remote_code=False,
            dtype=dtype,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
        # It would give these random weights.
        if absent := sorted(loaded[1]["missing_keys"]):
            raise KeyError(f"it has no {listed(absent, 3)}")
    return loaded[0], tokenizer
