"""SAEs in every file format, and sae-lens itself."""

from __future__ import annotations

import json
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dspa.errors import SAEError
from dspa.saes.frozen import FrozenSAE

from ..support.saes import (
    D_IN,
    D_SAE,
    GATED,
    JUMPRELU,
    NORMALIZATIONS,
    OF_ARCH,
    STANDARD,
    K,
    close,
    decoded_rounding,
    make,
    named,
    tensors,
)

# sae-lens itself


@pytest.fixture(scope="session")
def sae_lens() -> Any:
    return pytest.importorskip("sae_lens")


def lens_sae(sae_lens: Any, arch: str, metadata: dict[str, Any] | None = None, **cfg: Any) -> Any:
    names = {"standard": "Standard", "jumprelu": "JumpReLU", "topk": "TopK", "gated": "Gated"}
    config = getattr(sae_lens, f"{names[arch]}SAEConfig")(d_in=D_IN, d_sae=D_SAE, **cfg)
    for key, value in (metadata or {}).items():
        config.metadata[key] = value
    sae = getattr(sae_lens, f"{names[arch]}SAE")(config)
    sae.load_state_dict(named(*OF_ARCH[arch]))
    return sae


CASES = [
    (arch, rescale)
    for arch, rescale in [("standard", None), ("jumprelu", None), ("gated", None), ("topk", False), ("topk", True)]
]


def config_of(arch: str, rescale: bool | None, apply_b_dec: bool, normalize: str) -> dict[str, Any]:
    cfg: dict[str, Any] = {"apply_b_dec_to_input": apply_b_dec, "normalize_activations": normalize}
    return cfg | ({"k": K, "rescale_acts_by_decoder_norm": rescale} if arch == "topk" else {})


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("apply_b_dec", [False, True])
@pytest.mark.parametrize(("arch", "rescale"), CASES)
def test_against_sae_lens(
    sae_lens: Any, h: Tensor, tmp_path: Path, arch: str, rescale: bool | None, apply_b_dec: bool, normalize: str
) -> None:
    """sae-lens' object, its folder read by us, and our folder read by it, all encode and decode as sae-lens does."""
    theirs = lens_sae(
        sae_lens,
        arch,
        {"hook_name": "blocks.3.hook_resid_post", "model_name": "gemma-2-2b"},
        **config_of(arch, rescale, apply_b_dec, normalize),
    )
    theirs.save_model(tmp_path / "theirs")
    ours = FrozenSAE.from_sae_lens(theirs)
    ours.save(tmp_path / "ours")
    with torch.no_grad():
        f = theirs.encode(h)
        recon = theirs.decode(f)
        back = sae_lens.SAE.load_from_disk(tmp_path / "ours")
        assert (f != 0).float().mean() > 0.02
        norms = theirs.W_dec.norm(dim=1) if rescale else 1
        scale = 1.0 if normalize == "none" else float(h.norm(dim=-1).max()) / D_IN**0.5
        close(back.encode(h), f)
        atol = decoded_rounding(f / norms, theirs.W_dec, scale)
        torch.testing.assert_close(back.decode(back.encode(h)), recon, rtol=0, atol=atol)
    loaded = FrozenSAE.load(tmp_path / "theirs")
    again = FrozenSAE.load(tmp_path / "ours")
    for sae in (ours, loaded, again, FrozenSAE.from_sae_lens(back)):
        close(sae.encode(h), f)
        torch.testing.assert_close(sae.decode(sae.encode(h), like=h), recon, rtol=0, atol=atol)
        assert (sae.layer, sae.model_name) == (3, "gemma-2-2b")
        assert sae.fingerprint == ours.fingerprint and sae.folded == ours.folded
    names = ["gated"] * (arch == "gated") + ["apply_b_dec_to_input"] * apply_b_dec
    assert ours.folded == tuple(names + ["rescale_acts_by_decoder_norm"] * bool(rescale))


