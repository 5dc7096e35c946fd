"""SAELens' SAEs for a training: a new BatchTopK SAE, one that continues a `FrozenSAE`, and both at inference.

SAELens takes seconds to import and is optional, so its types are not named here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dspa.saes.frozen import FrozenSAE
from dspa.saes.metadata import without_model_advice

# Thresholds more than FAR times the median, or less than 1 / FAR of it, do not become units.
FAR = 16.0


def new_sae(d_in: int, d_sae: int, k: float, *, seed: int, threshold_lr: float, metadata: dict[str, Any]) -> Any:
    """Return an untrained `BatchTopKTrainingSAE`, on the CPU, so that a seed means the same on every device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _training_sae(d_in, d_sae, k, threshold_lr, metadata)


@torch.no_grad()
def started_sae(start: FrozenSAE, k: float, *, scale: float, threshold_lr: float, metadata: dict[str, Any]) -> Any:
    """Return a `BatchTopKTrainingSAE`, on the CPU, that continues `start`.

    Apart from normalisation, it does for `scale` times an input what `start` does for that input. BatchTopK has one
    threshold for all latents, so each latent is put into units in which its own threshold is the median one, and its
    decoder row absorbs the scale. A latent whose threshold is 0, infinite or far from the others' would be lost in such
    units. It gets those of a decoder row of norm 1.
    """
    norm = start.W_dec.norm(dim=1).clamp(min=1e-8)
    threshold = start.threshold * norm
    usable = threshold.isfinite() & (threshold > 0)
    relative = threshold / threshold[usable].median() if usable.any() else torch.ones_like(norm)
    unit = norm / torch.where((relative > 1 / FAR) & (relative < FAR), relative, 1)
    kept = {"apply_b_dec_to_input": False, "rescale_acts_by_decoder_norm": False}
    sae = _training_sae(start.d_in, start.d_sae, k, threshold_lr, metadata, **kept)
    sae.W_enc.copy_(start.W_enc * unit)
    sae.b_enc.copy_(start.b_enc * unit * scale)
    sae.W_dec.copy_(start.W_dec / unit[:, None])
    sae.b_dec.copy_(start.b_dec * scale)
    return sae


@without_model_advice()
def _training_sae(
    d_in: int, d_sae: int, k: float, threshold_lr: float, metadata: dict[str, Any], **settings: bool
) -> Any:
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    shared = {"d_in": d_in, "d_sae": d_sae, "k": k, "topk_threshold_lr": threshold_lr}
    config = BatchTopKTrainingSAEConfig(**shared, **settings, metadata=SAEMetadata(**metadata))
    return BatchTopKTrainingSAE(config)


@torch.no_grad()
def begin_at_data(sae: Any, rows: Tensor, seed: int) -> None:
    """Let a new SAE begin at its data, `rows` [N, d_in].

    Its decoder bias becomes their mean, which the encoder subtracts from its input. With a bias of 0 the first steps
    would be spent on the mean: the latents on its side win, and the others die. Each latent's direction becomes the
    middle between its own and that of a row as seen from the mean, for the decoder and the encoder. The norms stay.
    """
    assert sae.cfg.apply_b_dec_to_input
    sae.b_dec.copy_(rows.mean(dim=0))
    order, n_latents = torch.Generator().manual_seed(seed), sae.cfg.d_sae
    drawn = torch.cat([torch.randperm(len(rows), generator=order) for _ in range(-(-n_latents // len(rows)))])
    unit, norm = torch.nn.functional.normalize, sae.get_W_dec_norm()[:, None]
    toward = unit(rows[drawn[:n_latents].to(rows.device)] - sae.b_dec, dim=1)
    sae.W_dec.copy_(unit(toward + sae.W_dec / norm, dim=1) * norm)
    sae.W_enc.copy_(sae.W_dec.T)


@torch.no_grad()
def begin_threshold(sae: Any, rows: Tensor) -> None:
    """Set the running mean of the threshold, otherwise 0, to the one that keeps `k` latents of `rows` [N, d_in]."""
    f = sae.encode(rows)
    sae.topk_threshold.fill_(f[f > 0].min())


@torch.no_grad()
@without_model_advice()
def jumprelu(sae: Any, *, scale: float, normalize_activations: str) -> Any:
    """Return the `JumpReLUSAE`, on the CPU, that a `BatchTopKTrainingSAE` is at inference.

    The one was trained on inputs times `scale`, the other is for inputs as they are. Its decoder rows have norm 1.
    """
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig

    inference = JumpReLUSAE(
        JumpReLUSAEConfig(
            d_in=sae.cfg.d_in,
            d_sae=sae.cfg.d_sae,
            apply_b_dec_to_input=sae.cfg.apply_b_dec_to_input,
            normalize_activations=normalize_activations,
            metadata=sae.cfg.metadata,
        )
    )
    norm = sae.get_W_dec_norm()
    # With rescaling, latents are compared as if of norm 1 already.
    threshold = sae.topk_threshold * (1 if sae.cfg.rescale_acts_by_decoder_norm else norm)
    inference.W_enc.copy_(sae.W_enc * norm)
    inference.b_enc.copy_(sae.b_enc * norm / scale)
    inference.W_dec.copy_(sae.W_dec / norm[:, None])
    inference.b_dec.copy_(sae.b_dec / scale)
    inference.threshold.copy_(threshold / scale)
    return inference
