"""Gemma Scope's `params.npz`, by SAELens' loaders of its SAEs and of its transcoders on the same file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dspa.saes.frozen import FrozenSAE

from ...support.saes import D_IN, D_SAE, close, decoded_rounding
from ..test_formats import gemma_scope

FOLDER = "layer_12/width_16k/average_l0_82"


@pytest.mark.parametrize(
    ("loader", "repository"),
    [
        ("gemma_2_sae_huggingface_loader", "google/gemma-scope-2b-pt-res"),
        ("gemma_2_transcoder_huggingface_loader", "google/gemma-scope-2b-pt-transcoders"),
    ],
)
def test_against_the_loaders_of_sae_lens(
    h: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loader: str, repository: str
) -> None:
    sae_lens = pytest.importorskip("sae_lens", reason="needs the package sae-lens")
    from sae_lens.loading import pretrained_sae_loaders as loaders

    (tmp_path / FOLDER).mkdir(parents=True)
    gemma_scope(tmp_path / FOLDER)
    monkeypatch.setattr(
        loaders, "hf_hub_download", lambda repo_id, filename, subfolder="", **_: str(tmp_path / subfolder / filename)
    )
    widths = {"d_in": D_IN, "d_out": D_IN, "d_sae": D_SAE}
    cfg, state, _ = getattr(loaders, loader)(repository, FOLDER, cfg_overrides=widths)
    theirs = sae_lens.SAE.from_dict(loaders.handle_config_defaulting(cfg))
    theirs.load_state_dict(state)
    ours = FrozenSAE.load(tmp_path / FOLDER, layer=12)
    with torch.no_grad():
        f = theirs.encode(h)
        close(ours.encode(h), f)
        torch.testing.assert_close(ours.decode(f), theirs.decode(f), rtol=0, atol=decoded_rounding(f, ours.W_dec))
