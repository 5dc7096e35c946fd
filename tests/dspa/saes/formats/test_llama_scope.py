"""Llama Scope, by the steps of its maker's package (lm-saes 1.0.0) and by SAELens' loader on the same files."""

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
from ...support.sources import close_output

CONFIG = {
    "hook_point_in": "blocks.15.hook_resid_post",
    "hook_point_out": "blocks.15.hook_resid_post",
    "use_decoder_bias": True,
    "apply_decoder_bias_to_pre_encoder": False,
    "expansion_factor": 8,
    "d_model": D_IN,
    "d_sae": D_SAE,
    "act_fn": "jumprelu",
    "jump_relu_threshold": 0.75390625,
    "norm_activation": "dataset-wise",
    "dataset_average_activation_norm": {"in": 2.5, "out": 2.5},
    "sparsity_include_decoder_norm": True,
    "top_k": K,
}
TRANSCODER = {
    "hook_point_in": "blocks.15.ln2.hook_normalized",
    "hook_point_out": "blocks.15.hook_mlp_out",
    "dataset_average_activation_norm": {"in": 2.5, "out": 4.5},
}


def weights() -> dict[str, Tensor]:
    """The tensors of a file, by the maker's names."""
    t = tensors()
    return {
        "encoder.weight": t["W_enc"].T.contiguous(),
        "encoder.bias": t["b_enc"],
        "decoder.weight": t["W_dec"].T.contiguous(),
        "decoder.bias": t["b_dec"],
    }


def write(folder: Path, stored: dict[str, Tensor], **changes: Any) -> Path:
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    save_file(stored, folder / "checkpoints" / "final.safetensors")
    config = {name: value for name, value in (CONFIG | changes).items() if value is not None}
    (folder / "hyperparams.json").write_text(json.dumps(config))
    (folder / "lm_config.json").write_text(json.dumps({"model_name": "meta-llama/Llama-3.1-8B", "d_model": D_IN}))
    return folder


