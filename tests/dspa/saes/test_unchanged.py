"""An SAE is what its fingerprint says: changed tensors and edited files are refused, and copies share no memory."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import dspa
from dspa.errors import SAEError
from dspa.files import sealed
from dspa.fsrl import FSRLAdapter
from dspa.saes.frozen import FrozenSAE
from dspa.testing import D_SAE_OUT, L_IN, L_OUT, make_map, make_model, make_sae
from dspa_kernels.nn import FusedSAE

from ..support.saes import GATED, JUMPRELU, make, named

PROMPT = torch.tensor([[1, 5, 9, 33, 20, 7]])
NAMES = ("W_enc", "b_enc", "threshold", "W_dec", "b_dec")


def replace_weights(sae: FrozenSAE) -> None:
    sae._weights = replace(sae.weights, W_dec=2 * sae.W_dec)


def replace_data(sae: FrozenSAE) -> None:
    sae.W_dec.data = 2 * sae.W_dec


def replace_data_twice(sae: FrozenSAE) -> None:
    """So that the second tensor may get the memory of the one before the first."""
    sae.W_dec.data = 2 * sae.W_dec
    sae.W_dec.data = 2 * sae.W_dec


CHANGES: dict[str, Callable[[FrozenSAE], object]] = {
    **{f"{name} in place": lambda sae, name=name: getattr(sae, name).mul_(2) for name in NAMES},
    "one number": lambda sae: sae.W_dec[0].__setitem__(0, 9.0),
    "rows, through their view": lambda sae: sae.W_enc[:, :3].zero_(),
    "weights": replace_weights,
    "data": replace_data,
    "data, twice": replace_data_twice,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_sae_is_refused(change: str, tmp_path: Path) -> None:
    sae_in, sae, model = make_sae(L_IN, 64), make_sae(L_OUT, D_SAE_OUT), make_model("gemma2")
    cdmap = make_map(sae_in, sae)
    steering, adapter = dspa.Steering(sae_in, sae, cdmap), FSRLAdapter(sae)
    CHANGES[change](sae)
    uses: dict[str, Callable[[], object]] = {
        "fingerprint": lambda: sae.fingerprint,
        "save": lambda: sae.save(tmp_path),
        "to": lambda: sae.to(dtype=torch.bfloat16),
        "copy": lambda: copy.copy(sae),
        "deepcopy": lambda: copy.deepcopy(sae),
        "a new Steering": lambda: dspa.Steering(sae_in, sae, cdmap),
        "attach a Steering": lambda: steering.attach(model),
        "attach an adapter": lambda: adapter.attach(model),
    }
    for use in uses.values():
        with pytest.raises(SAEError, match=r"changed .* after the SAE was made"):
            use()


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("which", ["sae_in", "sae_out", "adapter"])
def test_changed_while_attached(which: str, change: str) -> None:
    sae_in, sae_out, model = make_sae(L_IN, 64), make_sae(L_OUT, D_SAE_OUT), make_model("gemma2")
    attachable: Any
    if which == "adapter":
        attachable = FSRLAdapter(sae_out)
    else:
        attachable = dspa.Steering(sae_in, sae_out, make_map(sae_in, sae_out))
    with attachable.attach(model):
        model.generate(PROMPT, max_new_tokens=2)
        CHANGES[change](sae_in if which == "sae_in" else sae_out)
        with pytest.raises(SAEError, match=r"changed .* after the SAE was made"):
            model.generate(PROMPT, max_new_tokens=2)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda sae: pickle.loads(pickle.dumps(sae))])
def test_a_copy_is_the_same_sae_and_is_watched_too(copied: Callable[[FrozenSAE], FrozenSAE]) -> None:
    sae = make(apply_b_dec_to_input=True)
    same = copied(sae)
    assert same.fingerprint == sae.fingerprint
    same.b_enc.zero_()
    with pytest.raises(SAEError, match=r"changed \(b_enc\)"):
        same.check_unchanged()


def test_use_changes_nothing() -> None:
    sae = make_sae(L_OUT, D_SAE_OUT)
    model, adapter = make_model("gemma2"), FSRLAdapter(sae)
    with torch.inference_mode(), adapter.attach(model):
        model.generate(PROMPT, max_new_tokens=2)
    sae.check_unchanged()
    with torch.inference_mode():
        FrozenSAE("jumprelu", **named(*JUMPRELU)).check_unchanged()


@pytest.mark.parametrize("how", ["load_state_dict", "in place", "b_dec"])
def test_a_fused_sae_has_memory_of_its_own(how: str) -> None:
    sae, h = make(), torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    expected, fingerprint = sae.decode(sae.encode(h)), sae.fingerprint
    fused = FusedSAE(sae.weights, sae.b_dec)
    before = fused(h)
    if how == "load_state_dict":
        fused.load_state_dict({name: tensor * 0.5 for name, tensor in fused.state_dict().items()})
    elif how == "in place":
        fused.W_dec.mul_(2)
    else:
        fused.b_dec.add_(1)
    assert not torch.equal(fused(h), before)
    assert torch.equal(sae.decode(sae.encode(h)), expected) and sae.fingerprint == fingerprint
    assert fused.weights.W_dec is fused.W_dec


# What is lent is not what was loaded


def gated_folder(folder: Path, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "cfg.json").write_text(
        json.dumps({"architecture": "gated", "d_in": 12, "d_sae": 40, "apply_b_dec_to_input": False, "metadata": {}})
    )
    save_file(tensors, folder / "sae_weights.safetensors")
    return folder


def test_the_fingerprint_is_of_what_was_loaded(tmp_path: Path) -> None:
    """Not of what the file holds when the fingerprint is first asked for."""
    tensors = named(*GATED)
    expected = FrozenSAE.load(gated_folder(tmp_path / "one", tensors)).fingerprint
    sae = FrozenSAE.load(gated_folder(tmp_path / "two", tensors))
    file = tmp_path / "two" / "sae_weights.safetensors"
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, tmp_path / "other")
    with file.open("r+b") as opened:  # In place: as `cp` onto it does.
        opened.write((tmp_path / "other").read_bytes())
    assert sae.fingerprint == expected


def test_the_fingerprint_is_of_what_was_copied() -> None:
    """Not of an SAE of SAELens that was trained further."""
    sae_lens = pytest.importorskip("sae_lens")
    theirs = sae_lens.GatedSAE(sae_lens.GatedSAEConfig(d_in=12, d_sae=40))
    theirs.load_state_dict(named(*GATED))
    expected = FrozenSAE.from_sae_lens(theirs).fingerprint
    sae = FrozenSAE.from_sae_lens(theirs)
    with torch.no_grad():
        theirs.W_dec.mul_(2)
    assert sae.fingerprint == expected


# What a saved folder says of itself


def record_of(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "cfg.json").read_text())["metadata"]["dspa"]
    return record


def write_record(folder: Path, record: dict[str, Any]) -> None:
    cfg = json.loads((folder / "cfg.json").read_text())
    cfg["metadata"]["dspa"] = record
    (folder / "cfg.json").write_text(json.dumps(cfg))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("apply_b_dec", [False, True])
def test_another_sae_cannot_be_passed_off_as_the_map_s(tmp_path: Path, apply_b_dec: bool, dtype: torch.dtype) -> None:
    sae_in, sae_out = make_sae(L_IN, 64), make_sae(L_OUT, D_SAE_OUT, seed=2)
    b_dec = {"b_dec": torch.randn(48, generator=torch.Generator().manual_seed(3))} if apply_b_dec else {}
    other = make_sae(L_OUT, D_SAE_OUT, seed=7, apply_b_dec_to_input=apply_b_dec, **b_dec).to(dtype=dtype)
    sae_out.save(tmp_path / "sae_out")
    other.save(tmp_path / "other")
    dspa.Steering(sae_in, FrozenSAE.load(tmp_path / "sae_out"), make_map(sae_in, sae_out))
    write_record(tmp_path / "other", record_of(tmp_path / "other") | {"fingerprint": sae_out.fingerprint})
    with pytest.raises(SAEError, match=r"The record .* was changed after it was written"):
        FrozenSAE.load(tmp_path / "other")
    write_record(tmp_path / "other", record_of(tmp_path / "sae_out"))
    with pytest.raises(SAEError, match="not the one that was saved"):
        FrozenSAE.load(tmp_path / "other")


@pytest.mark.parametrize("entry", ["fingerprint", "weights", "folded", "seal"])
def test_no_entry_of_the_record_can_be_edited(tmp_path: Path, entry: str) -> None:
    make(apply_b_dec_to_input=True).save(tmp_path)
    record = record_of(tmp_path)
    write_record(tmp_path, record | {entry: [] if entry == "folded" else "0" * 16})
    with pytest.raises(
        SAEError, match=r"The record .* was changed after it was written.*remove 'dspa' from the metadata"
    ):
        FrozenSAE.load(tmp_path)


@pytest.mark.parametrize(
    "entry", [{"folded": None}, {"folded": "b_dec"}, {"fingerprint": 3}, {"weights": None}], ids=str
)
def test_a_record_that_is_sealed_and_none(tmp_path: Path, entry: dict[str, Any]) -> None:
    make().save(tmp_path)
    record = record_of(tmp_path)
    del record["seal"]
    write_record(tmp_path, sealed(record | entry))
    with pytest.raises(SAEError, match=rf"dspa\.{next(iter(entry))}` is .*accepted: "):
        FrozenSAE.load(tmp_path)


def test_a_folder_of_an_earlier_version(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """It has no seal. Its tensors show that it is the SAE itself, or else it warns that they do not."""
    whole, folded = make(), make(apply_b_dec_to_input=True)
    for name, sae in (("whole", whole), ("folded", folded)):
        sae.save(tmp_path / name)
        record = record_of(tmp_path / name)
        del record["seal"]
        write_record(tmp_path / name, record)
    assert FrozenSAE.load(tmp_path / "whole").fingerprint == whole.fingerprint and not recwarn.list
    with pytest.warns(UserWarning, match="folded or rounded copy .* save it again"):
        loaded = FrozenSAE.load(tmp_path / "folded")
    assert loaded.fingerprint == folded.fingerprint
    loaded.save(tmp_path / "again")
    recwarn.clear()
    assert FrozenSAE.load(tmp_path / "again").fingerprint == folded.fingerprint and not recwarn.list


def test_weights_that_a_file_shares_are_copied(tmp_path: Path) -> None:
    make().save(tmp_path)
    sae = FrozenSAE.load(tmp_path)
    before = sae.W_dec.clone()
    file = tmp_path / "sae_weights.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, tmp_path / "other")
    with file.open("r+b") as opened:
        opened.write((tmp_path / "other").read_bytes())
    assert np.array_equal(sae.W_dec.numpy(), before.numpy())
