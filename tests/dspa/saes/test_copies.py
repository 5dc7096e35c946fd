"""How often an SAE's matrices are copied and transposed from the file to the first kernel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dspa.saes.frozen import FrozenSAE
from dspa_kernels import sparse_encode

from ..support.saes import D_IN, D_SAE
from .test_formats import dictionary_folder, gemma_scope, lens_folder


class MatrixCopies(TorchDispatchMode):
    """Records the operators that write a matrix of [d_in, d_sae] numbers into new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.clones = 0
        self.transposing: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and self.is_matrix(out):
            flat = [value for arg in args for value in (arg if isinstance(arg, (list, tuple)) else (arg,))]
            matrices = [value for value in flat if isinstance(value, Tensor) and self.is_matrix(value)]
            if all(out.untyped_storage().data_ptr() != matrix.untyped_storage().data_ptr() for matrix in matrices):
                self.clones += func.overloadpacket.__name__ == "clone"
                if any(matrix.is_contiguous() != out.is_contiguous() for matrix in matrices):
                    self.transposing.append(func.overloadpacket.__name__)
        return out

    @staticmethod
    def is_matrix(tensor: Tensor) -> bool:
        return tensor.is_floating_point() and tuple(tensor.shape) in {(D_IN, D_SAE), (D_SAE, D_IN)}


@pytest.mark.parametrize(
    ("write", "transposing", "clones"),
    [
        # W_dec is read from a mapped file, W_enc while it is transposed.
        (lens_folder, ["clone"], 2),
        (lambda folder: lens_folder(folder, "topk", k=5, rescale_acts_by_decoder_norm=True), ["clone"], 2),
        # Scaling writes the rows.
        (lambda folder: lens_folder(folder, "gated"), ["cat"], 1),
        (gemma_scope, ["clone"], 1),
        # Stored as rows of the encoder and columns of the decoder.
        (lambda folder: dictionary_folder(folder, "AutoEncoder"), ["clone"], 1),
        (lambda folder: dictionary_folder(folder, "GatedAutoEncoder"), ["clone"], 1),
    ],
    ids=["SAELens", "SAELens, folded", "SAELens, gated", "Gemma Scope", "dictionary_learning", "the same, gated"],
)
def test_a_matrix_is_transposed_once(
    h: Tensor, tmp_path: Path, write: Callable[[Path], Path], transposing: list[str], clones: int
) -> None:
    folder = write(tmp_path)
    with MatrixCopies() as copies:
        sae = FrozenSAE.load(folder)
        sparse_encode(h.flatten(0, 1), sae.weights, capacity=D_SAE, backend="reference")
        sae.decode(sae.encode(h), like=h)
    assert (copies.transposing, copies.clones) == (transposing, clones)
    assert sae.weights.encoder_rows.is_contiguous() and sae.weights.W_dec.is_contiguous()


@pytest.mark.parametrize("write", [lens_folder, lambda folder: lens_folder(folder, "gated")], ids=["plain", "gated"])
def test_a_file_that_changes_changes_no_sae(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    """safetensors maps the file into memory."""
    file = write(tmp_path) / "sae_weights.safetensors"
    sae = FrozenSAE.load(tmp_path)
    before = sae.W_enc.clone(), sae.b_enc.clone(), sae.threshold.clone(), sae.W_dec.clone(), sae.b_dec.clone()
    with file.open("r+b") as stream:
        stream.write(bytes(file.stat().st_size))
    after = sae.W_enc, sae.b_enc, sae.threshold, sae.W_dec, sae.b_dec
    assert all(map(Tensor.equal, before, after))