@pytest.mark.parametrize("normalize", ["expected_average_only_in", "covariance_whitening"])
def test_sae_lens_normalisations_of_training(sae_lens: Any, h: Tensor, normalize: str) -> None:
    theirs = lens_sae(sae_lens, "jumprelu", apply_b_dec_to_input=False, normalize_activations=normalize)
    with pytest.warns(UserWarning, match=r"does nothing at inference"):
        ours = FrozenSAE.from_sae_lens(theirs)
    with torch.no_grad():
        close(ours.encode(h), theirs.encode(h))


def test_bf16_is_saved_so_that_sae_lens_keeps_the_thresholds(sae_lens: Any, h: Tensor, tmp_path: Path) -> None:
    sae = make(layer=3).to(dtype=torch.bfloat16)
    sae.save(tmp_path)
    stored = load_file(tmp_path / "sae_weights.safetensors")
    assert stored["W_enc"].dtype == torch.bfloat16 and stored["threshold"].dtype == torch.float32
    assert torch.equal(stored["threshold"], make().threshold)
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    with torch.no_grad():
        close(sae.encode(h), theirs.encode(h))
    again = FrozenSAE.load(tmp_path)
    assert again.dtype == torch.bfloat16 and again.fingerprint == sae.fingerprint == make().fingerprint
    assert torch.equal(again.encode(h), sae.encode(h))
    assert FrozenSAE.from_sae_lens(theirs).fingerprint == sae.fingerprint


def test_from_sae_lens_copies(sae_lens: Any) -> None:
    theirs = lens_sae(sae_lens, "jumprelu", apply_b_dec_to_input=False)
    ours = FrozenSAE.from_sae_lens(theirs, layer=1, model_name="m")
    theirs.W_dec.data.zero_()
    assert torch.equal(ours.W_dec, tensors()["W_dec"]) and (ours.layer, ours.model_name) == (1, "m")


@pytest.mark.parametrize(
    "other", [None, "gemma-scope", torch.nn.Linear(2, 2), (make(), {}, None), torch.nn.Module], ids=str
)
def test_from_sae_lens_of_another_object(other: object) -> None:
    with pytest.raises(SAEError, match=r"`sae` is a .*accepted: an SAE of sae-lens 6\. .*load\(path\)"):
        FrozenSAE.from_sae_lens(other)


def test_batchtopk_of_sae_lens_after_training(sae_lens: Any, h: Tensor, tmp_path: Path) -> None:
    cfg = sae_lens.BatchTopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=4, rescale_acts_by_decoder_norm=True)
    training = sae_lens.BatchTopKTrainingSAE(cfg)
    training.load_state_dict(named(*STANDARD) | {"topk_threshold": torch.tensor(1.5, dtype=torch.float64)})
    with pytest.raises(SAEError, match=r"a BatchTopKTrainingSAE, which is for training.*save_inference_model"):
        FrozenSAE.from_sae_lens(training)
    training.save_inference_model(tmp_path)
    sae = FrozenSAE.load(tmp_path, layer=2)
    with torch.no_grad():
        close(sae.encode(h), sae_lens.SAE.load_from_disk(tmp_path).encode(h))
    assert sae.arch == "jumprelu" and set(sae.threshold.tolist()) == {1.5}


@pytest.mark.parametrize("name", ["TopK", "Standard", "JumpReLU", "Gated"])
def test_an_sae_in_training_is_refused(sae_lens: Any, name: str) -> None:
    config = getattr(sae_lens, f"{name}TrainingSAEConfig")(d_in=D_IN, d_sae=D_SAE)
    with pytest.raises(SAEError, match=rf"a {name}TrainingSAE, which is for training; .*save_inference_model"):
        FrozenSAE.from_sae_lens(getattr(sae_lens, f"{name}TrainingSAE")(config))


@pytest.mark.parametrize("error", [ConnectionError("no network"), ValueError("Release r not found")], ids=repr)
def test_from_pretrained_of_what_is_not_available(
    sae_lens: Any, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: str) -> None:
        raise error

    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", fail)
    with pytest.raises(
        SAEError, match=rf"release:id is not available \(\w+: {error}\); accepted.*load\(path\)"
    ) as raised:
        FrozenSAE.from_pretrained("release", "id")
    assert raised.value.__cause__ is error


