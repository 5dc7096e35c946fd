"""Which latents an adapter moves, how often and how far, and how fast that falls with their rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import curve_fit
from torch import Tensor, nn
from tqdm import tqdm

from dspa.evaluate.responses import Response, batches, padded
from dspa.fsrl.adapter import FSRLAdapter
from dspa.models.layers import base_model, check_eval, check_finite, decoder_layers
from dspa.models.reading import read_layers
from dspa.saes.placement import check_sae, required_layer

# Latents that a curve of two numbers is fitted to, at least.
FEWEST = 8
# Entries of v that are held at once.
ENTRIES = 1 << 25


@dataclass(frozen=True)
class Usage:
    """How an adapter moves latents on `n_tokens` response tokens. active [d_sae] int64: on how many of them v_j is not
    0; mass [d_sae] fp64: the sum of |v_j| over them."""

    active: Tensor
    mass: Tensor
    n_tokens: int

    @property
    def share(self) -> Tensor:
        """Share of tokens on which v_j is not 0, [d_sae] fp64."""
        return self.active.double() / self.n_tokens

    @property
    def mean(self) -> Tensor:
        """Mean of |v_j| over all tokens, [d_sae] fp64."""
        return self.mass / self.n_tokens

    @property
    def ranked(self) -> Tensor:
        """Latents that are moved at all, by share, the largest first, ties to the smaller index."""
        order = self.active.argsort(descending=True, stable=True)
        return order[: int((self.active > 0).sum())]

    def rows(self) -> list[tuple[int, int, float, float]]:
        """Rank from 1, latent, share and mean of each latent that is moved."""
        found = self.ranked
        values = zip(found.tolist(), self.share[found].tolist(), self.mean[found].tolist(), strict=True)
        return [(rank, *each) for rank, each in enumerate(values, start=1)]


@dataclass(frozen=True)
class Decay:
    """`share(rank) = a exp(-rank / tau)` with ranks from 1, fitted to the ranks `first` to `last` by least squares.
    r2: of the variance of the share, the part that it explains."""

    a: float
    tau: float
    r2: float
    first: int
    last: int


@torch.no_grad()
def latent_usage(
    model: nn.Module,
    adapter: FSRLAdapter,
    responses: Sequence[Response],
    *,
    batch_tokens: int = 8192,
    layers: str | None = None,
    model_name: str | None = None,
    progress: bool = True,
) -> Usage:
    """Count the v_j of the tokens of responses, teacher-forced: of latents that `adapter.mask` allows, before
    `adapter.fraction` leaves some out. The adapter need not be attached.

    Args:
        responses: as `responses_of` makes them of triples.
        batch_tokens: tokens of a batch, padding counted.
        layers, model_name: as for `FSRLAdapter.attach`.

    Raises:
        ModelError: an SAE that does not fit the model, a model in training mode, residuals that are not finite.
    """
    inner = base_model(model)
    check_eval(inner)
    check_sae("adapter.sae", adapter.sae, inner, len(decoder_layers(inner, layers)), model_name)
    layer, d_sae = required_layer(adapter.sae), adapter.sae.d_sae
    active = torch.zeros(d_sae, dtype=torch.int64)
    mass = torch.zeros(d_sae, dtype=torch.float64)
    with tqdm(total=len(responses), unit="response", desc="usage", leave=False, disable=not progress) as bar:
        for numbers in batches(responses, batch_tokens):
            batch = [responses[n] for n in numbers]
            h = read_layers(inner, [layer], layers, **padded(inner, batch))[layer]
            rows = torch.cat([h[n, len(each.prompt) : len(each)] for n, each in enumerate(batch)])
            check_finite(rows, layer)
            for block in rows.to(adapter.b_a.device).split(max(1, ENTRIES // d_sae)):
                v = adapter.steering_vector(block)
                active += (v != 0).sum(dim=0).cpu()
                mass += v.abs().sum(dim=0, dtype=torch.float64).cpu()
            bar.update(len(batch))
    if adapter.mask is not None:
        allowed = adapter.mask.cpu()
        active, mass = active * allowed, mass * allowed
    return Usage(active, mass, sum(len(each.ids) for each in responses))


def fit_decay(usage: Usage) -> Decay:
    """How fast use decays with rank, over all latents that are moved.

    The start is a straight line through the logarithms.

    Raises:
        ValueError: fewer than 8 latents are moved, or those that are, all alike.
    """
    share = usage.share[usage.ranked].numpy()
    if len(share) < FEWEST:
        raise ValueError(
            f"The adapter moves {len(share)} latents on {usage.n_tokens} tokens; accepted for a fit: {FEWEST} or more. "
            "Use more data, or an adapter that was trained with a smaller l1."
        )
    ranks = np.arange(1, len(share) + 1)
    slope, intercept = np.polyfit(ranks, np.log(share), 1)
    spread = float(((share - share.mean()) ** 2).sum())
    if spread == 0:
        raise ValueError(
            f"Each of {len(share)} latents is moved on {share[0]:.1%} of the tokens: their use does not fall with "
            "rank. An adapter becomes sparse in training, with a larger l1."
        )
    (a, rate), _ = curve_fit(_exponential, ranks, share, p0=(np.exp(intercept), -slope))
    rest = float(((share - _exponential(ranks, a, rate)) ** 2).sum())
    return Decay(float(a), float(1 / rate), 1 - rest / spread, 1, len(share))


def _exponential(ranks: Any, a: float, rate: float) -> Any:
    return a * np.exp(-rate * ranks)
