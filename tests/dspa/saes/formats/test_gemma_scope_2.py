"""Gemma Scope 2, by its formula and by SAELens' loader on the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dspa.errors import SAEError
from dspa.saes.formats import read_sae
from dspa.saes.frozen import FrozenSAE

from ...support.saes import D_IN, D_SAE, JUMPRELU, close, decoded_rounding, named
from ...support.sources import close_output, latents

D_OUT = 7
RESIDUAL = {
    "hf_hook_point_in": "model.layers.17.output",
    "hf_hook_point_out": "model.layers.17.output",
    "width": D_SAE,
    "model_name": "gemma-v3-1b-pt",
    "architecture": "jump_relu",
    "l0": 20,
    "affine_connection": False,
    "type": "sae",
}
TRANSCODER = RESIDUAL | {
    "hf_hook_point_in": "model.layers.17.pre_feedforward_layernorm.output",
    "hf_hook_point_out": "model.layers.17.post_feedforward_layernorm.output",
    "type": "transcoder",
}


def weights(d_out: int = D_IN, *, affine: bool = False) -> dict[str, Tensor]:
    """The tensors of a file, by the maker's names."""
    t = named(*JUMPRELU)
    stored = {"w_enc": t["W_enc"], "b_enc": t["b_enc"], "threshold": t["threshold"]}
    stored |= {"w_dec": t["W_dec"][:, :d_out].contiguous(), "b_dec": t["b_dec"][:d_out].contiguous()}
    if affine:
        stored["affine_skip_connection"] = torch.randn(D_IN, d_out, generator=torch.Generator().manual_seed(3))
    return stored


def write(folder: Path, stored: dict[str, Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(stored, folder / "params.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def jumprelu(x: Tensor) -> Tensor:
    t = named(*JUMPRELU)
    pre = x @ t["W_enc"] + t["b_enc"]
    return pre * (pre > t["threshold"]) * (pre > 0)


@pytest.mark.parametrize("name", ["", "params.safetensors", "config.json"])
def test_residual(h: Tensor, tmp_path: Path, name: str) -> None:
    sae = FrozenSAE.load(write(tmp_path, weights(), RESIDUAL) / name)
    expected, t = jumprelu(h), named(*JUMPRELU)
    close(sae.encode(h), expected)
    atol = decoded_rounding(expected, t["W_dec"])
    torch.testing.assert_close(sae.decode(expected), expected @ t["W_dec"] + t["b_dec"], rtol=0, atol=atol)
    assert (sae.layer, sae.model_name, sae.hook_name) == (17, "gemma-3-1b-pt", "model.layers.17.output")


@pytest.mark.parametrize("affine", [False, True])
def test_transcoder(h: Tensor, tmp_path: Path, affine: bool) -> None:
    stored = weights(D_OUT, affine=affine)
    source = read_sae(write(tmp_path, stored, TRANSCODER | {"affine_connection": affine}))
    expected = jumprelu(h) @ stored["w_dec"] + stored["b_dec"]
    expected = expected + h @ stored["affine_skip_connection"] if affine else expected
    close_output(source, h, expected)
    assert source.transcoder and source.layer is None
    assert (source.hook_name, source.hook_name_out) == (TRANSCODER["hf_hook_point_in"], TRANSCODER["hf_hook_point_out"])


@pytest.mark.parametrize(
    ("place", "hook"),
    [
        ("attn_out", "model.layers.17.self_attn.o_proj.input"),
        ("mlp_out", "model.layers.17.post_feedforward_layernorm.output"),
    ],
)
def test_other_places(tmp_path: Path, place: str, hook: str) -> None:
    folder = write(tmp_path / place, weights(), RESIDUAL | {"hf_hook_point_in": hook, "hf_hook_point_out": hook})
    source = read_sae(folder)
    assert (source.hook_name, source.layer, source.transcoder) == (hook, None, False)


@pytest.mark.parametrize(
    ("folder", "config", "affine"),
    [
        ("resid_post/layer_17_width_16k_l0_big", RESIDUAL, False),
        ("transcoder/layer_17_width_16k_l0_big", TRANSCODER, False),
        ("transcoder/layer_17_width_16k_l0_big_affine", TRANSCODER | {"affine_connection": True}, True),
    ],
)
def test_against_the_loader_of_sae_lens(
    h: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, config: dict[str, Any], affine: bool
) -> None:
    sae_lens = pytest.importorskip("sae_lens", reason="needs the package sae-lens")
    from sae_lens.loading import pretrained_sae_loaders as loaders

    path = write(tmp_path / folder, weights(D_IN, affine=affine), config)
    monkeypatch.setattr(
        loaders, "hf_hub_download", lambda repo_id, filename, subfolder="", **_: str(tmp_path / subfolder / filename)
    )
    monkeypatch.setattr(
        loaders, "get_safetensors_tensor_shapes",
        lambda repo_id, name: {key: list(t.shape) for key, t in load_file(tmp_path / name).items()},
    )  # fmt: skip
    cfg, state, _ = loaders.gemma_3_sae_huggingface_loader("google/gemma-scope-2-1b-pt", folder)
    theirs = sae_lens.SAE.from_dict(loaders.handle_config_defaulting(cfg))
    theirs.load_state_dict(state)
    source = read_sae(path)
    with torch.no_grad():
        close(latents(source, h), theirs.encode(h))
        close_output(source, h, theirs(h))
    assert theirs.cfg.metadata.model_name == f"google/{source.model_name}"


@pytest.mark.parametrize(
    ("stored", "config", "message"),
    [
        (weights(), {"architecture": "topk"}, "`architecture` is 'topk'; accepted: jump_relu"),
        (weights(), {"hf_hook_point_in": None}, "`hf_hook_point_in` is None; accepted: text"),
        (weights(), {"width": D_SAE + 1}, rf"`W_enc` is of shape \[{D_IN}, {D_SAE}\]; accepted: \[d_in, {D_SAE + 1}\]"),
        (weights(D_OUT), {}, rf"`W_dec` is of shape \[{D_SAE}, {D_OUT}\]; accepted: \[{D_SAE}, {D_IN}\]"),
        (weights(), {"affine_connection": True}, "lacks affine_skip_connection; accepted: exactly affine_skip"),
        (
            weights() | {"W_enc": torch.ones(2)},
            {},
            "has W_enc; accepted: exactly b_dec, b_enc, threshold, w_dec, w_enc",
        ),
        (weights(affine=True), {}, "has affine_skip_connection; accepted: exactly b_dec"),
        (
            weights() | {"w_dec": torch.ones(D_SAE, 2, D_IN)},
            {},
            rf"`W_dec` is of shape \[{D_SAE}, 2, {D_IN}\]; accepted",
        ),
    ],
)
def test_refused(tmp_path: Path, stored: dict[str, Tensor], config: dict[str, Any], message: str) -> None:
    with pytest.raises(SAEError, match=message):
        read_sae(write(tmp_path, stored, RESIDUAL | config))


def test_without_config(tmp_path: Path) -> None:
    (write(tmp_path, weights(), RESIDUAL) / "config.json").unlink()
    with pytest.raises(SAEError, match=r"config.json is not there; accepted: the file that belongs to the SAE's other"):
        read_sae(tmp_path)