@pytest.mark.parametrize("name", ["AbsTopKSAE", "MatchingPursuitSAE"])
def test_other_sae_lens_architectures_are_refused_by_name(sae_lens: Any, name: str) -> None:
    config = getattr(sae_lens, f"{name}Config")(d_in=D_IN, d_sae=D_SAE)
    with pytest.raises(SAEError, match=r"architecture is .*accepted: standard, jumprelu, topk, gated"):
        FrozenSAE.from_sae_lens(getattr(sae_lens, name)(config))


def test_from_pretrained_asks_sae_lens(sae_lens: Any, h: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = lens_sae(sae_lens, "jumprelu", {"hook_name": "blocks.7.hook_resid_post"}, apply_b_dec_to_input=False)
    asked = []
    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", lambda *args: asked.append(args) or theirs)
    sae = FrozenSAE.from_pretrained("release", "layer_7/canonical", dtype=torch.bfloat16)
    assert asked == [("release", "layer_7/canonical")] and sae.layer == 7 and sae.dtype == torch.bfloat16
    assert sae.fingerprint == make().fingerprint


def test_from_pretrained_without_sae_lens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    message = 'needs the package sae-lens, .* pip install "sae-lens.*6[.]54.*FrozenSAE.load'
    with pytest.raises(RuntimeError, match=message):
        FrozenSAE.from_pretrained("release", "id")


# Files


def lens_folder(folder: Path, arch: str = "jumprelu", **changes: Any) -> Path:
    """A SAELens folder written by hand, as version 6 writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(named(*OF_ARCH[arch]), folder / "sae_weights.safetensors")
    cfg = {
        "architecture": arch,
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"hook_name": "blocks.5.hook_resid_post", "model_name": "m", "sae_lens_version": "6.5.0"},
    }
    (folder / "cfg.json").write_text(json.dumps(cfg | changes))
    return folder


def gemma_scope(folder: Path) -> Path:
    arrays = {name: tensor.numpy() for name, tensor in named(*JUMPRELU).items()}
    np.savez(folder / "params.npz", **arrays)
    return folder


def linear(bias: str = "b_dec") -> dict[str, Tensor]:
    """The SAE under the names of dictionary_learning's classes with nn.Linear layers."""
    t = tensors()
    return {
        "encoder.weight": t["W_enc"].T.contiguous(),
        "encoder.bias": t["b_enc"],
        "decoder.weight": t["W_dec"].T.contiguous(),
        bias: t["b_dec"],
    }


def dictionary(name: str) -> dict[str, Tensor]:
    t = tensors()
    learned = {"k": torch.tensor(K, dtype=torch.int32), "threshold": torch.tensor(0.7)}
    if name == "AutoEncoder":
        return linear("bias")
    if name == "GatedAutoEncoder":
        gates = {"gate_bias": t["b_gate"], "mag_bias": t["b_mag"], "r_mag": t["r_mag"]}
        state = linear("decoder_bias") | gates
        del state["encoder.bias"]
        return state
    if name == "JumpReluAutoEncoder":
        return named(*JUMPRELU)
    if name == "MatryoshkaBatchTopKSAE":
        return named(*STANDARD) | learned | {"group_sizes": torch.tensor([10, 30])}
    return linear() | learned


def dictionary_latents(name: str, h: Tensor) -> Tensor:
    """Result of each class's `encode` (https://github.com/saprmarks/dictionary_learning)."""
    t = tensors()
    x = h if name == "JumpReluAutoEncoder" else h - t["b_dec"]
    z = x @ t["W_enc"]
    pre = z + t["b_enc"]
    if name == "AutoEncoder":
        return pre.relu()
    if name == "AutoEncoderTopK":
        top = pre.relu().topk(K)
        return torch.zeros_like(pre).scatter_(-1, top.indices, top.values)
    if name == "GatedAutoEncoder":
        return (z + t["b_gate"] > 0).float() * (t["r_mag"].exp() * z + t["b_mag"]).relu()
    threshold = t["threshold"] if name == "JumpReluAutoEncoder" else 0.7
    return pre.relu() * (pre.relu() > threshold)


DICT_CLASSES = (
    "AutoEncoder",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
    "JumpReluAutoEncoder",
    "GatedAutoEncoder",
)


def trainer_config(name: str, **changes: Any) -> dict[str, Any]:
    trainer = {"dict_class": name, "layer": 4, "lm_name": "Qwen/Qwen3-8B", "submodule_name": "resid_post_layer_4"}
    return {"trainer": trainer | {"k": K, "activation_dim": D_IN} | changes, "buffer": {"ctx_len": 64}}


def dictionary_folder(folder: Path, name: str, config: dict[str, Any] | None = None, **state: Any) -> Path:
    torch.save(dictionary(name) | state, folder / "ae.pt")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", DICT_CLASSES)
def test_dictionary_learning(h: Tensor, tmp_path: Path, name: str) -> None:
    sae = FrozenSAE.load(dictionary_folder(tmp_path, name, trainer_config(name)))
    expected = dictionary_latents(name, h)
    close(sae.encode(h), expected)
    W_dec, b_dec = tensors()["W_dec"], tensors()["b_dec"]
    atol = decoded_rounding(expected, W_dec)
    torch.testing.assert_close(sae.decode(sae.encode(h)), expected @ W_dec + b_dec, rtol=0, atol=atol)
    assert (sae.layer, sae.model_name) == (4, "Qwen/Qwen3-8B")


@pytest.mark.parametrize("name", DICT_CLASSES)
def test_dictionary_learning_without_config(h: Tensor, tmp_path: Path, name: str) -> None:
    dictionary_folder(tmp_path, name)
    # SAELens has the tensors of the last one too, for SAEs that take b_dec off their input.
    uncertain = {
        "AutoEncoderTopK": "AutoEncoderTopK, BatchTopKSAE",
        "BatchTopKSAE": "AutoEncoderTopK, BatchTopKSAE",
        "JumpReluAutoEncoder": "JumpReluAutoEncoder. For an SAE of SAELens, load the folder",
    }
    if name in uncertain:
        with pytest.raises(SAEError, match=rf"not certain.*dict_class= one of {uncertain[name]}"):
            FrozenSAE.load(tmp_path / "ae.pt", layer=4)
    for dict_class in {name, name if name in uncertain else None}:
        sae = FrozenSAE.load(tmp_path / "ae.pt", layer=4, dict_class=dict_class)
        close(sae.encode(h), dictionary_latents(name, h))
        assert sae.layer == 4 and sae.model_name is None


def test_topk_of_early_dictionary_learning(h: Tensor, tmp_path: Path) -> None:
    torch.save(linear(), tmp_path / "ae.pt")
    with pytest.raises(
        SAEError, match=r"ae.pt: `k` is not in the file; accepted: the number .*FrozenSAE.load\(path, k=...\)"
    ):
        FrozenSAE.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(trainer_config("AutoEncoderTopK")))
    for k in (None, K):
        close(FrozenSAE.load(tmp_path, k=k).encode(h), dictionary_latents("AutoEncoderTopK", h))
    with pytest.raises(SAEError, match=rf"`k` is {K} and {K + 1}; accepted: one of them"):
        FrozenSAE.load(tmp_path, k=K + 1)


