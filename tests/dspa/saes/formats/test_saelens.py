"""SAELens folders of SAEs that are not on the residual stream, and of every version of the configuration."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dspa.errors import SAEError
from dspa.saes.formats import read_sae
from dspa.saes.frozen import FrozenSAE
from dspa.saes.placement import required_layer
from dspa.testing import make_sae

from ...support.saes import D_IN, D_SAE, STANDARD, close, named
from ...support.sources import close_output, latents

D_OUT = 7
TRANSCODERS = {
    "transcoder": "Transcoder",
    "skip_transcoder": "SkipTranscoder",
    "jumprelu_transcoder": "JumpReLUTranscoder",
    "jumprelu_skip_transcoder": "JumpReLUSkipTranscoder",
}
PLACES = {"hook_name": "blocks.3.ln2.hook_normalized", "hook_name_out": "blocks.3.hook_mlp_out", "model_name": "m"}


def transcoder(architecture: str) -> Any:
    sae_lens = pytest.importorskip("sae_lens", reason="needs the package sae-lens")
    from sae_lens.saes import transcoder as module

    config = getattr(module, f"{TRANSCODERS[architecture]}Config")(
        d_in=D_IN,
        d_out=D_OUT,
        d_sae=D_SAE,
        apply_b_dec_to_input=False,
        metadata=sae_lens.saes.sae.SAEMetadata(**PLACES),
    )
    theirs = getattr(module, TRANSCODERS[architecture])(config)
    g = torch.Generator().manual_seed(0)
    theirs.load_state_dict({name: torch.randn(t.shape, generator=g) for name, t in theirs.state_dict().items()})
    return theirs


@pytest.mark.parametrize("architecture", TRANSCODERS)
def test_transcoders_of_sae_lens(h: Tensor, tmp_path: Path, architecture: str) -> None:
    theirs = transcoder(architecture)
    theirs.save_model(tmp_path)
    source = read_sae(tmp_path)
    with torch.no_grad():
        expected, expected_output = theirs.encode(h), theirs(h)
    assert (expected != 0).float().mean() > 0.02 and expected_output.shape == (*h.shape[:-1], D_OUT)
    close(latents(source, h), expected)
    close_output(source, h, expected_output)
    assert source.arch == ("jumprelu" if "jumprelu" in architecture else "standard")
    assert source.transcoder and source.layer is None
    assert (source.hook_name, source.hook_name_out) == (PLACES["hook_name"], PLACES["hook_name_out"])


def test_a_transcoder_does_not_edit_a_residual_stream(tmp_path: Path) -> None:
    theirs = transcoder("skip_transcoder")
    theirs.cfg.metadata.hook_name = "blocks.3.hook_resid_post"
    theirs.save_model(tmp_path)
    assert read_sae(tmp_path).layer == 3
    with pytest.raises(SAEError, match=r"a transcoder into blocks.3.hook_mlp_out; accepted: one that reads and writes"):
        required_layer(FrozenSAE.load(tmp_path))


def folder(path: Path, **cfg: Any) -> Path:
    path.mkdir(exist_ok=True)
    save_file(named(*STANDARD), path / "sae_weights.safetensors")
    (path / "cfg.json").write_text(json.dumps({"d_in": D_IN, "d_sae": D_SAE} | cfg))
    return path


@pytest.mark.parametrize(
    ("cfg", "reshape"),
    [
        ({"hook_name": "blocks.5.attn.hook_z"}, "hook_z"),
        ({"hook_point": "blocks.5.attn.hook_z", "hook_point_head_index": None}, "hook_z"),
        ({"hook_name": "blocks.5.attn.hook_z", "reshape_activations": "none"}, "none"),
        ({"hook_name": "blocks.5.hook_mlp_out"}, "none"),
        ({"reshape_activations": "hook_z", "metadata": {"hook_name": "blocks.5.attn.hook_z"}}, "hook_z"),
        ({"reshape_activations": "none", "metadata": {"hook_name": "blocks.5.attn.hook_z"}}, "none"),
    ],
)
def test_attention_heads(tmp_path: Path, cfg: dict[str, Any], reshape: str) -> None:
    """A flat configuration, of a version before 6, leaves it to the name of the hook. Both as SAELens has it."""
    defaulted = pytest.importorskip("sae_lens.loading.pretrained_sae_loaders").handle_config_defaulting
    source = read_sae(folder(tmp_path, **cfg))
    assert source.reshape_activations == reshape and source.layer is None
    version = {"metadata": {**cfg["metadata"], "sae_lens_version": "6.54.0"}} if "metadata" in cfg else {}
    assert defaulted(cfg | version)["reshape_activations"] == reshape
    with pytest.raises(SAEError, match=r"the place of this SAE is 'blocks\.5"):
        required_layer(FrozenSAE.load(tmp_path))


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "1, as Neuronpedia's uploads": {
        "model_name": "gpt2-small",
        "hook_point": "blocks.10.hook_resid_pre",
        "hook_point_layer": 10,
        "hook_point_head_index": None,
        "activation_fn": "relu",
        "noise_scale": 0.0,
        "normalize_sae_decoder": True,
        "apply_b_dec_to_input": False,
        "dtype": "torch.float32",
    },
    "2": {
        "hook_point": "blocks.10.hook_resid_pre",
        "hook_point_layer": 10,
        "activation_fn_str": "relu",
        "normalize_activations": False,
        "dtype": "float32",
    },
    "3": {
        "architecture": "standard",
        "hook_name": "blocks.10.hook_resid_pre",
        "hook_layer": 10,
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 4},
        "finetuning_scaling_factor": False,
        "sae_lens_training_version": "3.0.0",
        "normalize_activations": "layer_norm",
        "dtype": "float32",
    },
    "5": {
        "architecture": "topk",
        "hook_name": "blocks.10.hook_resid_pre",
        "hook_layer": 10,
        "activation_fn": "topk",
        "activation_fn_kwargs": {"k": 4},
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "sae_lens_version": "5.9.1",
        "dtype": "float32",
    },
    "6": {
        "architecture": "topk",
        "k": 4,
        "rescale_acts_by_decoder_norm": True,
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "dtype": "float32",
        "metadata": {"sae_lens_version": "6.54.0", "hook_name": "blocks.10.hook_resid_pre", "hook_head_index": None},
    },
}


@pytest.mark.parametrize("version", CONFIGURATIONS)
def test_configurations_of_every_version(h: Tensor, tmp_path: Path, version: str) -> None:
    sae_lens = pytest.importorskip("sae_lens", reason="needs the package sae-lens")
    folder(tmp_path, **CONFIGURATIONS[version])
    theirs, source = sae_lens.SAE.load_from_disk(tmp_path), read_sae(tmp_path)
    with torch.no_grad():
        close(latents(source, h), theirs.encode(h))
        close_output(source, h, theirs(h))
    assert (source.layer, source.hook_name) == (9, theirs.cfg.metadata.hook_name)


def test_attention_heads_of_an_unknown_place(tmp_path: Path) -> None:
    folder(tmp_path, reshape_activations="hook_z", metadata={})
    with pytest.raises(SAEError, match=r"one of attention heads; accepted: one that reads and writes the residual"):
        FrozenSAE.load(tmp_path, layer=3)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (
            {"d_in": D_IN + 1},
            rf"`W_enc` is of shape \[{D_IN}, {D_SAE}\]; accepted: \[{D_IN + 1}, {D_SAE}\], as its configuration",
        ),
        (
            {"d_sae": 3},
            rf"`W_enc` is of shape \[{D_IN}, {D_SAE}\]; accepted: \[{D_IN}, 3\], as its configuration",
        ),
        (
            {"architecture": "transcoder", "d_out": D_OUT},
            rf"`W_dec` is of shape \[{D_SAE}, {D_IN}\]; accepted: \[{D_SAE}, {D_OUT}\], as its configuration",
        ),
        ({"architecture": "skip_transcoder"}, "lacks W_skip; accepted: exactly W_dec, W_enc, W_skip, b_dec, b_enc"),
        ({"architecture": "transcoder"}, "`apply_b_dec_to_input` of a transcoder is true; accepted: false"),
        ({"architecture": "transcoder", "d_out": "12"}, "`d_out` is '12'; accepted: a whole number >= 1"),
        ({"metadata": {"hook_name_out": 3}}, "`metadata.hook_name_out` is 3; accepted: text"),
    ],
)
def test_refused(tmp_path: Path, cfg: dict[str, Any], message: str) -> None:
    with pytest.raises(SAEError, match=message):
        read_sae(folder(tmp_path, **cfg))


@pytest.mark.parametrize(
    ("figures", "message"),
    [
        ({"explained_variance": float("nan")}, "`metadata.explained_variance` is nan; accepted: a finite number <= 1"),
        ({"explained_variance": "0.7"}, "`metadata.explained_variance` is '0.7'"),
        ({"l0": -1.0}, "`metadata.l0` is -1.0; accepted: a finite number >= 0"),
        ({"l0": 24.5}, "`l0` is 24.5; accepted: at most 24, the number of latents"),
        ({"num_dead_features": True}, "`metadata.num_dead_features` is True; accepted: a whole number >= 0"),
        ({"num_dead_features": 25}, "`num_dead_features` is 25; accepted: at most 24"),
    ],
)
def test_figures_that_no_sae_has(tmp_path: Path, figures: dict[str, Any], message: str) -> None:
    make_sae(2, 24).save(tmp_path)
    config = tmp_path / "cfg.json"
    cfg = json.loads(config.read_text())
    valid = {"explained_variance": 0.7, "l0": 12, "num_dead_features": 24}
    config.write_text(json.dumps(cfg | {"metadata": cfg["metadata"] | valid}))
    assert FrozenSAE.load(tmp_path).figures == {"explained_variance": 0.7, "l0": 12, "dead": 24}
    config.write_text(json.dumps(cfg | {"metadata": cfg["metadata"] | dict.fromkeys(valid)}))
    assert FrozenSAE.load(tmp_path).figures == {}
    config.write_text(json.dumps(cfg | {"metadata": cfg["metadata"] | valid | figures}))
    with pytest.raises(SAEError, match=re.escape(message)):
        FrozenSAE.load(tmp_path)
