"""Where in a model an SAE reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dspa.errors import SAEError
from dspa.saes.frozen import FrozenSAE
from dspa.saes.metadata import residual_hook

from ..support.saes import D_IN, D_SAE, JUMPRELU, STANDARD, named


def lens_folder(folder: Path, **metadata: Any) -> Path:
    folder.mkdir(exist_ok=True)
    cfg = {"architecture": "jumprelu", "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "device": "cpu"}
    cfg |= {"apply_b_dec_to_input": False, "metadata": {"sae_lens_version": "6.5.0", **metadata}}
    (folder / "cfg.json").write_text(json.dumps(cfg))
    save_file(named(*JUMPRELU), folder / "sae_weights.safetensors")
    return folder


@pytest.mark.parametrize(
    ("hook", "layer", "number"),
    [
        ("blocks.7.hook_resid_post", 7, 7),
        ("blocks.1.hook_resid_pre", 0, 1),
        ("blocks.5.hook_out", 5, 5),
        ("blocks.5.hook_in", 4, 5),
        ("model.layers.24", 24, 24),
        ("model.language_model.layers.3", 3, 3),
        ("language_model.model.layers.3", 3, 3),
        ("base_model.model.model.layers.3", 3, 3),
        ("model.decoder.layers.6", 6, 6),
        ("backbone.layers.2", 2, 2),
        ("layers.0", 0, 0),
        ("transformer.h.11", 11, 11),
        ("transformer.blocks.4", 4, 4),
        ("gpt_neox.layers.5", 5, 5),
        ("resid_post_layer_9", 9, 9),
    ],
)
def test_hooks_of_the_residual_stream(hook: str, layer: int, number: int) -> None:
    assert residual_hook("cfg.json", hook) == (layer, number)


@pytest.mark.parametrize(
    "hook",
    [
        "blocks.0.hook_resid_pre",
        "blocks.3.hook_mlp_out",
        "blocks.3.hook_attn_out",
        "blocks.3.attn.hook_z",
        "blocks.3.hook_resid_mid",
        "blocks.3.ln1.hook_normalized",
        "blocks.3.mlp.hook_out",
        "model.layers.3.mlp",
        "model.layers.3.self_attn.o_proj",
        "hook_embed",
        "mlp_out_layer_3",
        "encoder.layers.5",
        "encoder.block.5",
        "model.encoder.layers.5",
        "vision_tower.encoder.layers.5",
        "vision_model.encoder.layers.5",
        "model.visual.blocks.5",
        "model.vision_tower.blocks.5",
        "audio_tower.layers.5",
    ],
)
def test_other_hooks_are_refused_whatever_the_layer(tmp_path: Path, hook: str) -> None:
    folder = lens_folder(tmp_path / "sae", hook_name=hook)
    trainer = {"dict_class": "AutoEncoder", "submodule_name": hook, "layer": 3}
    save_dictionary(tmp_path, trainer)
    for path, layer in ((folder, None), (folder, 3), (tmp_path / "ae.pt", None), (tmp_path / "ae.pt", 3)):
        with pytest.raises(SAEError, match=rf"{hook}.*accepted: the output of a decoder layer of a language model"):
            FrozenSAE.load(path, layer=layer)


def save_dictionary(folder: Path, trainer: dict[str, Any]) -> None:
    t = named(*STANDARD)
    names = {"encoder.weight": t["W_enc"].T, "encoder.bias": t["b_enc"], "decoder.weight": t["W_dec"].T}
    torch.save(names | {"bias": t["b_dec"]}, folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": trainer}))


@pytest.mark.parametrize("hook", ["residual_12", "model.layers.12.output", "perceiver.layers.12", "mtp.layers.12"])
def test_an_unknown_hook_takes_the_callers_layer(tmp_path: Path, hook: str) -> None:
    folder = lens_folder(tmp_path / "sae", hook_name=hook)
    with pytest.raises(SAEError, match=rf"{hook}.* If it is the residual stream .* pass .*`layer`"):
        FrozenSAE.load(folder)
    sae = FrozenSAE.load(folder, layer=12)
    sae.save(tmp_path / "copy")
    assert sae.layer == FrozenSAE.load(tmp_path / "copy").layer == 12
    save_dictionary(tmp_path, {"dict_class": "AutoEncoder", "submodule_name": hook, "layer": 12})
    assert FrozenSAE.load(tmp_path / "ae.pt").layer == 12