def test_gemma_scope(h: Tensor, tmp_path: Path) -> None:
    gemma_scope(tmp_path)
    for path in (tmp_path, str(tmp_path / "params.npz")):
        sae = FrozenSAE.load(path)
        assert torch.equal(sae.encode(h), make().encode(h)) and sae.layer is None and not sae.folded
    sae = FrozenSAE.load(tmp_path, layer=24, model_name="gemma-2-2b", dtype=torch.bfloat16)
    assert (sae.layer, sae.model_name, sae.dtype) == (24, "gemma-2-2b", torch.bfloat16)
    assert sae.fingerprint == make().fingerprint


def test_one_fingerprint_from_every_format(tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("lens", "npz", "pt", "gated lens", "gated pt")}
    for folder in folders.values():
        folder.mkdir()
    lens_folder(folders["lens"])
    gemma_scope(folders["npz"])
    dictionary_folder(folders["pt"], "JumpReluAutoEncoder", trainer_config("JumpReluAutoEncoder"))
    lens_folder(folders["gated lens"], "gated", apply_b_dec_to_input=True)
    dictionary_folder(folders["gated pt"], "GatedAutoEncoder")
    prints = {name: FrozenSAE.load(folder).fingerprint for name, folder in folders.items()}
    assert prints["lens"] == prints["npz"] == prints["pt"] == make().fingerprint
    assert prints["gated lens"] == prints["gated pt"] != prints["lens"]


