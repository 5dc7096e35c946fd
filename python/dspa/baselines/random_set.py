"""Control "random set": other latents of the output SAE, as many for each prompt, and active about as often."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dspa.baselines.matching import matched_permutation
from dspa.evaluate.responses import Response, batches, padded
from dspa.maps.cdmap import ConditionalDifferenceMap
from dspa.models.layers import CausalLM
from dspa.models.reading import read_layers
from dspa.saes.frozen import FrozenSAE
from dspa.saes.placement import required_layer
from dspa_kernels import activation_counts


def random_set_map(cdmap: ConditionalDifferenceMap, densities: Tensor, seed: int) -> ConditionalDifferenceMap:
    """Return the map with each column given to another latent, drawn among those of a similar density.

    So each prompt selects exactly as many latents as before, to ablate and to augment, and prompts share as many of
    them as before. The latents are active about as often, so about as many tokens are edited. Only their meaning is
    gone. The draw is among all latents of the output SAE, other columns of the map included.

    Args:
        cdmap: the map.
        densities: share of response tokens on which each output latent is active, [d_sae_out].
        seed: of the draw.
    """
    columns = matched_permutation(densities, seed).to(cdmap.columns.device)[cdmap.columns.long()]
    order = columns.argsort()
    return cdmap.replaced(
        columns=columns[order].to(torch.int32),
        values=cdmap.values[:, order].contiguous(),
        variance=cdmap.variance[order],
    )


def response_densities(
    model: CausalLM,
    sae: FrozenSAE,
    responses: Sequence[Response],
    *,
    layers: str | None = None,
    batch_tokens: int = 8192,
) -> Tensor:
    """Return the share of tokens on which each latent is active, over the tokens that predict responses.

    Args:
        model: a transformers causal language model.
        sae: the SAE.
        responses: prompts with responses.
        layers: dotted path of the decoder layers, for an unknown architecture.
        batch_tokens: tokens per batch, padding included.

    Returns:
        [d_sae] fp64 on the CPU.
    """
    total = torch.zeros(sae.d_sae, dtype=torch.int64)
    for _, counts in response_counts(model, sae, responses, layers=layers, batch_tokens=batch_tokens):
        total += counts.sum(dim=0)
    return total.double() / sum(len(response.ids) for response in responses)


@torch.no_grad()
def response_counts(
    model: CausalLM,
    sae: FrozenSAE,
    responses: Sequence[Response],
    *,
    layers: str | None = None,
    batch_tokens: int = 8192,
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield numbers of responses, and on how many of the tokens that predict each of them every latent is active.

    Args:
        model: as for `response_densities`, like the others.
        sae: the SAE.
        responses: prompts with responses.
        layers: dotted path of the decoder layers, for an unknown architecture.
        batch_tokens: tokens per batch, padding included.

    Yields:
        The numbers of a batch [B], and counts [B, d_sae] int64 on the CPU.
    """
    layer = required_layer(sae)
    for numbers in batches(responses, batch_tokens):
        batch = [responses[n] for n in numbers]
        h = read_layers(model, [layer], layers, **padded(model, batch))[layer]
        predicts = torch.full(h.shape[:2], -1, dtype=torch.int32)
        for row, response in enumerate(batch):
            predicts[row, len(response.prompt) - 1 : len(response) - 1] = row
        weights = sae.to(h.device).weights
        yield numbers, activation_counts(h.flatten(0, 1), weights, predicts.flatten().to(h.device), len(batch)).cpu()
