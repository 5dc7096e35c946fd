"""Steps 1 to 3 of DSPA: count the active latents of each prompt, and look up which latents to edit."""

from __future__ import annotations

import torch
from torch import Tensor

from dspa.config import SteeringConfig
from dspa.errors import ModelError
from dspa.maps.cdmap import ConditionalDifferenceMap
from dspa.models.layers import check_finite
from dspa.models.prompts import Prompts
from dspa.saes.frozen import FrozenSAE
from dspa.saes.placement import required_layer
from dspa_kernels import SteeringPlan, activation_counts


def plan_prompts(
    h: Tensor,
    prompts: Prompts,
    sae_in: FrozenSAE,
    cdmap: ConditionalDifferenceMap,
    config: SteeringConfig,
    backend: str,
) -> SteeringPlan:
    """Return the plan of each prompt.

    Args:
        h: their residuals at the layer of the input SAE [B, T, d_in].
        prompts: the prompts.
        sae_in: the SAE that gates.
        cdmap: the map.
        config: scoring, mode and sizes.
        backend: as for `dspa_kernels.activation_counts`.

    Raises:
        ModelError: hidden states that are not finite, or an SAE on another device.
    """
    check_device("sae_in", sae_in, h)
    n_prompts, length, _ = h.shape
    mask = prompts.mask.to(h.device)
    check_finite(h[mask], required_layer(sae_in), "Hidden states of the prompt")
    row = torch.arange(n_prompts, device=h.device, dtype=torch.int32)[:, None].expand(-1, length)
    rows = torch.where(mask, row, -1).flatten()
    counts = activation_counts(h.flatten(0, 1), sae_in.weights, rows, n_prompts, backend=backend)
    return cdmap.select(counts, config, backend=backend)


def check_device(name: str, sae: FrozenSAE, h: Tensor) -> None:
    """Raise `ModelError` unless an SAE is on the device of the residuals of its layer."""
    if h.device != sae.device:
        raise ModelError(
            f"Layer {sae.layer} computes on {h.device} and `{name}` is on {sae.device}. Move one of them, for "
            f"example by steering.to({str(h.device)!r})."
        )