@pytest.mark.parametrize("name", GATED)
def test_fingerprint_of_a_gated_sae_is_of_what_was_stored(tmp_path: Path, name: str) -> None:
    before = FrozenSAE.load(lens_folder(tmp_path, "gated")).fingerprint
    t = named(*GATED)
    t[name].view(-1)[-1] += 1e-3
    save_file(t, tmp_path / "sae_weights.safetensors")
    assert FrozenSAE.load(tmp_path).fingerprint != before


@pytest.mark.parametrize("name", ["", "cfg.json", "sae_weights.safetensors"])
def test_sae_lens_folder_or_file(h: Tensor, tmp_path: Path, name: str) -> None:
    sae = FrozenSAE.load(lens_folder(tmp_path) / name)
    assert torch.equal(sae.encode(h), make().encode(h)) and (sae.layer, sae.model_name) == (5, "m")


@pytest.mark.parametrize("hook_key", ["hook_name", "hook_point"])
@pytest.mark.parametrize("normalize", [None, False])
def test_flat_config_before_version_6(h: Tensor, tmp_path: Path, hook_key: str, normalize: bool | None) -> None:
    lens_folder(tmp_path, "topk")
    cfg = {hook_key: "blocks.8.hook_resid_pre", "model_name": "gpt2-small", "normalize_activations": normalize}
    cfg |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "d_in": D_IN, "d_sae": D_SAE}
    cfg |= {"model_from_pretrained_kwargs": {}}
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    ones = {"scaling_factor": torch.ones(D_SAE)}
    save_file(named(*STANDARD) | ones, tmp_path / "sae_weights.safetensors")
    sae = FrozenSAE.load(tmp_path)
    # The flat format subtracts b_dec unless it says otherwise.
    assert torch.equal(sae.encode(h), make("topk", apply_b_dec_to_input=True).encode(h))
    assert (sae.layer, sae.model_name) == (7, "gpt2-small")
    save_file(named(*STANDARD) | {"scaling_factor": torch.full((D_SAE,), 2.0)}, tmp_path / "sae_weights.safetensors")
    with pytest.raises(SAEError, match=r"has scaling_factor"):
        FrozenSAE.load(tmp_path)


def test_layer_that_contradicts(tmp_path: Path) -> None:
    lens_folder(tmp_path)
    assert FrozenSAE.load(tmp_path, layer=5, model_name="other").model_name == "other"
    with pytest.raises(SAEError, match=r"`layer` is 6; accepted: 5, as .* says"):
        FrozenSAE.load(tmp_path, layer=6)


# Save, load, and what may not happen in between


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("arch", ["standard", "jumprelu", "topk"])
def test_save_and_load(h: Tensor, tmp_path: Path, arch: str, dtype: torch.dtype) -> None:
    source = make(
        arch, layer=3, model_name="m", apply_b_dec_to_input=True, normalize_activations="constant_norm_rescale"
    )
    sae = source.to(dtype=dtype)
    sae.save(tmp_path / "new" / "folder")
    again = FrozenSAE.load(tmp_path / "new" / "folder")
    assert torch.equal(again.encode(h), sae.encode(h))
    assert torch.equal(again.decode(again.encode(h), like=h), sae.decode(sae.encode(h), like=h))
    assert again.dtype == dtype and repr(again) == repr(sae)
    assert again.fingerprint == source.fingerprint
    again.to(dtype=torch.bfloat16).save(tmp_path / "second")
    assert FrozenSAE.load(tmp_path / "second").fingerprint == source.fingerprint


