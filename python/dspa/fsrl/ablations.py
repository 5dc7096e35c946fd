"""What is lost as an adapter moves less: the top fraction of v alone, or all but a set of latents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn
from tqdm import tqdm

from dspa.evaluate.responses import Response
from dspa.evaluate.scores import Scores, score_responses
from dspa.fsrl.adapter import FSRLAdapter
from dspa.fsrl.usage import Usage

FRACTIONS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0)
METRICS = ("loss", "accuracy", "win_rate")


def measures(scores: Scores, base: Scores) -> dict[str, float]:
    """Loss, margin, accuracy and win rate over `base`, the last two with the ends of their 95 % Wilson intervals."""
    accuracy, wins = scores.accuracy_interval(), scores.win_rate_interval(base)
    return {
        "loss": scores.loss,
        "margin": scores.margin,
        "accuracy": scores.accuracy,
        "accuracy_low": accuracy[0],
        "accuracy_high": accuracy[1],
        "win_rate": scores.win_rate(base),
        "win_rate_low": wins[0],
        "win_rate_high": wins[1],
    }


@contextmanager
def restored(adapter: FSRLAdapter) -> Iterator[None]:
    """Give the adapter its mask and fraction back at the end, whatever happens."""
    mask, fraction = adapter.mask, adapter.fraction
    try:
        yield
    finally:
        adapter.mask, adapter.fraction = mask, fraction


@dataclass(frozen=True)
class FractionCurve:
    """Scores of the base model, and of the model with the adapter at each of `fractions`."""

    base: Scores
    fractions: tuple[float, ...]
    scores: tuple[Scores, ...]

    def rows(self) -> list[dict[str, Any]]:
        """The measures of the base model and of each fraction."""
        points = [
            ("base", "", self.base),
            *(("adapter", *each) for each in zip(self.fractions, self.scores, strict=True)),
        ]
        return [{"model": name, "fraction": part} | measures(scores, self.base) for name, part, scores in points]


def fraction_curve(
    model: nn.Module,
    adapter: FSRLAdapter,
    responses: Sequence[Response],
    *,
    fractions: Sequence[float] = FRACTIONS,
    progress: bool = True,
    **scoring: Any,
) -> FractionCurve:
    """Score triples as only the top fraction of the |v_j| of each token is kept, on a model with the adapter attached.

    Args:
        responses: as `responses_of` makes them of triples.
        fractions: of the v_j of a token that are not 0, the part that is kept; 0 is the base model. Each is taken once,
            in their order.
        scoring: `beta`, `gamma_beta_ratio`, `batch_tokens` of `score_responses`.

    Raises:
        ModelError: an adapter that is not attached to the model. ValueError: a fraction outside 0 to 1.
    """
    adapter.check_attached(model)
    wrong = [fraction for fraction in fractions if not 0 <= fraction <= 1]
    if wrong or not fractions:
        raise ValueError(f"`fractions` are {list(fractions)}; accepted: one or more numbers from 0 to 1.")
    fractions = sorted(set(fractions))
    with adapter.disabled():
        base = score_responses(model, responses, progress=progress, **scoring)
    scores = []
    with restored(adapter):
        for fraction in tqdm(fractions, unit="fraction", desc="fractions", disable=not progress):
            adapter.fraction = fraction
            scores.append(score_responses(model, responses, progress=progress, **scoring))
    return FractionCurve(base, tuple(fractions), tuple(scores))


@dataclass(frozen=True)
class Comparison:
    """A measure of the base model, of the whole adapter, with the given latents masked, and with random ones.

    mean, low, high: of the random sets, with Student's t interval of the mean. percentile: of the random sets, the
    percentage that is lower than the given one, those that are equal counted half."""

    metric: str
    base: float
    whole: float
    given: float
    mean: float
    low: float
    high: float
    percentile: float


@dataclass(frozen=True)
class MaskEffect:
    """Scores of the base model, of the whole adapter, and with latents masked: those `given`, and as many in `random`
    sets. n_given: how many were given, `latents` [n] those of them that the adapter moves."""

    base: Scores
    whole: Scores
    given: Scores
    random: tuple[Scores, ...]
    latents: Tensor
    n_given: int

    def rows(self) -> list[dict[str, Any]]:
        """The measures of each set."""
        named = {"base model": self.base, "whole adapter": self.whole, "given": self.given}
        named |= {f"random {n}": scores for n, scores in enumerate(self.random, start=1)}
        return [{"masked": name} | measures(scores, self.base) for name, scores in named.items()]

    def values(self, metric: str) -> list[float]:
        """A measure of each random set."""
        return [measures(scores, self.base)[metric] for scores in self.random]

    def compare(self, metric: str, confidence: float = 0.95) -> Comparison:
        """The given set beside the random ones."""
        base, whole, given = (measures(s, self.base)[metric] for s in (self.base, self.whole, self.given))
        values = np.asarray(self.values(metric))
        mean, error = float(values.mean()), float(stats.sem(values))
        half = error * float(stats.t.ppf((1 + confidence) / 2, len(values) - 1))
        percentile = float(stats.percentileofscore(values, given, kind="mean"))
        return Comparison(metric, base, whole, given, mean, mean - half, mean + half, percentile)


def mask_effect(
    model: nn.Module,
    adapter: FSRLAdapter,
    responses: Sequence[Response],
    latents: Sequence[int],
    usage: Usage,
    *,
    n_random: int = 20,
    seed: int = 0,
    progress: bool = True,
    **scoring: Any,
) -> MaskEffect:
    """Score triples with some latents masked, against random sets of as many latents, on a model with the adapter
    attached.

    Of the given latents, those that the adapter never moves are left out: to mask them changes nothing, and random sets
    are drawn, without replacement, from all latents that it moves, the given ones included. Both masks come on top of
    the adapter's own.

    Args:
        responses: as `responses_of` makes them of triples.
        latents: numbers of latents.
        usage: `latent_usage` of the same adapter.
        n_random: sets, at least 2.
        seed: of their drawing.
        scoring: `beta`, `gamma_beta_ratio`, `batch_tokens` of `score_responses`.

    Raises:
        ModelError: an adapter that is not attached to the model.
        ValueError: no latents, latents that the SAE does not have or of which none is moved; fewer than 2 sets.
    """
    adapter.check_attached(model)
    used = usage.ranked
    given = _moved(latents, adapter.sae.d_sae, used)
    if n_random < 2:
        raise ValueError(f"`n_random` is {n_random}; accepted: 2 or more, for an interval.")
    generator = torch.Generator().manual_seed(seed)
    drawn = [used[torch.randperm(len(used), generator=generator)[: len(given)]] for _ in range(n_random)]
    with adapter.disabled():
        base = score_responses(model, responses, progress=progress, **scoring)
    whole = score_responses(model, responses, progress=progress, **scoring)
    scores = []
    with restored(adapter):
        own = adapter.mask if adapter.mask is not None else torch.ones_like(adapter.b_a, dtype=torch.bool)
        for each in tqdm([given, *drawn], unit="set", desc="masks", disable=not progress):
            adapter.mask = own.index_fill(0, each.to(own.device), False)
            scores.append(score_responses(model, responses, progress=progress, **scoring))
    return MaskEffect(base, whole, scores[0], tuple(scores[1:]), given, len(set(latents)))


def _moved(latents: Sequence[int], d_sae: int, used: Tensor) -> Tensor:
    """Of some latents, each once, those that are used."""
    check_latents(latents, d_sae)
    unique = torch.tensor(sorted(set(latents)))
    found = unique[torch.isin(unique, used)]
    if not len(found):
        raise ValueError(
            f"None of the {len(unique)} given latents is moved by the adapter on these responses: to mask them changes "
            f"nothing. Give some of the {len(used)} that are."
        )
    return found


def check_latents(latents: Sequence[int], d_sae: int) -> None:
    """Raise `ValueError` unless there are latents, all of an SAE of so many."""
    outside = [n for n in latents if not 0 <= n < d_sae]
    if outside or not latents:
        told = f"hold {outside[:10]}" if outside else "are none"
        raise ValueError(f"`latents` {told}; accepted: one or more numbers from 0 to {d_sae - 1}.")
