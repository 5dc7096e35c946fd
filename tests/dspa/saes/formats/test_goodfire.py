"""Goodfire's SAEs, by the class in their model cards and by SAELens' loader on the same files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dspa.errors import SAEError
from dspa.saes.frozen import FrozenSAE

from ...support.saes import D_IN, D_SAE, close, decoded_rounding, tensors


class SparseAutoEncoder(nn.Module):
    """Two linear layers and a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder_linear, self.decoder_linear = nn.Linear(D_IN, D_SAE), nn.Linear(D_SAE, D_IN)
        t = tensors()
        for layer, matrix, bias in ((self.encoder_linear, "W_enc", "b_enc"), (self.decoder_linear, "W_dec", "b_dec")):
            layer.weight.data, layer.bias.data = t[matrix].T.contiguous(), t[bias]

    def encode(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.encoder_linear(x))


@pytest.mark.parametrize("file", ["Llama-3.1-8B-Instruct-SAE-l19.pth", "Llama-3.3-70B-Instruct-SAE-l50.pt"])
def test_residual(h: Tensor, tmp_path: Path, file: str) -> None:
    theirs = SparseAutoEncoder().requires_grad_(False)
    torch.save(theirs.state_dict(), tmp_path / file)
    for path in (tmp_path, tmp_path / file):
        sae = FrozenSAE.load(path, layer=19)
        f = theirs.encode(h)
        close(sae.encode(h), f)
        atol = decoded_rounding(f, sae.W_dec)
        torch.testing.assert_close(sae.decode(f), theirs.decoder_linear(f), rtol=0, atol=atol)
    assert FrozenSAE.load(tmp_path).layer is None


def test_against_the_loader_of_sae_lens(h: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sae_lens = pytest.importorskip("sae_lens", reason="needs the package sae-lens")
    from sae_lens.loading import pretrained_sae_loaders as loaders

    file = "Llama-3.1-8B-Instruct-SAE-l19.pth"
    torch.save(SparseAutoEncoder().state_dict(), tmp_path / file)
    monkeypatch.setattr(loaders, "hf_hub_download", lambda repo_id, filename, **_: str(tmp_path / filename))
    cfg, state, _ = loaders.get_goodfire_huggingface_loader(
        "Goodfire/Llama-3.1-8B-Instruct-SAE-l19", file, cfg_overrides={"d_in": D_IN, "d_sae": D_SAE, "dtype": "float32"}
    )
    theirs = sae_lens.SAE.from_dict(loaders.handle_config_defaulting(cfg))
    theirs.load_state_dict(state)
    ours = FrozenSAE.load(tmp_path, layer=19)
    with torch.no_grad():
        f = theirs.encode(h)
        close(ours.encode(h), f)
        torch.testing.assert_close(ours.decode(f), theirs.decode(f), rtol=0, atol=decoded_rounding(f, ours.W_dec))


def test_unknown_tensors(tmp_path: Path) -> None:
    torch.save(SparseAutoEncoder().state_dict() | {"extra": torch.ones(1)}, tmp_path / "sae.pth")
    with pytest.raises(SAEError, match=r"sae.pth has extra; accepted: exactly decoder_linear.bias"):
        FrozenSAE.load(tmp_path)


def test_another_file_with_this_encoder(tmp_path: Path) -> None:
    """A TopK SAE without a bias of the decoder is known to exist, and is not one of these."""
    state = SparseAutoEncoder().state_dict()
    state["decoder.weight"] = state.pop("decoder_linear.weight")
    del state["decoder_linear.bias"]
    torch.save(state, tmp_path / "topk_sae.pt")
    with pytest.raises(SAEError, match=r"topk_sae.pt: what it is is not certain"):
        FrozenSAE.load(tmp_path)