def test_a_threshold_of_infinity_survives(h: Tensor, tmp_path: Path) -> None:
    t = named(*JUMPRELU)
    t["threshold"][:20] = torch.inf
    sae = FrozenSAE("jumprelu", **t).to(dtype=torch.bfloat16)
    sae.save(tmp_path)
    again = FrozenSAE.load(tmp_path)
    assert not again.encode(100 * h)[..., :20].any() and again.encode(100 * h)[..., 20:].any()


CHANGED = "(not the one that was saved|changed after it was written)"


def change_weights(folder: Path) -> None:
    t = load_file(folder / "sae_weights.safetensors")
    t["W_dec"][0, 0] += 0.1
    save_file(t, folder / "sae_weights.safetensors")


def change_config(folder: Path) -> None:
    cfg = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(cfg | {"apply_b_dec_to_input": True}))


def change_record(folder: Path) -> None:
    cfg = json.loads((folder / "cfg.json").read_text())
    del cfg["metadata"]["dspa"]["fingerprint"]
    (folder / "cfg.json").write_text(json.dumps(cfg))


@pytest.mark.parametrize("change", [change_weights, change_config, change_record])
def test_a_changed_folder_is_refused(tmp_path: Path, change: Callable[[Path], None]) -> None:
    make().save(tmp_path)
    change(tmp_path)
    with pytest.raises(SAEError, match=rf"{CHANGED}.*remove 'dspa' from the metadata"):
        FrozenSAE.load(tmp_path)


def test_a_change_that_is_meant(tmp_path: Path) -> None:
    make().save(tmp_path)
    change_weights(tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    del cfg["metadata"]["dspa"]
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    assert FrozenSAE.load(tmp_path).fingerprint != make().fingerprint


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "temporal"}, "architecture is 'temporal'; accepted: standard, jumprelu, topk, gated"),
        ({"activation_fn": "tanh-relu"}, "activation function is 'tanh-relu'; accepted: relu, topk"),
        ({"reshape_activations": "hook"}, "reshape_activations is 'hook'; accepted: none, hook_z"),
        ({"d_sae": 41}, r"`W_enc` is of shape \[12, 40\]; accepted: \[12, 41\]"),
        ({"architecture": "standard"}, "has threshold; accepted: exactly W_dec, W_enc, b_dec, b_enc"),
        ({"architecture": "gated"}, "lacks b_gate, b_mag, r_mag and has b_enc, threshold"),
        ({"metadata": 3}, "`metadata` is 3; accepted: an object"),
        ({"normalize_activations": "l2"}, "'l2'; accepted: none, layer_norm"),
        ({"normalize_activations": 3}, "`normalize_activations` is 3; accepted: the name of a normalisation"),
        ({"apply_b_dec_to_input": "false"}, "`apply_b_dec_to_input` is 'false'; accepted: true or false"),
        ({"rescale_acts_by_decoder_norm": 1}, "`rescale_acts_by_decoder_norm` is 1; accepted: true or false"),
        ({"d_in": 0}, "`d_in` is 0; accepted: a whole number >= 1"),
        ({"d_sae": 40.0}, r"`d_sae` is 40\.0; accepted: a whole number >= 1"),
        ({"metadata": {"model_name": ["m"]}}, r"`metadata\.model_name` is \['m'\]; accepted: text"),
        ({"hook_name": 5}, "`hook_name` is 5; accepted: text"),
        ({"architecture": ["jumprelu"]}, r"architecture is \['jumprelu'\]; accepted: standard"),
        *(
            ({"architecture": "topk", "k": k}, rf"`k` is {k!r}; accepted: a whole number >= 1")
            for k in (True, 3.7, 0, -1, "3")
        ),
    ],
)
def test_sae_lens_folder_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = lens_folder(tmp_path / "folder", **changes)
    with pytest.raises(SAEError, match=rf"{folder}.*{message}"):
        FrozenSAE.load(folder)


