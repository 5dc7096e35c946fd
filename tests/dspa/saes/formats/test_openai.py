"""OpenAI's sparse_autoencoder, by its formula and by the package itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dspa.errors import SAEError
from dspa.saes.frozen import FrozenSAE

from ...support.saes import D_IN, D_SAE, K, close, decoded_rounding, tensors

TOPK = {"activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "ReLU"}}
RELU = {"activation": "ReLU", "activation_state_dict": {}}


def state(activation: dict[str, Any], *, tied: bool = False) -> dict[str, Any]:
    """A state dict of `Autoencoder`, by the maker's names."""
    t = tensors()
    encoder = t["W_enc"].T.contiguous()
    decoder = {"decoder.linear.weight": encoder} if tied else {"decoder.weight": t["W_dec"].T.contiguous()}
    statistics = {
        "stats_last_nonzero": torch.zeros(D_SAE, dtype=torch.long),
        "latents_activation_frequency": torch.ones(D_SAE),
        "latents_mean_square": torch.zeros(D_SAE),
    }
    return {
        "pre_bias": t["b_dec"],
        "latent_bias": t["b_enc"],
        "encoder.weight": encoder,
        **decoder,
        **statistics,
    } | activation


def by_the_maker(x: Tensor, *, topk: bool, tied: bool) -> tuple[Tensor, Tensor]:
    """Latents and reconstructions of `Autoencoder.encode` and `decode`."""
    t = tensors()
    mean, std = torch.zeros(1), torch.ones(1)
    if topk:
        mean = x.mean(-1, keepdim=True)
        std = (x - mean).std(-1, keepdim=True)
        x = (x - mean) / (std + 1e-5)
    f = ((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).relu()
    if topk:
        top = f.topk(K)
        f = torch.zeros_like(f).scatter_(-1, top.indices, top.values)
    W_dec = t["W_enc"].T if tied else t["W_dec"]
    return f, (f @ W_dec + t["b_dec"]) * std + mean


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("activation", [TOPK, RELU])
def test_residual(h: Tensor, tmp_path: Path, activation: dict[str, Any], tied: bool) -> None:
    torch.save(state(activation, tied=tied), tmp_path / "6.pt")
    sae = FrozenSAE.load(tmp_path, layer=6, model_name="gpt2")
    f, out = by_the_maker(h, topk=activation is TOPK, tied=tied)
    close(sae.encode(h), f)
    scale = float(h.norm(dim=-1).max()) / D_IN**0.5
    torch.testing.assert_close(sae.decode(f, like=h), out, rtol=0, atol=decoded_rounding(f, sae.W_dec, scale))
    assert (sae.layer, sae.model_name) == (6, "gpt2")


def test_an_old_file_does_not_name_its_relu(h: Tensor, tmp_path: Path) -> None:
    """As the maker's `from_state_dict` reads it."""
    torch.save(state({}), tmp_path / "6.pt")
    close(FrozenSAE.load(tmp_path / "6.pt", layer=6).encode(h), by_the_maker(h, topk=False, tied=False)[0])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("topk", [False, True])
def test_against_the_package(h: Tensor, tmp_path: Path, topk: bool, tied: bool) -> None:
    reason = "needs OpenAI's package sparse_autoencoder (github.com/openai/sparse_autoencoder)"
    model = pytest.importorskip("sparse_autoencoder.model", reason=reason, exc_type=ImportError)
    theirs = model.Autoencoder(
        D_SAE, D_IN, activation=model.TopK(K) if topk else nn.ReLU(), tied=tied, normalize=topk
    ).requires_grad_(False)
    t = tensors()
    for parameter, value in ((theirs.pre_bias, t["b_dec"]), (theirs.latent_bias, t["b_enc"])):
        parameter.copy_(value)
    theirs.encoder.weight.copy_(t["W_enc"].T)
    if not tied:
        theirs.decoder.weight.copy_(t["W_dec"].T)
    torch.save(theirs.state_dict(), tmp_path / "6.pt")
    ours = FrozenSAE.load(tmp_path / "6.pt", layer=6)
    f, info = theirs.encode(h)
    close(ours.encode(h), f)
    scale = float(h.norm(dim=-1).max()) / D_IN**0.5
    atol = decoded_rounding(f, ours.W_dec, scale)
    torch.testing.assert_close(ours.decode(f, like=h), theirs.decode(f, info), rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "Identity"}, "`activation` is 'Identity'; accepted: ReLU, TopK"),
        ({"activation": torch.ones(2)}, r"`activation` is tensor\(\[1., 1.\]\); accepted: ReLU, TopK"),
        ({"activation_state_dict": {"k": K, "postact_fn": "Identity"}}, "`postact_fn` is 'Identity'; accepted: ReLU"),
        ({"activation_state_dict": {"postact_fn": "ReLU"}}, "`activation_state_dict`: `k` is missing"),
        ({"activation_state_dict": None}, "`activation_state_dict` is None; accepted"),
        ({"activation.k": K + 1, "activation.postact_fn": "ReLU"}, f"`k` is {K} and {K + 1}; accepted: one of them"),
        ({"activation.k": torch.ones(2)}, r"`k` is tensor.*; accepted: a whole number >= 1"),
        ({"extra": torch.ones(1)}, "6.pt has extra; accepted: exactly decoder.weight, encoder.weight, latent_bias"),
        ({"latents_mean_square": 3}, "a dict in which latents_mean_square are not dense tensors"),
        ({"latent_bias": torch.ones(3)}, rf"`W_enc` is of shape \[{D_IN}, {D_SAE}\]; accepted: \[{D_IN}, 3\]"),
    ],
)
def test_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    torch.save(state(TOPK) | changes, tmp_path / "6.pt")
    with pytest.raises(SAEError, match=message):
        FrozenSAE.load(tmp_path, layer=6)


def test_a_tied_decoder_that_is_not_the_encoder(tmp_path: Path) -> None:
    tied = state(TOPK, tied=True)
    torch.save(tied | {"decoder.linear.weight": 2 * tied["encoder.weight"]}, tmp_path / "6.pt")
    with pytest.raises(SAEError, match=r"`decoder.linear.weight` is not `encoder.weight`; accepted: the same matrix"):
        FrozenSAE.load(tmp_path, layer=6)


def test_k_of_a_relu_sae(tmp_path: Path) -> None:
    torch.save(state(RELU), tmp_path / "6.pt")
    with pytest.raises(SAEError, match=r"`k` is 5; accepted: None, since .*6.pt is a standard SAE. Leave `k` out"):
        FrozenSAE.load(tmp_path, k=5)
