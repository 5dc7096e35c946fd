"""Where in a model an SAE reads, and under which number Neuronpedia has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dspa.errors import LabelError, SAEError
from dspa.saes.frozen import FrozenSAE
from dspa.saes.labels import read_labels
from dspa.saes.metadata import residual_hook
from dspa.saes.placement import required_layer

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
    assert residual_hook(hook) == (layer, number)


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
def test_other_hooks_have_no_layer_and_take_none(tmp_path: Path, hook: str) -> None:
    """They encode and decode; what reads a layer of the residual stream refuses them."""
    folder = lens_folder(tmp_path / "sae", hook_name=hook)
    trainer = {"dict_class": "AutoEncoder", "submodule_name": hook, "layer": 3}
    save_dictionary(tmp_path, trainer)
    refusal = rf"{hook}.*accepted: the output of a decoder layer of a language model"
    for path in (folder, tmp_path / "ae.pt"):
        sae = FrozenSAE.load(path)
        assert (sae.layer, sae.hook_name) == (None, hook)
        with pytest.raises(SAEError, match=refusal):
            required_layer(sae)
        with pytest.raises(SAEError, match=refusal):
            FrozenSAE.load(path, layer=3)


def save_dictionary(folder: Path, trainer: dict[str, Any]) -> None:
    t = named(*STANDARD)
    names = {"encoder.weight": t["W_enc"].T, "encoder.bias": t["b_enc"], "decoder.weight": t["W_dec"].T}
    torch.save(names | {"bias": t["b_dec"]}, folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": trainer}))


@pytest.mark.parametrize("hook", ["residual_12", "model.layers.12.output", "perceiver.layers.12", "mtp.layers.12"])
def test_an_unknown_hook_takes_the_callers_layer(tmp_path: Path, hook: str) -> None:
    folder = lens_folder(tmp_path / "sae", hook_name=hook)
    with pytest.raises(SAEError, match=rf"{hook}.* If it is the residual stream .* load it with .*`layer`"):
        required_layer(FrozenSAE.load(folder))
    sae = FrozenSAE.load(folder, layer=12)
    sae.save(tmp_path / "copy")
    assert sae.layer == FrozenSAE.load(tmp_path / "copy").layer == 12
    save_dictionary(tmp_path, {"dict_class": "AutoEncoder", "submodule_name": hook, "layer": 12})
    assert FrozenSAE.load(tmp_path / "ae.pt").layer == 12


# Neuronpedia


def labels(path: Path, layer: object) -> Path:
    path.write_text(json.dumps([{"modelId": "gpt2-small", "layer": layer, "index": 3, "category": "style"}]))
    return path


@pytest.mark.parametrize(
    ("metadata", "right", "wrong"),
    [
        ({"hook_name": "blocks.8.hook_resid_pre"}, "8-res-jb", "7-res-jb"),
        ({"hook_name": "blocks.8.hook_resid_pre", "neuronpedia_id": "gpt2-small/8-res-jb"}, "8-res-jb", "7-res-jb"),
        ({"hook_name": "blocks.8.hook_resid_pre", "neuronpedia_id": "gpt2-small/8-res-jb"}, "8-res-jb", "8-res_fs-jb"),
        (
            {"hook_name": "blocks.11.hook_resid_post", "neuronpedia_id": "gpt2-small/12-res-jb"},
            "12-res-jb",
            "11-res-jb",
        ),
        ({"hook_name": "blocks.11.hook_resid_post"}, "11-res_post_32k-oai", "12-res-jb"),
        ({"hook_name": "blocks.8.hook_resid_pre"}, 7, 8),
        ({"hook_name": "model.layers.4", "neuronpedia_id": None}, "4-llamascope-res-32k", "5-llamascope-res-32k"),
        ({"hook_name": "blocks.4.hook_resid_post"}, "4-res", "e-att-sm"),
    ],
)
def test_labels_have_the_number_of_the_hook(
    tmp_path: Path, metadata: dict[str, Any], right: object, wrong: object
) -> None:
    """As in the catalogue of SAELens, and a bare number is the layer of the SAE."""
    sae = FrozenSAE.load(lens_folder(tmp_path / "sae", model_name="gpt2-small", **metadata))
    sae.save(tmp_path / "copy")
    for one in (sae, FrozenSAE.load(tmp_path / "copy")):
        assert read_labels(labels(tmp_path / "right.json", right), one).of("style") == [3]
        with pytest.raises(LabelError, match=rf"of layer '?{wrong}'?; accepted: "):
            read_labels(labels(tmp_path / "wrong.json", wrong), one)


def test_the_catalogue_of_sae_lens_has_these_numbers() -> None:
    directory = pytest.importorskip("sae_lens.loading.pretrained_saes_directory").get_pretrained_saes_directory()
    ids = directory["gpt2-small-res-jb"].neuronpedia_id
    numbers = {hook: int(name.partition("/")[2].partition("-")[0]) for hook, name in ids.items()}
    last = numbers.pop("blocks.11.hook_resid_post")
    places = {hook: residual_hook(hook) for hook in numbers if hook != "blocks.0.hook_resid_pre"}
    assert last == 12 and len(places) == 11
    assert all(place is not None and place[1] == numbers[hook] for hook, place in places.items())