@pytest.mark.parametrize(
    ("config", "state", "message"),
    [
        (
            trainer_config("CrossCoder"),
            {},
            "class is CrossCoder; accepted: AutoEncoder, AutoEncoderNew, AutoEncoderTopK",
        ),
        (trainer_config("BatchTopKSAE"), {"threshold": torch.tensor(-1.0)}, "threshold` is -1.0, which is unset"),
        (trainer_config("AutoEncoder"), {}, "lacks bias and has b_dec, k, threshold"),
        (trainer_config("AutoEncoderTopK", k=6), {}, "`k` is 5 and 6"),
        (trainer_config("AutoEncoderTopK", layer=5), {}, "`layer` is 4 and 5"),
        ({"buffer": {}}, {}, "`trainer` is missing"),
        (trainer_config("AutoEncoderTopK"), {"k": torch.tensor(41)}, "`k` is 41 and 5"),
        (trainer_config("AutoEncoderTopK", k=41), {"k": torch.tensor(41)}, "`k` is 41; accepted: 1 to d_sae"),
        (trainer_config("AutoEncoderTopK", k=True), {}, "`trainer.k` is True; accepted: a whole number >= 1"),
        (trainer_config("AutoEncoderTopK", layer=1.5), {}, r"`trainer.layer` is 1\.5; accepted: a whole number >= 0"),
        (trainer_config("AutoEncoderTopK"), {"k": torch.tensor(3.7)}, r"`k` is 3\.7"),
        (None, {"step": 3}, "a dict in which step are not dense tensors; accepted: a state dict of tensors"),
        (None, {"extra": torch.ones(1)}, "not certain.*AutoEncoder, AutoEncoderNew, AutoEncoderTopK"),
    ],
)
def test_dictionary_refused(tmp_path: Path, config: dict[str, Any] | None, state: dict[str, Any], message: str) -> None:
    folder = dictionary_folder(tmp_path, "AutoEncoderTopK", config, **state)
    with pytest.raises(SAEError, match=message):
        FrozenSAE.load(folder)


def test_dict_class_that_contradicts(tmp_path: Path) -> None:
    dictionary_folder(tmp_path, "BatchTopKSAE", trainer_config("BatchTopKSAE"))
    with pytest.raises(SAEError, match=r"`dict_class` is 'AutoEncoderTopK' and 'BatchTopKSAE'"):
        FrozenSAE.load(tmp_path, dict_class="AutoEncoderTopK")


def test_gated_shapes_refused(tmp_path: Path) -> None:
    dictionary_folder(tmp_path, "GatedAutoEncoder", r_mag=torch.ones(3))
    with pytest.raises(SAEError, match=r"ae.pt: the gated SAE is of shapes .*'r_mag': \[3\]"):
        FrozenSAE.load(tmp_path)


def test_gemma_scope_names_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "params.npz", W_enc=np.ones((3, 4), np.float32), affine=np.ones(3))
    with pytest.raises(SAEError, match=r"params.npz lacks W_dec, b_dec, b_enc, threshold and has affine"):
        FrozenSAE.load(tmp_path)


def write_npz(folder: Path) -> Path:
    return gemma_scope(folder) / "params.npz"


def write_pt(folder: Path) -> Path:
    return dictionary_folder(folder, "AutoEncoder") / "ae.pt"


def write_safetensors(folder: Path) -> Path:
    return lens_folder(folder) / "sae_weights.safetensors"


