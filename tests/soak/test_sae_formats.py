"""Damaged files of every format of SAEs are refused by `SAEError`, or read as an SAE that encodes to finite latents."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dspa.errors import SAEError
from dspa.saes.formats import read_sae
from dspa.saes.frozen import FrozenSAE

from ..dspa.saes.formats import test_gemma_scope_2 as gemma_scope_2
from ..dspa.saes.formats import test_goodfire as goodfire
from ..dspa.saes.formats import test_llama_scope as llama_scope
from ..dspa.saes.formats import test_llama_scope_r1 as llama_scope_r1
from ..dspa.saes.formats import test_openai as openai
from ..dspa.saes.formats import test_qwen_scope as qwen_scope
from ..dspa.saes.formats import test_sparsify as sparsify
from ..dspa.saes.test_formats import dictionary_folder, gemma_scope, trainer_config
from .mutations import damaged_bytes, damaged_json, damaged_tensors
from .test_readers import damage, fuzz


def saved(folder: Path, state: dict[str, Any]) -> None:
    torch.save(state, folder / "sae.pt")


WRITERS: dict[str, Callable[[Path], object]] = {
    "gemma_scope": gemma_scope,
    "gemma_scope_2": lambda folder: gemma_scope_2.write(folder, gemma_scope_2.weights(), gemma_scope_2.RESIDUAL),
    "gemma_scope_2_affine": lambda folder: gemma_scope_2.write(
        folder, gemma_scope_2.weights(affine=True), gemma_scope_2.TRANSCODER | {"affine_connection": True}
    ),
    "goodfire": lambda folder: saved(folder, goodfire.SparseAutoEncoder().state_dict()),
    "llama_scope": lambda folder: llama_scope.write(folder, llama_scope.weights()),
    "llama_scope_r1": lambda folder: llama_scope_r1.write(folder, llama_scope_r1.weights()),
    "matryoshka": lambda folder: dictionary_folder(
        folder, "MatryoshkaBatchTopKSAE", trainer_config("MatryoshkaBatchTopKSAE")
    ),
    "openai": lambda folder: saved(folder, openai.state(openai.TOPK)),
    "openai_tied": lambda folder: saved(folder, openai.state(openai.RELU, tied=True)),
    "qwen_scope": qwen_scope.write,
    "sparsify": lambda folder: sparsify.write(folder, sparsify.weights()),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid folder of every format."""
    folder = tmp_path_factory.mktemp("formats")
    for name, write in WRITERS.items():
        (folder / name).mkdir()
        write(folder / name)
        read_sae(folder / name, k=4 if name == "qwen_scope" else None)
    return folder


def damage_state(data: st.DataObject, file: Path) -> None:
    """Write a `.pt` file with damaged tensors, or with a damaged setting in it."""
    state = torch.load(file, weights_only=True)
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    settings = {name: value for name, value in state.items() if name not in tensors}
    if settings and data.draw(st.booleans()):
        settings = data.draw(damaged_json(settings))
    else:
        tensors = data.draw(damaged_tensors(tensors))
    torch.save(tensors | settings if isinstance(settings, dict) else settings, file)


@fuzz
@given(data=st.data())
def test_formats(folder, done, data):
    name = data.draw(st.sampled_from(sorted(WRITERS)))
    done["damaged files: formats of SAEs"] += 1
    damaged = folder / "damaged" / name
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(folder / name, damaged)
    file = data.draw(st.sampled_from(sorted(path for path in damaged.rglob("*") if path.is_file())))
    if file.suffix in (".json", ".safetensors"):
        damage(data, file)
    elif file.suffix == ".pt" and data.draw(st.booleans()):
        damage_state(data, file)
    else:
        file.write_bytes(data.draw(damaged_bytes(file.read_bytes())))
    try:
        sae = FrozenSAE.load(damaged, k=4 if name == "qwen_scope" else None)
    except SAEError:
        return
    f = sae.encode(torch.ones(1, sae.d_in, dtype=sae.W_enc.dtype))
    assert f.shape == (1, sae.d_sae) and f.isfinite().all()
