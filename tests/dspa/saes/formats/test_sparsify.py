"""EleutherAI's sparsify, by its formula and by the package itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dspa.errors import SAEError
from dspa.saes.formats import read_sae
from dspa.saes.frozen import FrozenSAE

from ...support.saes import D_IN, D_SAE, K, close, decoded_rounding, tensors
from ...support.sources import close_output, latents

CONFIG = {
    "activation": "topk",
    "expansion_factor": 32,
    "normalize_decoder": True,
    "num_latents": D_SAE,
    "k": K,
    "multi_topk": False,
    "skip_connection": False,
    "transcode": False,
    "d_in": D_IN,
}


def weights(*, skip: bool = False) -> dict[str, Tensor]:
    """The tensors of a file, by the maker's names."""
    t = tensors()
    stored = {"encoder.weight": t["W_enc"].T.contiguous(), "encoder.bias": t["b_enc"]}
    stored |= {"W_dec": t["W_dec"], "b_dec": t["b_dec"]}
    return stored | {"W_skip": torch.randn(D_IN, D_IN, generator=torch.Generator().manual_seed(3))} if skip else stored


def write(folder: Path, stored: dict[str, Tensor], **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(stored, folder / "sae.safetensors")
    config = {name: value for name, value in (CONFIG | changes).items() if value is not None}
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def topk(x: Tensor) -> Tensor:
    t = tensors()
    pre = (x @ t["W_enc"] + t["b_enc"]).relu()
    top = pre.topk(K)
    return torch.zeros_like(pre).scatter_(-1, top.indices, top.values)


@pytest.mark.parametrize("name", ["", "cfg.json", "sae.safetensors"])
def test_sae(h: Tensor, tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model": "EleutherAI/pythia-160m", "sae": {}, "batch_size": 8}))
    sae = FrozenSAE.load(write(tmp_path / "layers.6", weights()) / name)
    b_dec, W_dec = tensors()["b_dec"], tensors()["W_dec"]
    expected = topk(h - b_dec)
    close(sae.encode(h), expected)
    atol = decoded_rounding(expected, W_dec)
    torch.testing.assert_close(sae.decode(expected), expected @ W_dec + b_dec, rtol=0, atol=atol)
    assert (sae.layer, sae.model_name, sae.hook_name) == (6, "EleutherAI/pythia-160m", "layers.6")


@pytest.mark.parametrize("skip", [False, True])
def test_transcoder(h: Tensor, tmp_path: Path, skip: bool) -> None:
    """The bias of the decoder is not taken off the input, which is of another place."""
    stored = weights(skip=skip)
    source = read_sae(write(tmp_path / "layers.6.mlp", stored, transcode=True, skip_connection=skip))
    expected = topk(h) @ stored["W_dec"] + stored["b_dec"]
    close_output(source, h, expected + h @ stored["W_skip"].T if skip else expected)
    assert source.transcoder and (source.layer, source.hook_name, source.hook_name_out) == (None, *2 * ["layers.6.mlp"])


def test_transcoder_of_an_early_version(h: Tensor, tmp_path: Path) -> None:
    """It was named in the configuration of the training alone, and the bias was taken off the input."""
    (tmp_path / "config.json").write_text(json.dumps({"transcode": True}))
    sae = FrozenSAE.load(write(tmp_path / "layers.6.mlp", weights(), transcode=None, activation=None))
    close(sae.encode(h), topk(h - tensors()["b_dec"]))
    assert sae.transcoder and sae.folded == ("apply_b_dec_to_input",)


@pytest.mark.parametrize(
    ("folder", "hook", "layer"),
    [
        ("layers.6/seed1", "layers.6", 6),
        ("gpt_neox.layers.3", "gpt_neox.layers.3", 3),
        ("layers.6.mlp", "layers.6.mlp", None),
        ("embed_tokens", "embed_tokens", None),
        ("downloaded", None, None),
    ],
)
def test_the_folder_names_the_module(tmp_path: Path, folder: str, hook: str | None, layer: int | None) -> None:
    source = read_sae(write(tmp_path / folder, weights()))
    assert (source.hook_name, source.layer, source.transcoder) == (hook, layer, False)


@pytest.mark.parametrize(("transcode", "skip"), [(False, False), (True, False), (True, True)])
def test_against_the_package(
    h: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transcode: bool, skip: bool
) -> None:
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "1")
    sparsify = pytest.importorskip("sparsify", reason="needs the package eai-sparsify", exc_type=ImportError)
    config = sparsify.SparseCoderConfig(num_latents=D_SAE, k=K, transcode=transcode, skip_connection=skip)
    theirs = sparsify.SparseCoder(D_IN, config)
    theirs.load_state_dict(weights(skip=skip))
    theirs.save_to_disk(tmp_path / "layers.6")
    x = h.flatten(0, 1)
    with torch.no_grad():
        f = theirs.encode(x)
        dense = torch.zeros(len(x), D_SAE).scatter_(-1, f.top_indices, f.top_acts)
        out = theirs(x).sae_out
    source = read_sae(tmp_path / "layers.6")
    close(latents(source, x), dense)
    close_output(source, x, out)
    close(FrozenSAE.load(tmp_path / "layers.6").encode(x), dense)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "groupmax"}, "`activation` is 'groupmax'; accepted: topk"),
        ({"signed": True}, "`signed` is true, for latents of either sign; accepted: false"),
        ({"k": None}, "`k` is missing"),
        ({"d_in": None}, "`d_in` is missing"),
        ({"d_in": 3}, rf"`W_enc` is of shape \[{D_IN}, {D_SAE}\]; accepted: \[3, {D_SAE}\]"),
        ({"num_latents": 0}, rf"`W_enc` is of shape \[{D_IN}, {D_SAE}\]; accepted: \[{D_IN}, {32 * D_IN}\]"),
        ({"skip_connection": True}, "lacks W_skip; accepted: exactly W_dec, W_skip, b_dec, encoder.bias"),
    ],
)
def test_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SAEError, match=message):
        read_sae(write(tmp_path, weights(), **changes))


@pytest.mark.parametrize("name", ["extra", "W_enc", "W_skip"])
def test_unknown_tensors(tmp_path: Path, name: str) -> None:
    with pytest.raises(SAEError, match=rf"sae.safetensors has {name}; accepted: exactly W_dec, b_dec, encoder.bias"):
        read_sae(write(tmp_path, weights() | {name: torch.ones(1)}))
