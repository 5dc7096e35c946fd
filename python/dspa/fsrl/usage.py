"""Usage of latents by an adapter: how often and how far it moves each, and how fast that falls with rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import curve_fit
from torch import Tensor, nn
from tqdm import tqdm

from dspa.errors import refusal
from dspa.evaluate.responses import Response, batches, padded
from dspa.fsrl.adapter import FSRLAdapter
from dspa.models.layers import base_model, check_eval, check_finite, decoder_layers
from dspa.models.reading import read_layers
from dspa.saes.placement import check_sae, required_layer

# Fewest latents that a curve with two parameters is fitted to.
MIN_FITTED = 8
# Entries of v that are held in memory together.
ENTRIES_PER_BLOCK = 1 << 25


@dataclass(frozen=True)
class Usage:
    """Movement of each latent over response tokens.

    Attributes:
        active: number of tokens on which v_j is not 0, [d_sae] int64.
        mass: sum of |v_j| over the tokens, [d_sae] fp64.
        n_tokens: number of response tokens.
    """

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
    def moved(self) -> Tensor:
        """Latents that are moved at all, ascending, [n] int64."""
        return self.active.nonzero().flatten()

    @property
    def ranked(self) -> Tensor:
        """The same latents by falling mean, [n] int64; ties go to the smaller index.

        An adapter that is not sparse moves many latents on all tokens, so that a rank by share would say nothing.
        """
        return self.moved[self.mass[self.moved].argsort(descending=True, stable=True)]

    @property
    def falling_shares(self) -> Tensor:
        """Shares of the same latents, the largest first, [n] fp64."""
        return self.share[self.moved].sort(descending=True).values

    def rows(self) -> list[tuple[int, int, float, float]]:
        """Return rank by mean (from 1), latent, share and mean of each latent that is moved."""
        latents = self.ranked
        columns = latents.tolist(), self.share[latents].tolist(), self.mean[latents].tolist()
        return [(rank, *row) for rank, row in enumerate(zip(*columns, strict=True), start=1)]


@dataclass(frozen=True)
class Decay:
    """Fit `share(rank) = a exp(-rank / tau)` by least squares, with ranks from 1 by falling share.

    Attributes:
        a: amplitude.
        tau: rank constant of the decay.
        r2: share of the variance that the fit explains.
        first: first rank of the fit.
        last: last rank of the fit.
    """

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
    """Measure how an adapter moves latents on the tokens of responses, teacher-forced.

    Latents that `adapter.mask` excludes count as unmoved; `adapter.fraction` is not applied. The adapter need not be
    attached.

    Args:
        model: a transformers causal language model in evaluation mode.
        adapter: the adapter.
        responses: both responses of triples, as `responses_of` returns them.
        batch_tokens: tokens per batch, padding included.
        layers: dotted path of the decoder layers, as for `FSRLAdapter.attach`.
        model_name: name of the model, as for `FSRLAdapter.attach`.
        progress: show a bar.

    Raises:
        ModelError: an SAE that does not fit the model, a model in training mode, or residuals that are not finite.
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
            rows = torch.cat([h[n, len(response.prompt) : len(response)] for n, response in enumerate(batch)])
            check_finite(rows, layer)
            for block in rows.to(adapter.b_a.device).split(max(1, ENTRIES_PER_BLOCK // d_sae)):
                v = adapter.steering_vector(block)
                active += (v != 0).sum(dim=0).cpu()
                mass += v.abs().sum(dim=0, dtype=torch.float64).cpu()
            bar.update(len(batch))
    if adapter.mask is not None:
        allowed = adapter.mask.cpu()
        active, mass = active * allowed, mass * allowed
    return Usage(active, mass, sum(len(response.ids) for response in responses))


def fit_decay(usage: Usage) -> Decay:
    """Fit the decay of usage with rank, over all latents that are moved.

    The fit starts from a straight line through the logarithms.

    Raises:
        ValueError: fewer than 8 moved latents, or all of them moved equally often.
    """
    share = usage.falling_shares.numpy()
    if len(share) < MIN_FITTED:
        what, got = "The number of latents that the adapter moves", f"{len(share)} on {usage.n_tokens} tokens"
        advice = "Use more data, or an adapter that was trained with a smaller l1."
        raise refusal(ValueError, what, got, f"{MIN_FITTED} or more for a fit", advice)
    ranks = np.arange(1, len(share) + 1)
    slope, intercept = np.polyfit(ranks, np.log(share), 1)
    spread = float(((share - share.mean()) ** 2).sum())
    if spread == 0:
        raise ValueError(
            f"Each of {len(share)} latents is moved on {share[0]:.1%} of the tokens, so their usage does not fall with "
            "rank. Train the adapter longer or with a larger l1: it becomes sparse in training."
        )
    (a, rate), _ = curve_fit(_exponential, ranks, share, p0=(np.exp(intercept), -slope))
    residual = float(((share - _exponential(ranks, a, rate)) ** 2).sum())
    return Decay(float(a), float(1 / rate), 1 - residual / spread, 1, len(share))


def _exponential(ranks: Any, a: float, rate: float) -> Any:
    return a * np.exp(-rate * ranks)
