"""The quality of an SAE: how well it reconstructs residuals, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dspa.errors import SAEError, refusal
from dspa.saes.config import MAX_NORM_RATIO
from dspa.saes.frozen import FrozenSAE
from dspa.saes.outliers import typical_rows
from dspa.schemas import Count, Explained, Fraction, NonNegative, PositiveInt, schema

# Latents that are held at once while an SAE is evaluated.
LATENTS_PER_BLOCK = 1 << 24
# Beyond these bars an SAE is reported as weak: the share of dead latents, the explained variance, the distance of L0
# from k, how far outlying tokens lift the explained variance, the share of the variance that 1 % of the tokens hold,
# and the mean number of tokens of the training on which a latent was active.
MAX_DEAD = 0.1
MIN_EXPLAINED = 0.7
MAX_DRIFT = 0.25
MAX_FLATTERY = 0.1
MAX_TOP_VARIANCE = 0.15
MIN_USES = 1000


@schema
class Quality:
    """Quality of an SAE on N rows x [N, d_in] with its reconstructions x'.

    For a centred SAE, x are the residuals less their mean over d_in, in which it has no part.

    Attributes:
        explained_variance: `1 - sum (x - x')^2 / sum (x - mean x)^2`.
        explained_variance_all: the same on all rows, those of outlying norm among them; None in older records.
        top_variance: share of `sum (x - mean x)^2` that the 1 % of rows farthest from the mean hold; None in older
            records.
        l0: mean number of active latents per row.
        dead: number of latents that are active on none of these rows.
        mse: `(x - x')^2`, summed over d_in, mean over rows, as SAELens' loss.
        n_tokens: number of rows.
        n_left_out: number of rows of outlying norm that are not among these.
    """

    explained_variance: Explained
    l0: NonNegative
    dead: Count
    mse: NonNegative
    n_tokens: PositiveInt
    n_left_out: Count = 0
    explained_variance_all: Explained | None = None
    top_variance: Fraction | None = None


def weaknesses(figures: Mapping[str, float]) -> list[str]:
    """Return what is wrong with an SAE and what to try, one sentence or two per weakness.

    Args:
        figures: as of `records.read_figures`. What is not among them is not judged.
    """
    return [text for check in (_dead, _poor, _drifted, _ruled, _untrained) if (text := check(figures))]


def _dead(figures: Mapping[str, float]) -> str | None:
    # The larger sample judges: rare latents may be active on none of the held-out tokens.
    samples = [
        (figures[n_tokens], figures[n_dead])
        for n_dead, n_tokens in (("dead", "n_tokens"), ("dead_training", "dead_window_tokens"))
        if {n_dead, n_tokens, "d_sae"} <= figures.keys()
    ]
    if not samples:
        return None
    n_tokens, n_dead = max(samples)
    share = n_dead / figures["d_sae"]
    if share <= MAX_DEAD:
        return None
    return (
        f"{share:.0%} of the latents are dead: {n_dead:.0f} of {figures['d_sae']:.0f} were not active on "
        f"{n_tokens:,.0f} tokens (accepted: up to {MAX_DEAD:.0%}). Train on more tokens, with a higher `lr`, or "
        "lower `d_sae`."
    )


def _poor(figures: Mapping[str, float]) -> str | None:
    after = figures.get("explained_variance", 1.0)
    if after < figures.get("explained_variance_before", 0.0):
        before = figures["explained_variance_before"]
        return (
            f"The training made the SAE worse: its explained variance fell from {before:.3f} to {after:.3f}. Keep the "
            "SAE it began with, or lower `lr`."
        )
    if after >= MIN_EXPLAINED:
        return None
    return (
        f"The explained variance is {after:.3f} (accepted: from {MIN_EXPLAINED}). Train on more tokens, or raise `k` "
        "or `d_sae`."
    )


def _drifted(figures: Mapping[str, float]) -> str | None:
    l0, k = figures.get("l0", 0.0), figures.get("k", 0.0)
    if not k or abs(l0 / k - 1) <= MAX_DRIFT:
        return None
    return (
        f"At inference {l0:.1f} latents are active per token, in training {k:.4g} were: the threshold has drifted, or "
        "the held-out start of the file is of another kind. Train for more steps, shuffle the file, or lower `lr`."
    )


def _ruled(figures: Mapping[str, float]) -> str | None:
    typical = figures.get("explained_variance", 1.0)
    # Below 0 nothing flatters.
    if (everything := figures.get("explained_variance_all", typical)) > max(0.0, typical + MAX_FLATTERY):
        return (
            f"Outlying tokens rule: the explained variance is {everything:.3f} with them and {typical:.3f} without. "
            f"Only the second counts. Leave them out of the training (`max_norm_ratio` of {MAX_NORM_RATIO:.0f})."
        )
    if (share := figures.get("top_variance", 0.0)) > MAX_TOP_VARIANCE:
        return (
            f"Outlying tokens rule: 1 % of the tokens hold {share:.0%} of the variance, and the explained variance is "
            "mostly theirs. Lower `max_norm_ratio`."
        )
    return None


def _untrained(figures: Mapping[str, float]) -> str | None:
    if (uses := figures.get("n_uses", MIN_USES)) >= MIN_USES:
        return None
    return (
        f"A latent was active on {uses:.0f} tokens of the training on average (accepted: from {MIN_USES}). Train on "
        "more tokens, or lower `d_sae`."
    )


@torch.no_grad()
def evaluate_sae(sae: FrozenSAE, rows: Tensor, *, max_norm_ratio: float = MAX_NORM_RATIO) -> Quality:
    """Return the quality of `sae` on residuals.

    Args:
        sae: the SAE.
        rows: residuals [N, d_in], of any float dtype, on the SAE's device.
        max_norm_ratio: leave out rows with more than this many times the median norm; 0 keeps all.

    Raises:
        SAEError: a transcoder.
        ValueError: rows without variance.
    """
    if sae.transcoder:
        advice = "Compare its output with the place that it computes."
        raise refusal(SAEError, "`sae`", repr(sae), "an SAE, which decodes to the rows that it encoded", advice)
    typical = typical_rows(rows, max_norm_ratio)
    if sae.centered:
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        rows = rows - rows.mean(dim=1, keepdim=True)
    active = torch.zeros(sae.d_sae, dtype=torch.long, device=sae.device)
    errors = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    size = max(1, LATENTS_PER_BLOCK // sae.d_sae)
    for block, kept, error in zip(rows.split(size), typical.split(size), errors.split(size), strict=True):
        f = sae.encode(block)
        error.copy_((sae.decode(f, like=block).double() - block.double()).square().sum(dim=1))
        active += (f[kept] > 0).sum(dim=0)
    error, variances = errors[typical], _variances(rows[typical])
    if not variances.sum():
        advice = "Take more text, such as a larger `held_out_tokens`."
        raise refusal(
            ValueError, "The sample to report on", f"{len(error)} tokens without variance", "tokens that differ", advice
        )
    return Quality(
        explained_variance=1 - float(error.sum() / variances.sum()),
        l0=int(active.sum()) / len(error),
        dead=int((active == 0).sum()),
        mse=float(error.mean()),
        n_tokens=len(error),
        n_left_out=len(rows) - len(error),
        explained_variance_all=1 - float(errors.sum() / _variances(rows).sum()),
        # Rounding may bring the share of all variance above 1.
        top_variance=min(1.0, float(variances.topk(max(1, len(error) // 100)).values.sum() / variances.sum())),
    )


def _variances(rows: Tensor) -> Tensor:
    """Return `(x - mean x)^2` [N] of rows x [N, d_in], summed over d_in, in fp64."""
    mean = rows.mean(dim=0, dtype=torch.float64)
    blocks = rows.split(max(1, LATENTS_PER_BLOCK // rows.shape[1]))
    return torch.cat([(block.double() - mean).square().sum(dim=1) for block in blocks])
