"""Every class of dictionary_learning, saved and used by that package, and what its trainers write besides `ae.pt`."""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dspa.errors import SAEError
from dspa.saes.formats import read_sae
from dspa.saes.frozen import FrozenSAE

from ...support.saes import D_IN, D_SAE, K, close, decoded_rounding, tensors
from ..test_formats import dictionary as stored

# The class, its module in the package, its arguments after the widths, and the trainers that train it.
CLASSES = {
    "AutoEncoder": ("dictionary", (), ("StandardTrainer", "StandardTrainerAprilUpdate", "PAnnealTrainer")),
    "AutoEncoderNew": ("dictionary", (), ()),
    "GatedAutoEncoder": ("dictionary", (), ("GatedSAETrainer", "GatedAnnealTrainer")),
    "JumpReluAutoEncoder": ("dictionary", (), ("JumpReluTrainer",)),
    "AutoEncoderTopK": ("trainers.top_k", (K,), ("TopKTrainer",)),
    "BatchTopKSAE": ("trainers.batch_top_k", (K,), ("BatchTopKTrainer",)),
    "MatryoshkaBatchTopKSAE": ("trainers.matryoshka_batch_top_k", (K, [10, 30]), ("MatryoshkaBatchTopKTrainer",)),
}
TRAINERS = ("standard", "p_anneal", "gdm", "gated_anneal", "jumprelu", "top_k", "batch_top_k", "matryoshka_batch_top_k")


def dictionary(name: str) -> nn.Module:
    """A module of the package, with random weights."""
    pytest.importorskip("dictionary_learning", reason="needs the package dictionary-learning", exc_type=ImportError)
    module, arguments, _ = CLASSES[name]
    made = getattr(importlib.import_module(f"dictionary_learning.{module}"), name)(D_IN, D_SAE, *arguments)
    g = torch.Generator().manual_seed(4)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=g) * 0.5
    if "threshold" in dict(made.named_buffers()):
        made.threshold.fill_(0.7)
    return made.requires_grad_(False)


def save(folder: Path, state: dict[str, Any], dict_class: str, file: str = "ae.pt") -> Path:
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / file)
    trainer = {"dict_class": dict_class, "layer": 4, "lm_name": "m", "submodule_name": "resid_post_layer_4", "k": K}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer}))
    return folder / file


@pytest.mark.parametrize("name", CLASSES)
def test_against_the_package(h: Tensor, tmp_path: Path, name: str) -> None:
    theirs = dictionary(name)
    x = h.flatten(0, 1)
    sae = FrozenSAE.load(save(tmp_path, theirs.state_dict(), name))
    f = theirs.encode(x)
    assert 0.02 < (f != 0).float().mean() < 0.9
    close(sae.encode(x), f)
    atol = decoded_rounding(f, sae.W_dec)
    torch.testing.assert_close(sae.decode(f), theirs.decode(f), rtol=0, atol=atol)
    assert (sae.layer, sae.model_name, sae.hook_name) == (4, "m", "resid_post_layer_4")


@pytest.mark.parametrize(
    ("name", "trainer"), [(name, t) for name, (_, _, trainers) in CLASSES.items() for t in trainers]
)
def test_trainers_name_these_classes(name: str, trainer: str) -> None:
    """The class that a trainer makes by default and the one in its configuration are the same."""
    pytest.importorskip("dictionary_learning", reason="needs the package dictionary-learning", exc_type=ImportError)
    modules = [importlib.import_module(f"dictionary_learning.trainers.{name}") for name in TRAINERS]
    (kind,) = {vars(module)[trainer] for module in modules if trainer in vars(module)}
    assert inspect.signature(kind.__init__).parameters["dict_class"].default.__name__ == name
    assert f'"{name}"' in inspect.getsource(kind.config.fget).replace("'", '"')


