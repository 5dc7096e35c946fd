"""The latents that DSPA edits, as the target of one vector for every prompt: - for ablated ones, + for augmented."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from dspa.config import SteeringConfig
from dspa.errors import VectorError, refusal
from dspa.maps.cdmap import ConditionalDifferenceMap
from dspa.models.layers import base_model, device_of
from dspa.models.prompts import generate_prompts
from dspa.models.reading import read_layers
from dspa.saes.frozen import FrozenSAE
from dspa.saes.placement import required_layer
from dspa.steering.plans import plan_prompts


def map_target(cdmap: ConditionalDifferenceMap, config: SteeringConfig) -> dict[int, float]:
    """Return the column sums of a map by latent, of the `k_diff` columns at each end that `mode` edits.

    These are the latents of Static-SAE. A sum is negative for a latent that DSPA ablates.

    Raises:
        VectorError: no column sum has the sign that `mode` edits.
    """
    sums = cdmap.values.double().sum(dim=0)
    order = sums.argsort(stable=True).tolist()
    ablated = [j for j in order[: config.k_diff] if sums[j] < 0 and config.mode in ("ablate", "both")]
    augmented = [j for j in order[::-1][: config.k_diff] if sums[j] > 0 and config.mode in ("augment", "both")]
    target = {int(cdmap.columns[j]): float(sums[j]) for j in (*ablated, *augmented)}
    if not target:
        raise refusal(VectorError, "`mode`", f"{config.mode}, for which no column sum has the sign", "another one")
    return target


def prompts_target(
    model: nn.Module,
    prompts: Iterable[Sequence[int]],
    sae_in: FrozenSAE,
    cdmap: ConditionalDifferenceMap,
    config: SteeringConfig,
    *,
    layers: str | None = None,
) -> dict[int, float]:
    """Return by latent the share of prompts that augment it less the share that ablate it.

    Args:
        model: a transformers causal language model in evaluation mode.
        prompts: token ids of each prompt.
        sae_in: the SAE that gates.
        cdmap: the map.
        config: settings of steering.
        layers: dotted path of the decoder layers, for an unknown architecture.

    Raises:
        VectorError: no prompts, or none that selects a latent.
    """
    inner, totals, prompts = base_model(model), torch.zeros(cdmap.meta.d_sae_out, dtype=torch.float64), list(prompts)
    layer, device = required_layer(sae_in), device_of(inner.get_input_embeddings())
    for prompt in prompts:
        ids = torch.tensor([list(prompt)], device=device)
        read = generate_prompts(inner, ids, (), {"attention_mask": torch.ones_like(ids)})
        h = read_layers(inner, [layer], layers, **read.inputs, attention_mask=read.mask.long())[layer]
        plan = plan_prompts(h, read, sae_in, cdmap, config, "auto")
        latents = plan.latents(cdmap.columns).flatten().cpu()
        totals.index_add_(0, latents[latents >= 0].long(), plan.signs.flatten().cpu()[latents >= 0].double())
    chosen = totals.nonzero().flatten().tolist()
    if not chosen:
        got = f"{len(prompts)} prompts that select nothing" if prompts else "empty"
        raise refusal(VectorError, "`prompts`", got, "prompts that select latents of the map")
    return {latent: float(totals[latent]) / len(prompts) for latent in chosen}
