"""Gemma Scope: `params.npz`."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dspa.data.lines import MOST_EXPANSION, SMALL
from dspa.errors import SAEError, refusal
from dspa.saes.formats.source import SAE_LENS_TENSORS, SourceSAE, check_names, read_file

GEMMA_SCOPE_WEIGHTS = "params.npz"


def read_gemma_scope(file: Path) -> SourceSAE:
    """Read a `params.npz`."""

    def arrays(path: Path) -> dict[str, Tensor]:
        with np.load(path, allow_pickle=False) as data:
            # Names and sizes before contents, which can be far larger than the file.
            check_names(str(path), [_renamed(name) for name in data.files], SAE_LENS_TENSORS["jumprelu"])
            _check_expansion(path, sum(entry.file_size for entry in data.zip.infolist()))
            return {_renamed(name): torch.from_numpy(data[name]) for name in data.files}

    tensors = read_file(file, arrays)
    return SourceSAE(str(file), "jumprelu", tensors, owned=True)


def _renamed(name: str) -> str:
    return re.sub("^w_", "W_", name)


def _check_expansion(file: Path, unpacked: int) -> None:
    size = file.stat().st_size
    if unpacked > MOST_EXPANSION * max(size, SMALL):
        got = f"{size} bytes that unpack to {unpacked}"
        raise refusal(SAEError, str(file), got, f"at most {MOST_EXPANSION} times as many", "Save it by numpy.savez.")
