"""Gemma Scope: `params.npz`."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dspa.archives import check_archive
from dspa.errors import SAEError
from dspa.saes.formats.source import SAE_LENS_TENSORS, SourceSAE, check_names, read_file

GEMMA_SCOPE_WEIGHTS = "params.npz"


def read_gemma_scope(file: Path) -> SourceSAE:
    """Read a `params.npz`."""

    def arrays(path: Path) -> dict[str, Tensor]:
        with np.load(path, allow_pickle=False) as data:
            # Names and sizes before contents, which can be far larger than the file.
            check_names(str(path), [_renamed(name) for name in data.files], SAE_LENS_TENSORS["jumprelu"])
            check_archive(path, SAEError, "Save it by numpy.savez.")
            return {_renamed(name): torch.from_numpy(data[name]) for name in data.files}

    tensors = read_file(file, arrays)
    return SourceSAE(str(file), "jumprelu", tensors, owned=True)


def _renamed(name: str) -> str:
    return re.sub("^w_", "W_", name)
