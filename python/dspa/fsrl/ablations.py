"""Ablations of an adapter: scores with only the top fraction of v kept, or with a set of latents masked."""

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

from dspa.errors import refusal
from dspa.evaluate.responses import Response
from dspa.evaluate.scores import Scores, score_responses
from dspa.fsrl.adapter import FSRLAdapter
from dspa.fsrl.usage import Usage

FRACTIONS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0)
METRICS = ("loss", "accuracy", "win_rate")


def measures(scores: Scores, base: Scores) -> dict[str, float]:
    """Return loss, margin, accuracy and win rate over `base`, the last two with their 95 % Wilson intervals."""
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
    """Give the adapter its mask and fraction back at the end, also after an error."""
    mask, fraction = adapter.mask, adapter.fraction
    try:
        yield
    finally:
        adapter.mask, adapter.fraction = mask, fraction


@dataclass(frozen=True)
class FractionCurve:
    """Scores of the base model, and of the adapter at each of `fractions`."""

    base: Scores
    fractions: tuple[float, ...]
    scores: tuple[Scores, ...]

    def rows(self) -> list[dict[str, Any]]:
        """Return the measures of the base model and of each fraction."""
        points = [
            ("base", "", self.base),
            *(("adapter", *point) for point in zip(self.fractions, self.scores, strict=True)),
        ]
        return [{"model": name, "fraction": kept} | measures(scores, self.base) for name, kept, scores in points]


def fraction_curve(
    model: nn.Module,
    adapter: FSRLAdapter,
    responses: Sequence[Response],
    *,
    fractions: Sequence[float] = FRACTIONS,
    progress: bool = True,
    **scoring: Any,
) -> FractionCurve:
    """Score triples with only the top fraction of each token's |v_j| kept.

    Args:
        model: a transformers causal language model in evaluation mode.
        adapter: the adapter, attached to the model.
        responses: both responses of triples, as `responses_of` returns them.
        fractions: shares of a token's nonzero v_j to keep, the largest by size; 0 is the base model. Duplicates are
            dropped and the rest is sorted.
        progress: show bars.
        scoring: `beta`, `gamma_beta_ratio` and `batch_tokens` of `score_responses`.

    Raises:
        ModelError: an adapter that is not attached to the model.
        ValueError: a fraction outside 0 to 1, or none.
    """
    adapter.check_attached(model)
    if not fractions or not all(0 <= fraction <= 1 for fraction in fractions):
        raise refusal(ValueError, "`fractions`", list(fractions), "one or more numbers from 0 to 1")
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
    """Comparison of one measure with a given set of latents masked and with random sets masked.

    Attributes:
        metric: one of `METRICS`.
        base: value of the base model.
        whole: value of the whole adapter.
        given: value with the given set masked.
        mean: mean over the random sets.
        low: lower end of Student's t interval of the mean.
        high: upper end of this interval.
        percentile: percentage of random sets with a value below the given one; equal ones count half.
    """

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
    """Scores of the base model, of the whole adapter, and with sets of latents masked.

    Attributes:
        base: scores of the base model.
        whole: scores of the whole adapter.
        given: scores with `latents` masked.
        random: scores with as many random latents masked, per random set.
        latents: those of the given latents that the adapter moves, [n] int64.
        n_given: number of given latents, unmoved ones included.
    """

    base: Scores
    whole: Scores
    given: Scores
    random: tuple[Scores, ...]
    latents: Tensor
    n_given: int

    def rows(self) -> list[dict[str, Any]]:
        """Return the measures of each set."""
        named = {"base model": self.base, "whole adapter": self.whole, "given": self.given}
        named |= {f"random {n}": scores for n, scores in enumerate(self.random, start=1)}
        return [{"masked": name} | measures(scores, self.base) for name, scores in named.items()]

    def values(self, metric: str) -> list[float]:
        """Return one measure of each random set."""
        return [measures(scores, self.base)[metric] for scores in self.random]

    def compare(self, metric: str, confidence: float = 0.95) -> Comparison:
        """Compare the given set with the random ones."""
        base, whole, given = (measures(scores, self.base)[metric] for scores in (self.base, self.whole, self.given))
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
    """Score triples with a set of latents masked, and with random sets of the same size masked.

    Given latents that the adapter never moves are left out, since masking them changes nothing. Random sets are drawn
    without replacement from all latents that it moves, the given ones included. Each mask comes on top of the adapter's
    own.

    Args:
        model: a transformers causal language model in evaluation mode.
        adapter: the adapter, attached to the model.
        responses: both responses of triples, as `responses_of` returns them.
        latents: indices of latents.
        usage: `latent_usage` of the same adapter.
        n_random: number of random sets, at least 2.
        seed: seed of the random sets.
        progress: show bars.
        scoring: `beta`, `gamma_beta_ratio` and `batch_tokens` of `score_responses`.

    Raises:
        ModelError: an adapter that is not attached to the model.
        ValueError: no latents, latents that the SAE does not have, only latents that are never moved, or fewer than 2
            sets.
    """
    adapter.check_attached(model)
    used = usage.moved
    given = _used_latents(latents, adapter.sae.d_sae, used)
    if n_random < 2:
        raise refusal(ValueError, "`n_random`", n_random, "2 or more, for an interval")
    generator = torch.Generator().manual_seed(seed)
    drawn = [used[torch.randperm(len(used), generator=generator)[: len(given)]] for _ in range(n_random)]
    with adapter.disabled():
        base = score_responses(model, responses, progress=progress, **scoring)
    whole = score_responses(model, responses, progress=progress, **scoring)
    scores = []
    with restored(adapter):
        own = adapter.mask if adapter.mask is not None else torch.ones_like(adapter.b_a, dtype=torch.bool)
        for masked in tqdm([given, *drawn], unit="set", desc="masks", disable=not progress):
            adapter.mask = own.index_fill(0, masked.to(own.device), False)
            scores.append(score_responses(model, responses, progress=progress, **scoring))
    return MaskEffect(base, whole, scores[0], tuple(scores[1:]), given, len(set(latents)))


def _used_latents(latents: Sequence[int], d_sae: int, used: Tensor) -> Tensor:
    """Return those of some latents that are used, sorted and without duplicates."""
    check_latents(latents, d_sae)
    unique = torch.tensor(sorted(set(latents)))
    moved = unique[torch.isin(unique, used)]
    if not len(moved):
        raise ValueError(
            f"None of the {len(unique)} given latents is moved by the adapter on these responses, so masking them "
            f"changes nothing. Give some of the {len(used)} latents that are."
        )
    return moved


def check_latents(latents: Sequence[int], d_sae: int) -> None:
    """Check that there are latents, and that the SAE has them all.

    Raises:
        ValueError: no latents, or indices outside the SAE.
    """
    outside = [latent for latent in latents if not 0 <= latent < d_sae]
    if outside or not latents:
        what, got = ("Part of `latents`", str(outside[:10])) if outside else ("`latents`", "empty")
        raise refusal(ValueError, what, got, f"one or more numbers from 0 to {d_sae - 1}")
