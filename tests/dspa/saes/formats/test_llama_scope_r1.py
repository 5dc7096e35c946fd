"""Llama Scope R1 Distill, by the formula of its maker's package at that time and by SAELens' loader."""

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

from ...support.saes import close, decoded_rounding, tensors
from ...support.sources import close_output
from . import test_llama_scope as first

# A width that the configuration can state, which says it as a multiple.
D_IN, D_SAE = 10, 40
HOOK = "blocks.15.hook_resid_post"
CONFIG = {
    "sae_type": "sae",
    "hook_point_in": HOOK,
    "hook_point_out": HOOK,
    "d_model": D_IN,
    "expansion_factor": 4,
    "act_fn": "jumprelu",
    "norm_activation": "dataset-wise",
    "sparsity_include_decoder_norm": True,
    "apply_decoder_bias_to_pre_encoder": False,
    "top_k": 50,
}
TRANSCODER = {"hook_point_in": "blocks.15.ln2.hook_normalized", "hook_point_out": "blocks.15.hook_mlp_out"}


@pytest.fixture
def x(h: Tensor) -> Tensor:
    return h[..., :D_IN]


def weights(norms: dict[str, float] | None = None) -> dict[str, Tensor]:
    """The tensors of a file, by the maker's names."""
    t = tensors()
    stored = {
        "encoder.weight": t["W_enc"].T[:, :D_IN].contiguous(),
        "encoder.bias": t["b_enc"],
        "decoder.weight": t["W_dec"].T[:D_IN].contiguous(),
        "decoder.bias": t["b_dec"][:D_IN].contiguous(),
        "log_jumprelu_threshold": t["threshold"].abs().log(),
    }
    named = {f"dataset_average_activation_norm.{hook}": norm for hook, norm in (norms or {HOOK: 2.5}).items()}
    return stored | {name: torch.tensor(norm) for name, norm in named.items()}


def write(folder: Path, stored: dict[str, Tensor], **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(stored, folder / "sae_weights.safetensors")
    config = {name: value for name, value in (CONFIG | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def by_the_maker(x: Tensor, norm_in: float, norm_out: float, *, include_norm: bool) -> tuple[Tensor, Tensor]:
    """Latents of `encode` on normalised activations, and outputs of `decode` in units of the activations."""
    t = weights()
    pre = x * D_IN**0.5 / norm_in @ t["encoder.weight"].T + t["encoder.bias"]
    scores = pre * t["decoder.weight"].norm(dim=0) if include_norm else pre
    f = pre * (scores > t["log_jumprelu_threshold"].exp())
    return f, (f @ t["decoder.weight"].T + t["decoder.bias"]) * norm_out / D_IN**0.5


@pytest.mark.parametrize("include_norm", [True, False])
def test_residual(x: Tensor, tmp_path: Path, include_norm: bool) -> None:
    sae = FrozenSAE.load(write(tmp_path, weights(), sparsity_include_decoder_norm=include_norm))
    f, out = by_the_maker(x, 2.5, 2.5, include_norm=include_norm)
    assert 0.02 < (f != 0).float().mean() < 0.9
    scale = weights()["decoder.weight"].norm(dim=0) if include_norm else 1.0
    f = f * scale * 2.5 / D_IN**0.5
    close(sae.encode(x), f)
    torch.testing.assert_close(sae.decode(f), out, rtol=0, atol=decoded_rounding(f, sae.W_dec))
    assert (sae.layer, sae.hook_name) == (15, HOOK)


@pytest.mark.parametrize("include_norm", [True, False])
def test_transcoder(x: Tensor, tmp_path: Path, include_norm: bool) -> None:
    norms = dict(zip(TRANSCODER.values(), (2.5, 4.5), strict=True))
    folder = write(tmp_path, weights(norms), **TRANSCODER, sparsity_include_decoder_norm=include_norm)
    source = read_sae(folder)
    close_output(source, x, by_the_maker(x, 2.5, 4.5, include_norm=include_norm)[1])
    assert source.transcoder and (source.hook_name, source.hook_name_out) == tuple(TRANSCODER.values())


def test_against_the_loader_of_sae_lens(x: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves the norm of the decoder out, and its latents are in units of the training."""
    sae_lens = pytest.importorskip("sae_lens", reason="needs the package sae-lens")
    from sae_lens.loading import pretrained_sae_loaders as loaders

    write(tmp_path / "L15R", weights(), sparsity_include_decoder_norm=False)
    monkeypatch.setattr(
        loaders, "hf_hub_download", lambda repo_id, filename, subfolder="", **_: str(tmp_path / subfolder / filename)
    )
    cfg, state, _ = loaders.llama_scope_r1_distill_sae_huggingface_loader("fnlp/Llama-Scope-R1-Distill", "L15R")
    theirs = sae_lens.SAE.from_dict(loaders.handle_config_defaulting(cfg))
    theirs.load_state_dict(state)
    factor = D_IN**0.5 / 2.5
    theirs.fold_activation_norm_scaling_factor(factor)
    ours = FrozenSAE.load(tmp_path / "L15R")
    with torch.no_grad():
        f = theirs.encode(x)
        close(ours.encode(x), f / factor)
        atol = decoded_rounding(f / factor, ours.W_dec)
        torch.testing.assert_close(ours.decode(ours.encode(x)), theirs.decode(f), rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("stored", "changes", "message"),
    [
        (weights(), {"act_fn": "topk"}, "`act_fn` is 'topk'; accepted: jumprelu"),
        (weights(), {"norm_activation": "inference"}, "`norm_activation` is 'inference'; accepted: dataset-wise"),
        (
            weights(),
            {"apply_decoder_bias_to_pre_encoder": True},
            "`apply_decoder_bias_to_pre_encoder` is true",
        ),
        (weights(), {"expansion_factor": 3}, rf"`W_enc` is of shape \[{D_IN}, {D_SAE}\]; accepted: \[{D_IN}, 30\]"),
        (weights({"blocks.3": 1.0}), {}, rf"lacks dataset_average_activation_norm.{HOOK} and has dataset_average"),
        (weights({HOOK: 0.0}), {}, r"`dataset_average_activation_norm.*` is 0\.0; accepted: a finite number > 0"),
        (first.weights(), {}, "lacks dataset_average_activation_norm.*, log_jumprelu_threshold; accepted"),
    ],
)
def test_refused(tmp_path: Path, stored: dict[str, Tensor], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SAEError, match=message):
        read_sae(write(tmp_path, stored, **changes))