def linear(*, bias: str) -> dict[str, Tensor]:
    t = tensors()
    return {
        "encoder.weight": t["W_enc"].T.contiguous(),
        "encoder.bias": t["b_enc"],
        "decoder.weight": t["W_dec"].T.contiguous(),
        bias: t["b_dec"],
    }


@pytest.mark.parametrize("name", [name for name in CLASSES if name != "AutoEncoderNew"])
def test_against_the_loader_of_sae_lens(h: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Folders such as those of andyrdt/saes-llama-3.1-8b-instruct and of SAE Bench."""
    sae_lens = pytest.importorskip("sae_lens", reason="needs the package sae-lens")
    from sae_lens.loading import pretrained_sae_loaders as loaders

    folder = tmp_path / "resid_post_layer_4" / "trainer_1"
    file = save(folder, stored(name), name)
    config = json.loads((folder / "config.json").read_text())
    config["trainer"] |= {"activation_dim": D_IN, "dict_size": D_SAE}
    (folder / "config.json").write_text(json.dumps(config | {"buffer": {"ctx_len": 64}}))
    monkeypatch.setattr(loaders, "hf_hub_download", lambda repo_id, filename, **_: str(tmp_path / filename))
    cfg, state, _ = loaders.dictionary_learning_sae_huggingface_loader_1("repo", "resid_post_layer_4/trainer_1")
    theirs = sae_lens.SAE.from_dict(loaders.handle_config_defaulting(cfg))
    theirs.load_state_dict(state)
    ours = FrozenSAE.load(file)
    with torch.no_grad():
        f = theirs.encode(h)
        assert 0.02 < (f != 0).float().mean() < 0.9
        close(ours.encode(h), f)
        torch.testing.assert_close(ours.decode(f), theirs.decode(f), rtol=0, atol=decoded_rounding(f, ours.W_dec))
    assert f"blocks.{ours.layer}.hook_resid_post" == theirs.cfg.metadata.hook_name


@pytest.mark.parametrize("dict_class", ["AutoEncoderNew", None])
def test_autoencoder_of_the_april_update(h: Tensor, tmp_path: Path, dict_class: str | None) -> None:
    torch.save(linear(bias="decoder.bias"), tmp_path / "ae.pt")
    t = tensors()
    close(FrozenSAE.load(tmp_path, dict_class=dict_class).encode(h), (h @ t["W_enc"] + t["b_enc"]).relu())


def test_a_compiled_module(tmp_path: Path) -> None:
    compiled = torch.compile(nn.Linear(3, 2), backend="eager").state_dict()
    assert set(compiled) == {"_orig_mod.weight", "_orig_mod.bias"}
    plain = linear(bias="bias")
    file = save(tmp_path, plain, "AutoEncoder")
    expected = FrozenSAE.load(file).fingerprint
    save(tmp_path, {f"_orig_mod.{name}": tensor for name, tensor in plain.items()}, "AutoEncoder")
    assert FrozenSAE.load(file).fingerprint == expected
    save(tmp_path, plain | {"_orig_mod.bias": plain["bias"]}, "AutoEncoder")
    with pytest.raises(SAEError, match=r"ae.pt: tensors is twice, with and without '_orig_mod.': bias; accepted"):
        FrozenSAE.load(file)


def test_a_checkpoint_of_the_training(tmp_path: Path) -> None:
    """Its configuration is in the folder above."""
    file = save(tmp_path, linear(bias="bias"), "AutoEncoder", file="checkpoints/ae_1000.pt")
    assert read_sae(file).layer == 4


@pytest.mark.parametrize("state", [[torch.ones(2)], {1: torch.ones(2)}, torch.ones(2)])
def test_not_a_state_dict(tmp_path: Path, state: Any) -> None:
    torch.save(state, tmp_path / "ae.pt")
    with pytest.raises(SAEError, match=r"ae.pt is a (list|dict|Tensor); accepted: a state dict, of tensors by name"):
        read_sae(tmp_path)