def by_the_maker(x: Tensor, changes: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Latents and outputs of lm-saes: `SparseAutoEncoder.from_config`, then `encode` and `decode`."""
    cfg, state = CONFIG | changes, weights()
    if cfg["norm_activation"] == "dataset-wise":
        factors = {place: D_IN**0.5 / norm for place, norm in cfg["dataset_average_activation_norm"].items()}
        state["encoder.bias"] = state["encoder.bias"] / factors["in"]
        state["decoder.bias"] = state["decoder.bias"] / factors["out"]
        state["decoder.weight"] = state["decoder.weight"] * factors["in"] / factors["out"]
    if cfg["sparsity_include_decoder_norm"]:
        norm = state["decoder.weight"].norm(dim=0)
        state["decoder.weight"] = state["decoder.weight"] / norm
        state["encoder.weight"] = state["encoder.weight"] * norm[:, None]
        state["encoder.bias"] = state["encoder.bias"] * norm
    if cfg["apply_decoder_bias_to_pre_encoder"]:
        x = x - state["decoder.bias"]
    pre = x @ state["encoder.weight"].T + state["encoder.bias"]
    if cfg["act_fn"] == "relu":
        f = pre.relu()
    elif cfg["act_fn"] == "topk" and cfg["jump_relu_threshold"] == 0:
        top = pre.relu().topk(K)
        f = torch.zeros_like(pre).scatter_(-1, top.indices, top.values)
    else:
        f = pre.where(pre > cfg["jump_relu_threshold"], 0)
    return f, f @ state["decoder.weight"].T + state["decoder.bias"]


CHANGES: list[dict[str, Any]] = [
    {},
    {"sparsity_include_decoder_norm": False},
    {"apply_decoder_bias_to_pre_encoder": True},
    {"norm_activation": "inference"},
    {"act_fn": "topk"},
    {"act_fn": "topk", "jump_relu_threshold": 0.0},
    {"act_fn": "relu", "jump_relu_threshold": 0.0},
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_residual(h: Tensor, tmp_path: Path, changes: dict[str, Any]) -> None:
    sae = FrozenSAE.load(write(tmp_path, weights(), **changes))
    f, out = by_the_maker(h, changes)
    assert 0.02 < (f != 0).float().mean() < 0.9
    close(sae.encode(h), f)
    torch.testing.assert_close(sae.decode(f), out, rtol=0, atol=decoded_rounding(f, sae.W_dec))
    assert (sae.layer, sae.model_name) == (15, "meta-llama/Llama-3.1-8B")


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_transcoder(h: Tensor, tmp_path: Path, changes: dict[str, Any]) -> None:
    source = read_sae(write(tmp_path, weights(), **TRANSCODER | changes))
    close_output(source, h, by_the_maker(h, TRANSCODER | changes)[1])
    places = source.hook_name, source.hook_name_out
    assert source.transcoder and places == (TRANSCODER["hook_point_in"], TRANSCODER["hook_point_out"])


@pytest.mark.parametrize("name", ["", "hyperparams.json", "checkpoints/final.safetensors"])
def test_folder_or_file(tmp_path: Path, name: str) -> None:
    assert read_sae(write(tmp_path, weights()) / name).hook_name == "blocks.15.hook_resid_post"


def test_bf16_biases_are_folded_in_fp32(tmp_path: Path) -> None:
    stored = {name: tensor.bfloat16() for name, tensor in weights().items()}
    sae = FrozenSAE.load(write(tmp_path, stored, sparsity_include_decoder_norm=False))
    assert sae.dtype == torch.bfloat16
    expected = stored["encoder.bias"].double() * 2.5 / D_IN**0.5
    assert torch.equal(sae.b_enc, expected.float())


def test_against_the_loader_of_sae_lens(h: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SAELens' latents are in units of the training: `sqrt(d_in) / norm` times as large, with smaller decoder rows."""
    sae_lens = pytest.importorskip("sae_lens", reason="needs the package sae-lens")
    from sae_lens.loading import pretrained_sae_loaders as loaders

    write(tmp_path / "L15R-8x", weights(), sparsity_include_decoder_norm=False)
    monkeypatch.setattr(
        loaders, "hf_hub_download", lambda repo_id, filename, subfolder="", **_: str(tmp_path / subfolder / filename)
    )
    cfg, state, _ = loaders.llama_scope_sae_huggingface_loader(
        "fnlp/Llama3_1-8B-Base-LXR-8x", "L15R-8x", cfg_overrides={"dtype": "float32"}
    )
    theirs = sae_lens.SAE.from_dict(loaders.handle_config_defaulting(cfg))
    theirs.load_state_dict(state)
    factor = D_IN**0.5 / 2.5
    theirs.fold_activation_norm_scaling_factor(factor)
    ours = FrozenSAE.load(tmp_path / "L15R-8x")
    with torch.no_grad():
        f = theirs.encode(h)
        close(ours.encode(h), f / factor)
        atol = decoded_rounding(f / factor, ours.W_dec)
        torch.testing.assert_close(ours.decode(ours.encode(h)), theirs.decode(f), rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act_fn": "batchtopk"}, "`act_fn` is 'batchtopk'; accepted: jumprelu, topk, relu"),
        ({"act_fn": None}, "`act_fn` is missing"),
        (
            {"norm_activation": "token-wise"},
            "`norm_activation` is 'token-wise'; accepted: dataset-wise, inference",
        ),
        ({"norm_activation": None}, "`norm_activation` is missing"),
        (
            {"dataset_average_activation_norm": None},
            "`dataset_average_activation_norm` is missing; accepted: the",
        ),
        ({"dataset_average_activation_norm": {"in": 2.5}}, "`dataset_average_activation_norm.out` is missing"),
        ({"dataset_average_activation_norm": {"in": 0, "out": 1}}, "norm.in` is 0; accepted: a finite number > 0"),
        ({"jump_relu_threshold": -1.0}, r"`jump_relu_threshold` is -1\.0; accepted: a finite number >= 0"),
        ({"sparsity_include_decoder_norm": None}, "`sparsity_include_decoder_norm` is missing"),
        ({"apply_decoder_bias_to_pre_encoder": None}, "`apply_decoder_bias_to_pre_encoder` is missing"),
        ({"d_model": 4}, rf"`W_enc` is of shape \[{D_IN}, {D_SAE}\]; accepted: \[4, {D_SAE}\]"),
    ],
)
def test_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SAEError, match=message):
        read_sae(write(tmp_path, weights(), **changes))


def test_unknown_tensors(tmp_path: Path) -> None:
    stored = weights() | {"encoder_glu.weight": torch.ones(2)}
    with pytest.raises(SAEError, match=r"final.safetensors has encoder_glu.weight; accepted: exactly decoder.bias"):
        read_sae(write(tmp_path, stored))
