"""The formula of a `SourceSAE`, as its fields are documented."""

from __future__ import annotations

import torch
from torch import Tensor

from dspa.saes.formats.source import SourceSAE
from dspa.saes.frozen import FrozenSAE

from .saes import decoded_rounding


def latents(source: SourceSAE, x: Tensor) -> Tensor:
    """Return the latents [N, d_sae] of rows [N, d_in]."""
    t = {name: tensor.to(x.dtype) for name, tensor in source.tensors.items()}
    x = _normalized(source, x)[0] - (t["b_dec"] if source.apply_b_dec_to_input else 0)
    z = x @ t["W_enc"]
    if source.arch == "gated":
        return (z + t["b_gate"] > 0) * (t["r_mag"].exp() * z + t["b_mag"]).relu()
    pre = z + t["b_enc"]
    if source.rescale_acts_by_decoder_norm:
        pre = pre * t["W_dec"].norm(dim=1)
    if source.arch == "jumprelu":
        return pre.relu() * (pre > t["threshold"])
    if source.arch == "topk":
        top = pre.topk(source.k, dim=-1)
        return torch.zeros_like(pre).scatter_(-1, top.indices, top.values.relu())
    return pre.relu()


def output(source: SourceSAE, x: Tensor) -> Tensor:
    """Return the reconstruction, or a transcoder's output, [N, d_out] of rows [N, d_in]."""
    t = {name: tensor.to(x.dtype) for name, tensor in source.tensors.items()}
    f = latents(source, x)
    if source.rescale_acts_by_decoder_norm:
        f = f / t["W_dec"].norm(dim=1)
    _, scale, shift = _normalized(source, x)
    out = (f @ t["W_dec"] + t["b_dec"]) * scale + shift
    return out + x @ t["W_skip"].T if "W_skip" in t else out


def close_output(source: SourceSAE, x: Tensor, expected: Tensor) -> None:
    """Outputs equal up to fp32 rounding, by the formula and of the `FrozenSAE` that is made of it."""
    scale = float(x.norm(dim=-1).max()) / x.shape[-1] ** 0.5 if source.normalize_activations != "none" else 1.0
    atol = decoded_rounding(latents(source, x), source.tensors["W_dec"], scale)
    if "W_skip" in source.tensors:
        atol += decoded_rounding(x.flatten(0, -2), source.tensors["W_skip"].T)
    torch.testing.assert_close(output(source, x), expected, rtol=0, atol=atol)
    sae = FrozenSAE._from_source(source, None, None, False)
    torch.testing.assert_close(sae.decode(sae.encode(x), like=x), expected, rtol=0, atol=atol)


def _normalized(source: SourceSAE, x: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
    """Return normalised rows, and their scales and shifts."""
    if source.normalize_activations == "layer_norm":
        shift = x.mean(-1, keepdim=True)
        scale = (x - shift).std(-1, keepdim=True)
        return (x - shift) / (scale + 1e-5), scale, shift
    if source.normalize_activations == "constant_norm_rescale":
        scale = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
        return x / scale, scale, 0.0
    assert source.normalize_activations == "none"
    return x, 1.0, 0.0