@pytest.mark.parametrize("write", [write_npz, write_pt, write_safetensors])
@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_damaged_files(tmp_path: Path, write: Callable[[Path], Path], damage: str) -> None:
    file = write(tmp_path)
    whole = file.read_bytes()
    file.write_bytes({"truncated": whole[: len(whole) // 2], "garbage": b"\x93garbage" * 99, "empty": b""}[damage])
    with pytest.raises(SAEError, match=rf"{file.name} is not readable \(\w+\); accepted: an undamaged file"):
        FrozenSAE.load(file)


def test_damaged_config(tmp_path: Path) -> None:
    (lens_folder(tmp_path) / "cfg.json").write_text("{")
    with pytest.raises(SAEError, match=r"cfg.json is not JSON"):
        FrozenSAE.load(tmp_path)
    (tmp_path / "cfg.json").write_text("[]")
    with pytest.raises(SAEError, match=r"cfg.json is \[\]; accepted: an object"):
        FrozenSAE.load(tmp_path)
    (tmp_path / "cfg.json").unlink()
    with pytest.raises(SAEError, match=r"cfg.json is not there"):
        FrozenSAE.load(tmp_path)


class Trap:
    """Unpickling this calls the function, which a loader must never do."""

    sprung = False

    def __reduce__(self) -> tuple[Any, ...]:
        return spring, ()


def spring() -> None:
    Trap.sprung = True


@pytest.mark.parametrize("name", ["ae.pt", "params.npz"])
def test_nothing_is_unpickled(tmp_path: Path, name: str) -> None:
    if name == "ae.pt":
        torch.save(dictionary("AutoEncoder") | {"more": Trap()}, tmp_path / name)
    else:
        names = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
        np.savez(tmp_path / name, **dict.fromkeys(names, np.array([Trap()], dtype=object)))
    Trap.sprung = False
    with pytest.raises(SAEError, match=r"not readable .*without pickled objects"):
        FrozenSAE.load(tmp_path)
    assert not Trap.sprung
    pickle.loads(pickle.dumps(Trap()))
    assert Trap.sprung


def test_paths_refused(tmp_path: Path) -> None:
    with pytest.raises(SAEError, match=r"gone is not there; accepted: a folder with one of sae_weights"):
        FrozenSAE.load(tmp_path / "gone")
    with pytest.raises(SAEError, match=r"a folder with none of these files \(it is empty\).*\*\.pt, or such a file\.$"):
        FrozenSAE.load(tmp_path)
    with pytest.raises(SAEError, match=r"`path` is None; accepted: the path of a folder"):
        FrozenSAE.load(None)
    with pytest.raises(SAEError, match=r"from_pretrained\('a-release', 'blocks\.3/res'\)"):
        FrozenSAE.load("a-release:blocks.3/res")
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(SAEError, match=r"a file of unknown kind '.bin'"):
        FrozenSAE.load(tmp_path / "weights.bin")
    gemma_scope(dictionary_folder(tmp_path, "AutoEncoder"))
    with pytest.raises(SAEError, match=r"a folder with several of these files \(ae\.pt, .*Name the file"):
        FrozenSAE.load(tmp_path)
    assert FrozenSAE.load(tmp_path / "ae.pt").arch == "standard"


@pytest.mark.parametrize("value", [["x"], {"x": 1}, [[]], 3.5, True])
@pytest.mark.parametrize("key", ["architecture", "hook_name"])
def test_values_of_other_types(tmp_path: Path, key: str, value: object) -> None:
    file = lens_folder(tmp_path) / "cfg.json"
    cfg = json.loads(file.read_text())
    cfg["metadata"] = {**cfg.get("metadata", {}), key: value}
    file.write_text(json.dumps(cfg | {key: value}))
    with pytest.raises(SAEError, match=re.escape(repr(value)[:20])):
        FrozenSAE.load(tmp_path)


@pytest.mark.parametrize("value", [["x"], {"x": 1}])
@pytest.mark.parametrize("key", ["dict_class", "submodule_name"])
def test_values_of_other_types_of_dictionary_learning(tmp_path: Path, key: str, value: object) -> None:
    dictionary_folder(tmp_path, "AutoEncoder", trainer_config("AutoEncoder", **{key: value}))
    with pytest.raises(SAEError, match=re.escape(repr(value))):
        FrozenSAE.load(tmp_path)
