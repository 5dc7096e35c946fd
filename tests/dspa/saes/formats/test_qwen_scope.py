"""Qwen-Scope, by the layout in its model cards and by SAELens' loader on the same files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dspa.errors import SAEError
from dspa.saes.frozen import FrozenSAE

from ...support.saes import D_IN, D_SAE, STANDARD, K, close, decoded_rounding, named


def write(folder: Path, layer: int = 7, **changes: Tensor) -> Path:
    """One file of a repository, which stores both matrices with the outputs first."""
    folder.mkdir(parents=True, exist_ok=True)
    t = named(*STANDARD)
    stored = t | {"W_enc": t["W_enc"].T.contiguous(), "W_dec": t["W_dec"].T.contiguous()}
    torch.save(stored | changes, folder / f"layer{layer}.sae.pt")
    return folder


def topk(x: Tensor) -> Tensor:
    t = named(*STANDARD)
    top = (x @ t["W_enc"] + t["b_enc"]).topk(K)
    return torch.zeros(*x.shape[:-1], D_SAE).scatter_(-1, top.indices, top.values.relu())


@pytest.mark.parametrize("name", ["", "layer7.sae.pt"])
def test_residual(h: Tensor, tmp_path: Path, name: str) -> None:
    sae = FrozenSAE.load(write(tmp_path) / name, k=K)
    t = named(*STANDARD)
    expected = topk(h)
    close(sae.encode(h), expected)
    atol = decoded_rounding(expected, t["W_dec"])
    torch.testing.assert_close(sae.decode(expected), expected @ t["W_dec"] + t["b_dec"], rtol=0, atol=atol)
    assert (sae.layer, sae.hook_name) == (7, "model.layers.7")


def test_all_layers_are_in_one_folder(tmp_path: Path) -> None:
    write(write(tmp_path), layer=12)
    with pytest.raises(SAEError, match=r"several of these files \(layer12\.sae\.pt, layer7\.sae\.pt\).*Name the"):
        FrozenSAE.load(tmp_path, k=K)
    assert FrozenSAE.load(tmp_path / "layer12.sae.pt", k=K).layer == 12


def test_against_the_loader_of_sae_lens(h: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sae_lens = pytest.importorskip("sae_lens", reason="needs the package sae-lens")
    from sae_lens.loading import pretrained_sae_loaders as loaders

    write(tmp_path)
    monkeypatch.setattr(loaders, "hf_hub_download", lambda repo_id, filename, **_: str(tmp_path / filename))
    cfg, state, _ = loaders.qwen_scope_sae_huggingface_loader(
        f"Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}", "layer7.sae.pt", cfg_overrides={"d_in": D_IN, "d_sae": D_SAE}
    )
    theirs = sae_lens.SAE.from_dict(loaders.handle_config_defaulting(cfg))
    theirs.load_state_dict(state)
    ours = FrozenSAE.load(tmp_path, k=K)
    with torch.no_grad():
        f = theirs.encode(h)
        close(ours.encode(h), f)
        torch.testing.assert_close(ours.decode(f), theirs.decode(f), rtol=0, atol=decoded_rounding(f, ours.W_dec))
    assert f"blocks.{ours.layer}.hook_resid_post" == theirs.cfg.metadata.hook_name


@pytest.mark.parametrize(
    ("changes", "k", "message"),
    [
        ({}, None, r"layer7.sae.pt: `k` is not in the file; accepted: .* Pass it: FrozenSAE.load\(path, k=...\)"),
        ({}, D_SAE + 1, f"`k` is {D_SAE + 1}; accepted: 1 to d_sae = {D_SAE}"),
        (
            {"threshold": torch.ones(D_SAE)},
            K,
            "layer7.sae.pt has threshold; accepted: exactly W_dec, W_enc, b_dec, b_enc",
        ),
        (
            {"W_enc": torch.ones(D_IN, D_SAE)},
            K,
            rf"`W_enc` is of shape \[{D_SAE}, {D_IN}\]; accepted: \[{D_IN}, {D_SAE}\]",
        ),
        (
            {"W_dec": torch.ones(D_SAE, D_IN)},
            K,
            rf"`W_dec` is of shape \[{D_IN}, {D_SAE}\]; accepted: \[{D_SAE}, {D_IN}\]",
        ),
        ({"b_dec": torch.tensor(1.0)}, K, rf"`W_enc` is of shape \[{D_IN}, {D_SAE}\]; accepted: \[1, {D_SAE}\]"),
    ],
)
def test_refused(tmp_path: Path, changes: dict[str, Tensor], k: int | None, message: str) -> None:
    with pytest.raises(SAEError, match=message):
        FrozenSAE.load(write(tmp_path, **changes), k=k)
